"""Promotions of real registered models in a project whose models have planted accuracies."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

import flows.promote
from flows import promotion, promotion_change, promotion_step
from flows.champion_ref import read_ref
from flows.file_lock import hold_promotion
from flows.promote import parse_arguments, read_time
from flows.promotion import Result, promote_version, roll_back
from flows.promotion_ledger import champion_at, history, now, read_looks
from flows.promotion_models import choose_name, find_challenger
from flows.promotion_page import as_markdown, as_text, headline, history_table
from pipeline.comparison.models import ClassDifference, Difference
from pipeline.comparison.promotion import Check, Decision, Figures, Look, after_look, before_look
from pipeline.core.errors import TemporaryError, UserError
from pipeline.core.git import git
from pipeline.core.yaml import read_yaml
from pipeline.tracking.registry import (
    CHALLENGER,
    CHAMPION,
    MAX_TAG_LENGTH,
    PREVIOUS,
    Version,
    find_versions,
    read_tags,
    set_alias,
    version_of_alias,
)
from pipeline.tracking.store import connect
from tests import promotion_kills
from tests.conftest import PROJECT, params
from tests.promotion_project import NAME, add_model, make_contest


def promote(project: Path, version: Version, *, is_dry_run: bool = False, log: Callable[[str], None] = print) -> Result:
    return promote_version(project, version, params=params(), is_dry_run=is_dry_run, log=log)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, mlflow_store: Path) -> Path:
    folder = tmp_path_factory.mktemp("promotions")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PREFECT_API_URL", raising=False)
        return make_contest(folder, mlflow_store)


@pytest.fixture
def project(prepared: Path, tmp_path: Path, no_servers: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a new copy of the prepared project, which is the current folder."""
    folder = shutil.copytree(prepared, tmp_path / "project")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    connect()
    return folder


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def promote_until(step: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promote version 2, and interrupt that before a step of the change is carried out."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(promotion_change, step, interrupt)
        promote(project, version("2"))


def version(number: str) -> Version:
    return next(one for one in find_versions(NAME) if one.number == number)


def aliases() -> dict[str, str | None]:
    found = {alias: version_of_alias(NAME, alias) for alias in (CHAMPION, PREVIOUS, CHALLENGER)}
    return {alias: one.number if one else None for alias, one in found.items()}


def commit_of(experiment: str) -> str:
    return git(Path.cwd(), "for-each-ref", "--format=%(objectname)", f"refs/exps/*/*/{experiment}")


def test_the_first_model_that_passes_the_checks_is_champion(project: Path) -> None:
    assert aliases() == {CHAMPION: "1", PREVIOUS: None, CHALLENGER: None}
    [change] = history(NAME)
    assert (change.version, change.previous) == ("1", None)
    assert read_ref(project, NAME) == change.commit == commit_of("good")


def test_a_better_model_becomes_champion_by_one_look(project: Path) -> None:
    result = promote(project, version("2"))
    assert result.decision
    assert result.decision.outcome == "promoted"
    assert aliases() == {CHAMPION: "2", PREVIOUS: "1", CHALLENGER: None}
    [look] = read_looks(NAME, version("2").test_md5)
    assert look.result == "promoted"
    record = json.loads(version("2").tags["promote.decision"])
    assert record["figures"]["only_challenger"] == 140
    assert read_ref(project, NAME) == history(NAME)[0].commit


def test_a_model_that_is_not_better_on_validation_is_refused_without_a_look(project: Path) -> None:
    result = promote(project, version("3"))
    assert result.decision
    assert (result.decision.outcome, read_looks(NAME, version("3").test_md5)) == ("refused", [])
    assert aliases() == {CHAMPION: "1", PREVIOUS: None, CHALLENGER: "3"}
    assert version("3").tags["decision"].startswith("refused: better on validation")


def test_a_look_that_shows_no_gain_is_charged_once_for_the_same_two_models(project: Path) -> None:
    made = add_model(project, "lucky", errors=200, validation_errors=10, seed=3)
    outcomes = {promote(project, made).decision.outcome for _ in range(2)}  # type: ignore[union-attr]
    assert outcomes == {"refused"}
    assert [look.result for look in read_looks(NAME, made.test_md5)] == ["refused"]


def test_other_predictions_of_the_same_weights_are_another_look(project: Path) -> None:
    made = add_model(project, "lucky", errors=200, validation_errors=10, seed=3)
    promote(project, made)
    git(project, "update-ref", "-d", git(project, "for-each-ref", "--format=%(refname)", "refs/exps/*/*/lucky"))
    again = add_model(project, "again", errors=199, validation_errors=10, seed=3)
    promote(project, again)
    looks = read_looks(NAME, made.test_md5)
    assert (again.number, [look.challenger for look in looks]) == (made.number, [made.model_md5] * 2)
    assert looks[0].predictions != looks[1].predictions


def test_a_gain_by_another_evaluation_is_refused_without_a_look(project: Path) -> None:
    made = add_model(project, "views", errors=60, seed=3, evaluate={"test_time_augmentation": "mirror"})
    result = promote(project, made)
    assert result.decision
    assert "evaluate.test_time_augmentation is mirror, that of the champion unknown" in result.decision.reason
    assert read_looks(NAME, made.test_md5) == []


def test_predictions_of_other_weights_than_the_registered_ones_are_refused(project: Path) -> None:
    made = add_model(project, "last", errors=60, seed=3, evaluate={"checkpoint": "last"}, evaluated_md5="0" * 32)
    result = promote(project, made)
    assert result.decision
    assert "(evaluate.checkpoint: last); allowed: best; evaluate it with" in result.decision.reason


def test_the_time_for_one_image_is_measured_where_it_is_limited(project: Path) -> None:
    for limit, unit in ((None, "unknown"), (60_000.0, "ms")):
        policy = params(promote__max_latency_milliseconds=limit)
        result = promote_version(project, version("3"), params=policy, is_dry_run=True, log=print)
        assert result.decision
        found = next(check.found for check in result.decision.checks if check.name == "time for one image")
        assert found.endswith(unit)


def test_a_killed_look_stays_charged_with_an_unknown_result(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promotion, "after_look", interrupt)
    with pytest.raises(KeyboardInterrupt):
        promote(project, version("2"))
    [look] = read_looks(NAME, version("2").test_md5)
    assert (look.result, aliases()[CHAMPION]) == ("unknown", "1")


def test_a_spent_budget_refuses_and_asks_for_new_test_data(project: Path) -> None:
    promote_once = params(promote__max_looks=1)
    lucky = add_model(project, "lucky", errors=200, validation_errors=10, seed=3)
    promote_version(project, lucky, params=promote_once, is_dry_run=False, log=print)
    result = promote_version(project, version("2"), params=promote_once, is_dry_run=False, log=print)
    assert result.decision
    assert "new test data are needed" in result.decision.reason


def test_planted_leakage_blocks_a_promotion(project: Path) -> None:
    made = add_model(project, "leaky", errors=20, seed=3, leaked=200)
    result = promote(project, made)
    assert result.decision
    assert result.decision.reason.startswith("leaked test images: 10.00%")
    assert (aliases()[CHAMPION], read_looks(NAME, made.test_md5)) == ("1", [])


def test_the_champion_itself_is_unchanged_and_nothing_is_written(project: Path) -> None:
    tags = read_tags(NAME), version("1").tags
    result = promote(project, version("1"))
    assert result.decision
    assert result.decision.outcome == "unchanged"
    assert (read_tags(NAME), version("1").tags) == tags


@pytest.mark.parametrize(("number", "text"), [("2", "a dry run ends before this look"), ("3", "would be refused")])
def test_a_dry_run_charges_and_changes_nothing(project: Path, number: str, text: str) -> None:
    database = (project / "mlflow.db").read_bytes()
    refs = git(project, "for-each-ref")
    result = promote(project, version(number), is_dry_run=True)
    assert text in headline(result)
    assert ((project / "mlflow.db").read_bytes(), git(project, "for-each-ref")) == (database, refs)


def test_a_champion_predicts_the_images_of_a_new_test_split(project: Path) -> None:
    made = add_model(project, "new-images", errors=0, seed=3, first_image=1420)
    result = promote(project, made)
    assert result.decision
    assert result.decision.figures
    assert result.decision.figures.images == 2000
    assert result.decision.figures.accuracy.b < 0.9  # its weights are random
    assert aliases()[CHAMPION] == made.number


def test_a_champion_for_images_of_another_size_is_kept(project: Path) -> None:
    made = add_model(project, "larger", errors=0, seed=3, first_image=5000, image_size=20)
    result = promote(project, made)
    assert result.decision
    assert "its image_size is 16, that of digits version 4 20" in result.decision.reason


def test_a_rollback_exchanges_champion_and_previous_and_a_second_one_is_refused(project: Path) -> None:
    promote(project, version("2"))
    change = roll_back(project, NAME, log=print)
    for _ in range(2):
        assert aliases() == {CHAMPION: "1", PREVIOUS: "2", CHALLENGER: None}
        assert [one.version for one in history(NAME)] == ["1", "2", "1"]
        assert read_ref(project, NAME) == change.commit
        with pytest.raises(UserError, match="--rollback: the last change of digits's champion was a rollback, to vers"):
            roll_back(project, NAME, log=print)


@pytest.mark.parametrize("step", ["set_alias", "write_change", "set_version_tags", "write_ref", "remove_tag"])
def test_a_rollback_that_was_killed_is_completed_by_the_same_command(
    project: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    promote(project, version("2"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(promotion_change, step, interrupt)
        roll_back(project, NAME, log=print)
    assert roll_back(project, NAME, log=print).version == "1"
    assert (aliases()[CHAMPION], [one.version for one in history(NAME)]) == ("1", ["1", "2", "1"])


def test_a_person_who_moved_the_alias_back_is_not_overruled_by_an_interrupted_promotion(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote_until("set_version_tags", project, monkeypatch)
    set_alias(NAME, CHAMPION, "1")
    promote(project, version("3"))
    assert (aliases()[CHAMPION], [one.version for one in history(NAME)]) == ("1", ["1", "2", "1"])
    assert version("2").tags["decision"].startswith("promoted: the challenger is better")
    assert [look.result for look in read_looks(NAME, version("2").test_md5)] == ["promoted"]


def test_an_interrupted_promotion_that_is_dropped_keeps_what_its_look_showed(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote_until("set_alias", project, monkeypatch)
    set_alias(NAME, CHAMPION, "3")
    promotion_change.complete(project, NAME, commit_of=lambda _: None)
    assert (aliases()[CHAMPION], [one.version for one in history(NAME)]) == ("3", ["3", "1"])
    assert "not carried out: the alias champion was moved" in version("2").tags["decision"]
    assert [look.result for look in read_looks(NAME, version("2").test_md5)] == ["promoted"]


def test_a_checkout_without_the_commit_of_an_interrupted_promotion_completes_the_rest(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote_until("set_alias", project, monkeypatch)
    monkeypatch.setattr(promotion_change, "find_commit", lambda *_: None)
    lines = promotion_change.complete(project, NAME, commit_of=lambda _: None)
    assert (aliases()[CHAMPION], promotion_change.read_pending(NAME)) == ("2", None)
    assert "git has no commit" in lines[-1]


def test_a_champion_that_was_deleted_in_mlflow_blocks_nothing(project: Path) -> None:
    promote(project, version("2"))
    MlflowClient().delete_model_version(NAME, "2")
    result = promote(project, version("3"))
    assert result.decision
    assert (result.decision.outcome, aliases()[CHAMPION]) == ("promoted", "3")
    assert [one.version for one in history(NAME)] == ["3", None, "2", "1"]


def test_a_model_that_was_rolled_back_does_not_return_by_itself(project: Path) -> None:
    promote(project, version("2"))
    roll_back(project, NAME, log=print)
    result = promote(project, version("2"))
    assert result.decision
    assert (result.decision.outcome, aliases()[CHAMPION]) == ("refused", "1")
    assert "UTC from the challenger to version 1; allowed: none" in result.decision.reason
    set_alias(NAME, CHAMPION, "2")  # by hand
    result = promote(project, version("2"))
    assert result.decision
    assert result.decision.outcome == "unchanged"


def test_a_rollback_without_a_previous_champion_is_refused(project: Path) -> None:
    with pytest.raises(UserError, match="no version of digits has the alias previous"):
        roll_back(project, NAME, log=print)


def test_an_alias_that_was_moved_in_mlflow_is_recorded_and_the_ref_follows(project: Path) -> None:
    set_alias(NAME, CHAMPION, "2")
    promote(project, version("3"))
    assert history(NAME)[0].reason == f"{promotion_change.MOVED}; noticed at this time"
    assert (history(NAME)[0].version, aliases()[PREVIOUS]) == ("2", "1")
    assert read_ref(project, NAME) == git(project, "for-each-ref", "--format=%(objectname)", "refs/exps/*/*/better")


def test_a_champion_that_another_machine_has_changed_meanwhile_stays(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def moved(*arguments: Any, **values: Any) -> Any:
        set_alias(NAME, CHAMPION, "3")
        return after_look(*arguments, **values)

    monkeypatch.setattr(promotion, "after_look", moved)
    with pytest.raises(TemporaryError, match="changed from another machine"):
        promote(project, version("2"))
    assert aliases()[CHAMPION] == "3"


def test_of_two_machines_the_last_look_goes_to_neither(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = params(promote__max_looks=1)
    other = add_model(project, "lucky", errors=200, validation_errors=10, seed=3)

    def charge_elsewhere(*arguments: Any, **values: Any) -> Any:
        found = before_look(*arguments, **values)
        monkeypatch.setattr(promotion, "before_look", before_look)
        promote_version(project, other, params=policy, is_dry_run=False, log=print)
        return found

    monkeypatch.setattr(promotion, "before_look", charge_elsewhere)
    monkeypatch.setattr(promotion, "hold_promotion", lambda *_, **__: threading.Lock())  # as on another machine
    with pytest.raises(TemporaryError, match="another machine has charged the last look"):
        promote_version(project, version("2"), params=policy, is_dry_run=False, log=print)
    assert [look.challenger for look in read_looks(NAME, other.test_md5)] == [other.model_md5]


def test_of_two_promotions_at_once_one_waits_and_names_the_other(project: Path) -> None:
    lines: list[str] = []
    waits = threading.Event()

    def log(line: str) -> None:
        lines.append(line)
        waits.set()

    with hold_promotion(project, NAME, command="a promotion", on_wait=print):
        thread = threading.Thread(target=promote, args=(project, version("2")), kwargs={"log": log})
        thread.start()
        assert waits.wait(60)
        assert aliases()[CHAMPION] == "1"
    thread.join()
    assert lines[0].startswith("waiting for a promotion (process ")
    assert aliases()[CHAMPION] == "2"


def test_the_history_says_what_was_champion_when_and_why(project: Path) -> None:
    between = datetime.now(UTC)
    promote(project, version("2"))
    changes = history(NAME)
    found = champion_at(changes, between)
    assert found
    assert (found.version, champion_at(changes, datetime(2020, 1, 1, tzinfo=UTC))) == ("1", None)
    lines = history_table(changes).splitlines()
    assert len(lines) == 3
    assert "the challenger is better than the champion on 2,000 test images" in lines[1]


def test_the_history_says_where_the_alias_was_moved_since(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flows.promote._print_history(NAME, at=None)
    assert "moved" not in capsys.readouterr().out
    set_alias(NAME, CHAMPION, "2")
    flows.promote._print_history(NAME, at="2100-01-01")
    assert "the alias champion is now of version 2: it was moved since" in capsys.readouterr().out


@pytest.mark.parametrize("letter", ["x", "é", '"'])
def test_a_decision_about_many_classes_with_long_names_fits_into_its_tag(letter: str) -> None:
    names = [f"{number:03d}{letter * 250}" for number in range(100)]
    worse = tuple(ClassDifference(name, 50, 0.5, 0.9, 1e-9, 1e-7) for name in names)
    figures = Figures(5000, 1000, 10, Difference(0.9, 0.8, 0.05, 0.15), 1e-99, 0.01, worse)
    checks = tuple(Check(f"check {each}", names[0], names[1], passed=False) for each in range(12))
    reason = "; ".join(check.failure for check in checks)
    for outcome in ("promoted", "refused"):
        decision = Decision(outcome, reason, checks, 12345, 12345, 0.05 / 3, figures)
        one = Version("n" * 200, "12345", None, "a" * 32, "b" * 32, {}, (), 0)
        look = Look(12345, "a" * 32, "b" * 32, 0.05 / 3, now(), "unknown", "c" * 32)
        pending = promotion._pending(Result(one, one, decision), look=look, commit="d" * 40)
        assert len(pending.as_json()) <= MAX_TAG_LENGTH
        record = json.loads(pending.tags["promote.decision"])
        assert (record["outcome"], len(record["checks"])) == (outcome, 12)


def test_the_pages_have_all_figures_and_checks(project: Path) -> None:
    result = promote(project, version("2"))
    for text in (as_text(result), as_markdown(result).replace("\\", "")):
        for part in ("digits version 2 promoted", "+7.00 points", "140 only the challenger", "1 used, 99 left"):
            assert part in text
        assert "better on validation" in text


@pytest.mark.parametrize(
    ("text", "dataset", "message"),
    [
        ("7", None, "CHALLENGER: digits has no version 7; allowed: 3, 2, 1"),
        ("unheard-of", None, "unheard-of"),
        (None, "letters", "--dataset: found 'letters'; allowed: digits"),
    ],
)
def test_a_challenger_that_does_not_exist_is_reported(
    project: Path, text: str | None, dataset: str | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        find_challenger(project, text, dataset=dataset)


def test_the_challenger_is_found_by_experiment_run_or_number_and_is_the_newest_by_default(project: Path) -> None:
    run_id = version("2").run_id
    assert {find_challenger(project, text, dataset=None).number for text in ("2", "better", run_id)} == {"2"}
    assert find_challenger(project, None, dataset=None).number == "3"


def test_a_model_of_the_last_epoch_is_not_registered_and_named_as_such(project: Path) -> None:
    made = add_model(project, "last", errors=60, seed=3, evaluate={"checkpoint": "last"})
    MlflowClient().delete_model_version(NAME, made.number)
    with pytest.raises(UserError, match="CHALLENGER: last was evaluated with evaluate"):
        find_challenger(project, "last", dataset=None)


def test_of_several_data_sets_one_must_be_named(project: Path) -> None:
    add_model(project, "other", errors=10, seed=5, name="letters")
    with pytest.raises(UserError, match="--dataset: it is missing, and there are several; allowed: digits, letters"):
        choose_name(None)


@pytest.mark.parametrize("arguments", [["2", "--rollback"], ["--history", "--dry-run"], ["--at"]])
def test_options_that_contradict_each_other_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(arguments)


def test_a_bad_date_is_refused_and_a_date_alone_is_its_end() -> None:
    assert read_time("2026-11-26T08:00+00:00") == datetime(2026, 11, 26, 8, tzinfo=UTC)
    assert read_time("2026-11-26").astimezone().hour == 23
    with pytest.raises(UserError, match="--at: found 'yesterday'"):
        read_time("yesterday")


def test_a_training_states_what_its_promotion_decided_and_never_fails_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    states: Iterator[State[Any] | None] = iter(
        [Completed(message="digits version 2 refused: x"), Failed(message="MLflow does not answer"), None]
    )

    def promote(*_: object, **__: object) -> State[Any]:
        if state := next(states):
            return state
        raise RuntimeError("a defect")

    monkeypatch.setattr(flows.promote, "promote", promote)
    monkeypatch.setattr(promotion_step, "warn", warnings.append)
    messages = [promotion_step.promote_experiment("digits-1") for _ in range(3)]
    assert messages == ["digits version 2 refused: x", *warnings]
    assert warnings == [f"the promotion failed: {reason}" for reason in ("MLflow does not answer", "a defect")]


def test_the_nightly_deployment_promotes_and_the_one_for_people_does_not() -> None:
    deployments = {one["name"]: one.get("parameters", {}) for one in read_yaml(PROJECT / "prefect.yaml")["deployments"]}
    assert deployments["nightly"]["promote"] is True
    assert "promote" not in deployments["on-demand"]


@pytest.mark.slow
def test_everything_agrees_after_a_kill_at_any_point(prepared: Path, tmp_path: Path) -> None:
    """Kill at 5 points of a promotion and one of a rollback; `python -m tests.promotion_kills` kills at all of them."""
    promotion_kills.start_fork_server()
    whole = shutil.copytree(prepared, tmp_path / "whole")
    status, reached = promotion_kills.run(promotion_kills.promote_in, whole)
    assert (status, len(reached) > 15) == (0, True)
    for last in promotion_kills.points(len(reached), 5):
        promotion_kills.kill_at(prepared, tmp_path, target=promotion_kills.promote_in, last=last)
    promotion_kills.kill_at(whole, tmp_path, target=promotion_kills.roll_back_in, last=12)
