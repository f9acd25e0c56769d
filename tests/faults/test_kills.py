"""A training that is killed at any point, any number of times, has the result of an uninterrupted one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import (
    CHOSEN_EVENTS,
    Result,
    Site,
    differences,
    is_done,
    open_site,
    plans,
    result,
    train_with_kills,
)

KILLS = 25


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_site(tmp_path_factory.mktemp("faults")) as found:
        yield found


@pytest.fixture(scope="module")
def uninterrupted(site: Site) -> tuple[Result, int]:
    """Return the outcome of an uninterrupted training, and the number of its events."""
    project = site.project()
    assert site.train(project) == 0, (project / "output.txt").read_text()
    assert is_done(project)
    return result(project), len((project / "events.txt").read_text().splitlines())


def test_a_training_killed_at_any_point_has_the_result_of_an_uninterrupted_one(
    site: Site, uninterrupted: tuple[Result, int]
) -> None:
    expected, events = uninterrupted
    killed = 0
    for number, plan in enumerate(plans(events=events, seed=0)):
        if number >= len(CHOSEN_EVENTS) and killed >= KILLS:
            break
        found, points = train_with_kills(site, plan)
        # the number of events depends on the speed, so a training may end before an event of a given number
        assert points or isinstance(plan[0], int), f"no kill at {plan}"
        assert found == expected, f"killed at {points}: {differences(found, expected)}"
        killed += len(points)


def test_an_uninterrupted_training_has_one_finished_run_with_one_model(uninterrupted: tuple[Result, int]) -> None:
    [(status, history)] = uninterrupted[0].runs
    assert (status, history["models"]) == ("FINISHED", 1)
    assert [step for step, _ in history["step/loss"]] == list(range(1, 25))
    assert [step for step, _ in history["validation/loss"]] == [0, 1, 2, 3, 4]


def test_a_file_that_differs_is_reported(uninterrupted: tuple[Result, int], tmp_path: Path) -> None:
    other = Result({**uninterrupted[0].files, "best.safetensors": "0" * 32}, uninterrupted[0].runs)
    assert differences(other, uninterrupted[0]) == f"DIFFERENT: best.safetensors {'0' * 32}"
