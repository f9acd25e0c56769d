"""Compute the learning rate of a step by one of the schedules."""

import math

from pipeline.params import TrainParams


def learning_rate(step: int, *, steps_per_epoch: int, params: TrainParams) -> float:
    """Return the learning rate of a step (from 0): a linear warm-up to the peak, then the schedule for the other steps.

    `one_cycle` is PyTorch's OneCycleLR (Smith and Topin 2017, arXiv:1708.07120) with its defaults: a cosine from a
    25th of the peak up to the peak, and a cosine down to a 250,000th of it. `cosine` is Loshchilov and Hutter 2016
    (arXiv:1608.03983) without restarts. `linear` rises from a fifth of the peak and falls to 7 % of it, as in
    airbench94 (arXiv:2404.00498).
    """
    peak, total = params.learning_rate, params.epochs * steps_per_epoch
    warmup = params.warmup_fraction * total
    if params.schedule == "one_cycle":
        return _one_cycle(step, warmup=warmup, total=total, peak=peak)
    if params.schedule == "linear":
        warmed_up, decayed = step / warmup if warmup else 1.0, (step - warmup) / (total - warmup)  # fractions
        return peak * (0.2 + 0.8 * warmed_up if step < warmup else 1 - 0.93 * decayed)
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
    """Return the learning rate of a step by PyTorch's OneCycleLR."""
    peak_step = warmup - 1
    if step <= peak_step:
        return _cosine(peak / 25, peak, step / peak_step if peak_step else 1.0)
    return _cosine(peak, peak / 250_000, (step - peak_step) / (total - 1 - peak_step))


def _cosine(start: float, end: float, fraction: float) -> float:
    """Return the value at a fraction of half a cosine wave from `start` to `end`."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * fraction))
