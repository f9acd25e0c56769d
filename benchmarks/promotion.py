"""Measure how often the gate to the champion is wrong in a year, and how soon it promotes a better model.

`python -m benchmarks.promotion [--models FOLDER]` simulates nights, each with a new challenger, by the functions that
decide about a promotion, with the policy of params.yaml. All images of a year are the same, and so is the champion.

First table: in each of 365 nights, the challenger is exactly as good as the champion, so that each promotion is false.
With --models, the challengers have the predictions of real models (a folder that benchmarks/population.py writes; each
image has those of a random model of the recipe, and the images of a year are drawn with replacement); without it,
models are simulated that are right on 75 % of the images (see benchmarks/simulated_models.py).

Second table: the challenger is truly 2 points better on such images; the probability of a promotion within three
nights. "Discordance" is the share of images that only one of challenger and champion gets right. A champion is median
or unlucky for the challenger: on both splits, as many of its answers are right as the 50th or the 95th percentile of
equally good models has right on the same images. Early is night 1; late follows on 330 nights of challengers that are
as good as the champion, with their looks spent.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from scipy import stats

from benchmarks.setting import positive
from benchmarks.simulated_models import (
    BetaSplit,
    Generator,
    Population,
    Split,
    discordance_of_equals,
    read_populations,
)
from benchmarks.table import header, table
from pipeline.comparison.pairing import Pairing
from pipeline.comparison.promotion import Challenger, Decision, Look, TestSplit, after_look, before_look
from pipeline.core.errors import report_errors
from pipeline.evaluation.calibration import expected_calibration_error
from pipeline.evaluation.predictions import Predictions
from pipeline.params import PromoteParams, load_params

TEST_IMAGES = 10_000
VALIDATION_IMAGES = (5_000, 1_000)
DISCORDANCES = (0.10, 0.15, 0.20, 0.25)
DISCORDANCE = 0.15  # of equal models without --models
GAIN = 0.02
NIGHTS = 365
NIGHTS_BEFORE_LATE = 330
NIGHTS_TO_PROMOTE = 3
CHAMPIONS = {"median": 50, "unlucky": 95}  # percentile of the accuracy among equally good models on the same images
CONFIDENCE = 0.95
TARGET = 0.075  # upper bound of the share of years with a false promotion
YEARS_AT_ONCE = 10

Result = TypeVar("Result")


@dataclass
class Gate:
    """The gate to a champion on a test split, with the ledger of the looks at it."""

    policy: PromoteParams
    champion_test: Predictions
    champion_validation: Predictions
    looks: list[Look] = field(default_factory=list)

    def promotes(self, test: Split, validation: Split, generator: Generator) -> bool:
        """Return whether a new challenger, whose predictions these splits draw, would become champion.

        The test predictions, and the calibration error that is made of them, are drawn only for a look, since nothing
        reads them before; nothing reads probabilities for validation images.
        """
        errors = int((~self.champion_test.is_correct).sum())
        found = before_look(
            Challenger(f"challenger {generator.integers(2**62)}", 0.0, calibration_error=None, megabytes=1.0),
            champion_md5="champion",
            validation=_pair(validation.draw(generator, has_probabilities=False), self.champion_validation),
            test=TestSplit(len(self.champion_test), errors),
            looks=self.looks,
            params=self.policy,
        )
        if isinstance(found, Decision):
            return False
        number = len(self.looks) + 1
        self.looks.append(Look(number, found.challenger.model_md5, found.champion_md5, found.level, time=""))
        predictions = test.draw(generator)
        confidences = predictions.confidences(predictions.probabilities)
        error = expected_calibration_error(confidences, predictions.is_correct)
        look = replace(found, challenger=replace(found.challenger, calibration_error=error))
        return after_look(look, _pair(predictions, self.champion_test), params=self.policy).outcome == "promoted"


def _pair(challenger: Predictions, champion: Predictions) -> Pairing:
    """Return the pairing of models with the same images in the same order, none of which leaked."""
    return Pairing((challenger, champion), same_split=True, not_common=(0, 0), trained_on=0, leaked=0, relabeled=0)


@dataclass(frozen=True)
class Year:
    """The number of false promotions and of looks in a year of nights with equal models."""

    promotions: int
    looks: int
    is_spent: bool
    discordance: float  # of a challenger and the champion on the test split


def simulate_year(seed: int, *, population: Population | None, policy: PromoteParams, nights: int) -> Year:
    """Simulate nights with challengers as good as the champion, which stays the champion whatever happens."""
    generator = np.random.default_rng(seed)
    splits = (
        population.draw_splits(generator)
        if population
        else beta_splits(VALIDATION_IMAGES[0], discordance=DISCORDANCE, generator=generator)
    )
    test, validation = splits
    gate = Gate(policy, test.draw(generator), validation.draw(generator))
    promotions = sum(gate.promotes(test, validation, generator) for _ in range(nights))
    other = test.draw(generator)
    discordance = float((other.is_correct != gate.champion_test.is_correct).mean())
    return Year(promotions, len(gate.looks), len(gate.looks) >= policy.max_looks, discordance)


def beta_splits(validation_images: int, *, discordance: float, generator: Generator) -> tuple[BetaSplit, BetaSplit]:
    """Return a test and a validation split for models with Beta-distributed probabilities."""
    test, validation = (
        BetaSplit.make(number, discordance=discordance, generator=generator)
        for number in (TEST_IMAGES, validation_images)
    )
    return test, validation


@dataclass(frozen=True)
class Case:
    """A champion and splits for the table of the power."""

    discordance: float
    validation_images: int
    champion: str


@dataclass(frozen=True)
class Trial:
    """Whether a better model was promoted within three nights, early and late, and the looks spent before late."""

    early: bool
    late: bool
    looks: int


def simulate_trial(seed: int, *, case: Case, policy: PromoteParams) -> Trial:
    """Simulate a better model at the gate of a champion, in the first nights and after a year of equal models."""
    generator = np.random.default_rng(seed)
    equal = discordance_of_equals(case.discordance, gain=GAIN)
    splits = beta_splits(case.validation_images, discordance=equal, generator=generator)
    test, validation = (split.draw_ranked(CHAMPIONS[case.champion], generator) for split in splits)
    better = splits[0].better(GAIN), splits[1].better(GAIN)
    early, late = Gate(policy, test, validation), Gate(policy, test, validation)
    for _ in range(NIGHTS_BEFORE_LATE):
        late.promotes(*splits, generator)
    looks = len(late.looks)
    promoted = [any(gate.promotes(*better, generator) for _ in range(NIGHTS_TO_PROMOTE)) for gate in (early, late)]
    return Trial(early=promoted[0], late=promoted[1], looks=looks)


def upper_bound(count: int, number: int) -> float:
    """Return the one-sided upper bound of a probability, with confidence CONFIDENCE (Clopper and Pearson 1934)."""
    return float(stats.beta.ppf(CONFIDENCE, count + 1, number - count)) if count < number else 1.0


def year_row(name: str, years: Sequence[Year]) -> list[str]:
    """Return the row of a population of equal models."""
    false, looks = sum(year.promotions > 0 for year in years), [year.looks for year in years]
    return [
        name,
        f"{np.mean([year.discordance for year in years]):.3f}",
        f"{len(years):,}",
        f"{false} ({false / len(years):.2%})",
        f"{upper_bound(false, len(years)):.2%}",
        f"{np.mean(looks):.1f}",
        f"{np.percentile(looks, 95):.0f}",
        str(max(looks)),
        f"{np.mean([year.is_spent for year in years]):.1%}",
    ]


YEAR_HEADING = ["equal models", "discordance", "years", "years with a false promotion", "upper 95 % bound"]
YEAR_HEADING += ["looks: mean", "95th percentile", "most", "years with a spent budget"]


def power_rows(trials: Sequence[tuple[Case, Sequence[Trial]]]) -> list[list[str]]:
    """Return the table of the power: a column for each discordance."""
    heading = ["validation images", "champion", "when", *(f"discordance {each:.2f}" for each in DISCORDANCES)]
    rows: dict[tuple[str, ...], list[str]] = {}
    for case, found in trials:
        key = f"{case.validation_images:,}", case.champion
        early, late, looks = (np.mean([getattr(trial, name) for trial in found]) for name in ("early", "late", "looks"))
        rows.setdefault((*key, "early"), []).append(f"{early:.1%}")
        rows.setdefault((*key, "late"), []).append(f"{late:.1%} (after {looks:.0f} looks)")
    return [heading, *([*key, *cells] for key, cells in rows.items())]


def report_progress(case: Case, trials: Sequence[Trial]) -> None:
    """Write the result of a case to stderr, since all of them take long."""
    early, late = (sum(getattr(trial, name) for trial in trials) for name in ("early", "late"))
    print(f"{case}: {early} early and {late} late of {len(trials)}", file=sys.stderr, flush=True)


def run_all(function: Callable[[int], Result], seeds: Iterable[int], *, processes: int) -> list[Result]:
    """Return the results of a function for all seeds, in their order."""
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(function, seeds, chunksize=YEARS_AT_ONCE))


def level(text: str) -> float:
    """Convert an argument to the level of a test; argparse reports the error."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 0.5:
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed: a number above 0, up to 0.5")
    return value


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.promotion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="predictions of real models")
    parser.add_argument("--years", type=positive, default=1000, help="default: 1000")
    parser.add_argument("--nights", type=positive, default=NIGHTS, help="in a year; default: 365")
    parser.add_argument("--trials", type=positive, default=500, help="for a cell of the second table; default: 500")
    parser.add_argument("--processes", type=positive, default=2, help="default: 2")
    parser.add_argument("--max-looks", type=positive, help="in place of promote.max_looks")
    parser.add_argument("--validation-level", type=level, help="in place of promote.validation_level")
    return parser.parse_args()


def main() -> None:
    """Simulate years and trials, and print the tables."""
    arguments = parse()
    changes = {"max_looks": arguments.max_looks, "validation_level": arguments.validation_level}
    policy = load_params().promote.model_copy(update={name: value for name, value in changes.items() if value})
    populations: list[Population | None] = [*read_populations(arguments.models)] if arguments.models else [None]
    print(header(seeds=f"0 to {max(arguments.years, arguments.trials) - 1}"))
    print(f"policy: {', '.join(f'{name} {value}' for name, value in policy)}\n")
    rows = [YEAR_HEADING]
    for population in populations:
        if population:  # once, not in each process
            _ = population.test.predicted, population.validation.predicted
        year = partial(simulate_year, population=population, policy=policy, nights=arguments.nights)
        years = run_all(year, range(arguments.years), processes=arguments.processes)
        name = f"{len(population.test.probabilities)} of {population.recipe}" if population else "simulated"
        rows.append(year_row(name, years))
    print(f"{table(rows)}\n\nallowed: an upper bound of {TARGET:.1%}\n", flush=True)
    cases = [Case(d, images, name) for images in VALIDATION_IMAGES for name in CHAMPIONS for d in DISCORDANCES]
    trials = []
    for case in cases:
        trial = partial(simulate_trial, case=case, policy=policy)
        trials.append((case, run_all(trial, range(arguments.trials), processes=arguments.processes)))
        report_progress(*trials[-1])
    print(f"promoted within {NIGHTS_TO_PROMOTE} nights, {arguments.trials} trials each:\n\n{table(power_rows(trials))}")


if __name__ == "__main__":
    with report_errors():
        main()
