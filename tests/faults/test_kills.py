"""A training that is killed by SIGKILL anywhere in its life, any number of times, ends as if it had not been."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import (
    DIRECTED,
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
def whole(site: Site) -> tuple[Result, int]:
    """What an uninterrupted training leaves, and how many events its life has."""
    project = site.project()
    assert site.train(project) == 0, (project / "output.txt").read_text()
    assert is_done(project)
    return result(project), len((project / "events.txt").read_text().splitlines())


def test_a_training_killed_at_any_point_ends_as_if_it_had_not_been(site: Site, whole: tuple[Result, int]) -> None:
    expected, events = whole
    killed = 0
    for number, plan in enumerate(plans(events=events, seed=0)):
        if number >= len(DIRECTED) and killed >= KILLS:
            break
        found, points = train_with_kills(site, plan)
        # how many events there are depends on the speed: a number may lie beyond the end
        assert points or isinstance(plan[0], int), f"no kill at {plan}"
        assert found == expected, f"killed at {points}: {differences(found, expected)}"
        killed += len(points)


def test_an_uninterrupted_training_has_one_finished_run_with_one_model(whole: tuple[Result, int]) -> None:
    [(status, history)] = whole[0].runs
    assert (status, history["models"]) == ("FINISHED", 1)
    assert [step for step, _ in history["loss"]] == list(range(1, 25))
    assert [step for step, _ in history["validation_loss"]] == [1, 2, 3, 4]


def test_a_file_that_differs_would_be_seen(whole: tuple[Result, int], tmp_path: Path) -> None:
    other = Result({**whole[0].files, "best.safetensors": "0" * 32}, whole[0].runs)
    assert differences(other, whole[0]) == f"DIFFERENT: best.safetensors {'0' * 32}"
