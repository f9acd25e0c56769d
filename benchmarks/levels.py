"""Measure how often the comparisons call equal models and equal recipes different, on predictions of many models.

`python -m benchmarks.levels [--models FOLDER | --train N] [--draws N] [--groups N]` reads a folder of
`benchmarks.population`, or trains N models of the recipe digits. It prints:

1. The level of the model test. Two models are made equal by swapping their predictions of each image with probability
   1/2; the table has the fraction of draws in which `compare_accuracies` calls them different, and in which Holm's
   correction calls any class different. The range is the 95 % Wilson interval of the simulation; "exact" is the sum of
   the binomial probabilities of all results that are called different.
2. The fraction of pairs of seeds of one recipe that the model test calls different. Two seeds are two different models,
   so that this fraction has no target.
3. The level of the recipe test: two disjoint groups of seeds of one recipe, and the fraction of draws in which
   `compare_recipes` calls the groups different, beside a percentile bootstrap over the models and Welch's t-test. The
   draws overlap, since they are from a limited number of models. The standard error is that of a jackknife that leaves
   out one model at a time (Efron and Stein 1981); it is no binomial one. All groups are tested on the same images.
4. The power of the recipe test: in one of the groups, wrong predictions are made right with a probability that raises
   the expected accuracy by the shift.
"""

import argparse
import itertools
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import stats

from benchmarks.setting import PROJECT, positive, scratch, timed
from benchmarks.table import header, table
from pipeline.comparison.models import compare_accuracies, holm
from pipeline.comparison.paired import LEVEL, mcnemar
from pipeline.comparison.recipes import compare_recipes
from pipeline.core.errors import UserError, report_errors
from pipeline.evaluation.intervals import wilson_interval

Correct = npt.NDArray[np.bool_]  # (number of models, number of images)
IMAGES = (10_000, 1_000, 300)  # test images in the model test, where there are as many
SEEDS = (2, 3, 5, 10)  # models in a group
SHIFTS = (0.005, 0.01, 0.02)
POWER_GROUPS = 300  # draws for the power
WAYS = ("compare_recipes", "percentile bootstrap", "Welch's t-test")
BOOTSTRAP_RESAMPLES = 1000


@dataclass(frozen=True)
class Population:
    """The models of a folder: which of the N test images each gets right, by recipe, and the actual classes (N,)."""

    actual: npt.NDArray[np.int64]
    correct: dict[str, Correct]


def read_population(folder: Path) -> Population:
    """Read a folder of `benchmarks.population`; raises UserError where it has no models or no labels."""
    labels, models = folder / "labels.npz", defaultdict[str, list[tuple[int, Path]]](list)
    for path in folder.glob("*-*.npz"):
        recipe, _, seed = path.stem.rpartition("-")
        if seed.isdecimal():
            models[recipe].append((int(seed), path))
    if not labels.is_file() or not models:
        raise UserError(
            f"{folder}: found {'labels.npz' if labels.is_file() else 'no labels.npz'} and {len(models)} recipes; "
            "allowed: a folder with labels.npz and <recipe>-<seed>.npz; make it with `python -m benchmarks.population`"
        )
    with np.load(labels) as file:
        actual = file["test_labels"].astype(np.int64)
    return Population(actual, {name: read_correct(sorted(found), actual) for name, found in sorted(models.items())})


def read_correct(models: Sequence[tuple[int, Path]], actual: npt.NDArray[np.int64]) -> Correct:
    """Return which test images each model gets right."""
    rows = []
    for _, path in models:
        with np.load(path) as file:
            rows.append(file["test_probabilities"].argmax(1) == actual)
    return np.array(rows)


def exact_level(discordant: int, *, images: int) -> float:
    """Return the probability that two equal models with this number of discordant images are called different."""
    only_a = np.arange(discordant + 1)
    shown = [is_shown(int(each), discordant - int(each), images=images) for each in only_a]
    return float(stats.binom.pmf(only_a, discordant, 0.5) @ np.array(shown))


def is_shown(only_a: int, only_b: int, *, images: int) -> bool:
    """Return whether two models are called different; images on which both are right or wrong do not matter to this."""
    found = compare_accuracies(both=0, only_a=only_a, only_b=only_b, neither=images - only_a - only_b)
    return found.verdict != "not shown"


def swap(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_], *, draws: int, seed: int) -> Correct:
    """Return for each discordant image (draws, discordant) whether A alone gets it right after a swap by chance.

    A swap changes nothing for an image that both models get right or wrong.
    """
    only_a = a[a != b]
    is_swapped = np.random.default_rng(seed).integers(0, 2, (draws, len(only_a)), np.uint8) == 1
    swapped: Correct = is_swapped != only_a
    return swapped


def shown_draws(drawn: Correct, *, images: int) -> int:
    """Return the number of draws in which the models are called different."""
    discordant = drawn.shape[1]
    values, counts = np.unique(drawn.sum(1), return_counts=True)
    return sum(
        int(count) * is_shown(int(only_a), discordant - int(only_a), images=images)
        for only_a, count in zip(values, counts, strict=True)
    )


def draws_with_a_class(drawn: Correct, classes: npt.NDArray[np.int64], *, num_classes: int) -> int:
    """Return the number of draws in which any class is called different; `classes` are those of the drawn images."""
    p_values = np.empty((len(drawn), num_classes))
    for index in range(num_classes):
        only_a = drawn[:, classes == index]
        by_count = np.array([mcnemar(each, only_a.shape[1] - each) for each in range(only_a.shape[1] + 1)])
        p_values[:, index] = by_count[only_a.sum(1)]
    return sum(min(holm(list(each))) <= LEVEL for each in p_values)


def model_rows(population: Population, *, draws: int) -> list[list[str]]:
    """Return the table of the level of the model test, for pairs of models and numbers of images."""
    heading = ["models", "test images", "discordant", "called different", "exact", "any class called different"]
    rows, total = [heading], len(population.actual)
    num_classes = int(population.actual.max()) + 1
    pairs = model_pairs(population)
    for seed, ((name, a, b), images) in enumerate(itertools.product(pairs, sizes(total))):
        chosen = np.sort(np.random.default_rng(seed).permutation(total)[:images])
        right_a, right_b, actual = a[chosen], b[chosen], population.actual[chosen]
        drawn = swap(right_a, right_b, draws=draws, seed=seed)
        with_class = draws_with_a_class(drawn, actual[right_a != right_b], num_classes=num_classes)
        exact = exact_level(drawn.shape[1], images=images)
        fractions = fraction(shown_draws(drawn, images=images), draws), fraction(with_class, draws)
        rows.append([name, f"{images:,}", f"{drawn.shape[1]:,}", fractions[0], f"{exact:.2%}", fractions[1]])
    return rows


def model_pairs(population: Population) -> list[tuple[str, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]]:
    """Return pairs of models with their names: two seeds of each recipe, and a seed of each two recipes."""
    models = population.correct
    pairs = [(f"{name}, 2 seeds", found[0], found[1]) for name, found in models.items() if len(found) > 1]
    pairs += [(f"{one}, {other}", models[one][0], models[other][0]) for one, other in itertools.combinations(models, 2)]
    return pairs


def sizes(total: int) -> list[int]:
    """Return the numbers of test images for the model test."""
    return sorted({total, *(each for each in IMAGES if each < total)}, reverse=True)


def fraction(number: int, draws: int) -> str:
    """Return a fraction of draws with its 95 % Wilson interval."""
    low, high = wilson_interval(number, draws)
    return f"{number / draws:.2%} ({low:.2%} to {high:.2%})"


def pair_rows(population: Population) -> list[list[str]]:
    """Return the table of the fractions of pairs of seeds that are called different."""
    rows = [["recipe", "models", "accuracy (mean ± sd)", "pairs", "called different"]]
    for name, correct in population.correct.items():
        pairs = list(itertools.combinations(correct, 2))
        shown = sum(is_shown(int((a & ~b).sum()), int((b & ~a).sum()), images=correct.shape[1]) for a, b in pairs)
        if pairs:
            accuracies = correct.mean(1)
            accuracy = f"{accuracies.mean():.2%} ± {accuracies.std(ddof=1):.2%}"
            rows.append([name, str(len(correct)), accuracy, f"{len(pairs):,}", f"{shown / len(pairs):.0%}"])
    return rows


def draw_groups(models: int, *, seeds: int, draws: int) -> npt.NDArray[np.int64]:
    """Return for each draw the models of both groups: (draws, 2 * seeds), no model twice in a draw."""
    random = np.random.default_rng(seeds)
    return np.array([random.choice(models, 2 * seeds, replace=False) for _ in range(draws)])


def called_different(a: Correct, b: Correct) -> list[bool]:
    """Return whether each of `WAYS` calls two groups of models different."""
    accuracies = a.mean(1), b.mean(1)
    if np.ptp(np.concatenate(accuracies)) == 0:
        return [False] * len(WAYS)
    low, high = percentile_interval(*accuracies)
    by_t_test = welch_p_value(*accuracies) <= LEVEL
    return [compare_recipes(a, b).verdict != "not shown", not low <= 0 <= high, by_t_test]


def welch_p_value(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Return the p-value of Welch's t-test, 0 where the models of both groups are all equally accurate."""
    if np.ptp(a) == 0 == np.ptp(b):
        return 0.0
    moments = [value for each in (a, b) for value in (each.mean(), each.std(ddof=1), len(each))]
    return float(stats.ttest_ind_from_stats(*moments, equal_var=False).pvalue)


def percentile_interval(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Return the percentile interval of the difference of two means over models."""
    random = np.random.default_rng(0)
    means = [each[random.integers(0, len(each), (BOOTSTRAP_RESAMPLES, len(each)))].mean(1) for each in (a, b)]
    low, high = np.quantile(means[0] - means[1], [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def jackknife_error(shown: npt.NDArray[np.bool_], groups: npt.NDArray[np.int64], *, models: int) -> float:
    """Return the standard error of the fraction of draws that are `shown`, where `groups` has the models of each draw.

    The fraction without a model is that of the draws without it. The part of the jackknife's variance that is due to
    the limited number of draws is subtracted, and the binomial variance of the draws is added.
    """
    takes_part = (groups[:, :, None] == np.arange(models)).any(1)
    without = (~takes_part).sum(0)
    if not without.all():
        return float("nan")
    fractions = (shown[:, None] & ~takes_part).sum(0) / without
    binomial = shown.mean() * (1 - shown.mean())
    variance = (models - 1) * (fractions.var() - binomial * (1 / without - 1 / len(shown)).mean())
    return float(np.sqrt(max(0.0, variance) + binomial / len(shown)))


def recipe_rows(population: Population, *, draws: int) -> list[list[str]]:
    """Return the table of the level of the recipe test."""
    rows = [["recipe", "models", "seeds in a group", "draws", *(f"{way} (± standard error)" for way in WAYS)]]
    for (name, correct), seeds in itertools.product(population.correct.items(), SEEDS):
        if len(correct) < 2 * seeds + 1:
            continue
        groups = draw_groups(len(correct), seeds=seeds, draws=draws)
        shown = np.array([called_different(correct[each[:seeds]], correct[each[seeds:]]) for each in groups])
        cells = [
            f"{of_way.mean():.1%} ± {jackknife_error(of_way, groups, models=len(correct)):.1%}" for of_way in shown.T
        ]
        rows.append([name, str(len(correct)), str(seeds), f"{draws:,}", *cells])
    return rows


def power_rows(population: Population) -> list[list[str]]:
    """Return the table of the power of the recipe test."""
    rows = [["recipe", "seeds in a group", *(f"+{100 * shift:g} points called better" for shift in SHIFTS)]]
    for (name, correct), seeds in itertools.product(population.correct.items(), SEEDS):
        if len(correct) >= 2 * seeds:
            groups = draw_groups(len(correct), seeds=seeds, draws=POWER_GROUPS)
            rows.append([name, str(seeds), *(power(correct, groups, shift=shift) for shift in SHIFTS)])
    return rows


def power(correct: Correct, groups: npt.NDArray[np.int64], *, shift: float) -> str:
    """Return the fraction of draws in which the first group is called better, with its accuracy raised by `shift`."""
    if correct.mean() + shift > 1:
        return "impossible"
    random, seeds, better = np.random.default_rng(0), groups.shape[1] // 2, 0
    probability = shift / (1 - correct.mean())
    for each in groups:
        a, b = correct[each[:seeds]], correct[each[seeds:]]
        better += compare_recipes(a | (random.random(a.shape) < probability), b).verdict == "better"
    return f"{better / len(groups):.0%}"


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.levels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--models", type=Path, metavar="FOLDER", help="of python -m benchmarks.population")
    source.add_argument(
        "--train", type=positive, default=60, metavar="N", help="models of digits; default: %(default)s"
    )
    parser.add_argument("--draws", type=positive, default=10_000, metavar="N", help="of swaps; default: %(default)s")
    parser.add_argument(
        "--groups", type=positive, default=4000, metavar="N", help="draws of groups; default: %(default)s"
    )
    return parser.parse_args()


def measure(folder: Path, *, draws: int, groups: int) -> None:
    """Measure on the models of a folder, and print the tables."""
    population = read_population(folder)
    found = ", ".join(f"{len(correct)} of {name}" for name, correct in population.correct.items())
    print(header(seeds=found))
    print(f"Level of the model test, {draws:,} draws:\n\n{table(model_rows(population, draws=draws))}\n", flush=True)
    print(f"Pairs of seeds that the model test calls different:\n\n{table(pair_rows(population))}\n", flush=True)
    print(f"Level of the recipe test:\n\n{table(recipe_rows(population, draws=groups))}\n", flush=True)
    print(f"Power of the recipe test, {POWER_GROUPS} draws:\n\n{table(power_rows(population))}", flush=True)


def main() -> None:
    """Train the models if no folder is named, and measure."""
    arguments = parse_arguments()
    if arguments.models:
        measure(arguments.models, draws=arguments.draws, groups=arguments.groups)
        return
    with scratch() as folder:
        command = ["benchmarks.population", "digits", "--seeds", str(arguments.train), "--out", folder]
        timed(sys.executable, "-m", *command, cwd=PROJECT)
        measure(Path(folder), draws=arguments.draws, groups=arguments.groups)


if __name__ == "__main__":
    with report_errors():
        main()
