"""The learning-rate schedules."""

import math

from pipeline.params import TrainParams


def learning_rate(step: int, *, steps_per_epoch: int, params: TrainParams) -> float:
    """Return the learning rate of a step (from 0): a linear warm-up to the peak, then the schedule over the rest.

    `one_cycle` is PyTorch's OneCycleLR (Smith and Topin 2017, arXiv:1708.07120) with its defaults: cosine from a 25th
    of the peak, and cosine down to a 250,000th. `cosine` is Loshchilov and Hutter 2016 (arXiv:1608.03983) without
    restarts. `linear` climbs from a fifth of the peak and falls to 7 % of it, as in airbench94 (arXiv:2404.00498).
    """
    peak, total = params.learning_rate, params.epochs * steps_per_epoch
    warmup = params.warmup_fraction * total
    if params.schedule == "one_cycle":
        return _one_cycle(step, warmup=warmup, total=total, peak=peak)
    if params.schedule == "linear":
        up, down = step / warmup if warmup else 1.0, (step - warmup) / (total - warmup)
        return peak * (0.2 + 0.8 * up if step < warmup else 1 - 0.93 * down)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    match params.schedule:
        case "constant":
            return peak
        case "step":
            return peak * float(params.step_factor ** ((step - warmup) // (params.step_epochs * steps_per_epoch)))
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def _one_cycle(step: int, *, warmup: float, total: int, peak: float) -> float:
    top = warmup - 1
    if step <= top:
        return _cosine(peak / 25, peak, step / top if top else 1.0)
    return _cosine(peak, peak / 250_000, (step - top) / (total - 1 - top))


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * fraction))
