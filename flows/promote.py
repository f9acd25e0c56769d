"""The flow `promote`: decide whether an evaluated model becomes the champion of its data set; and its command line.

`python -m flows.promote [CHALLENGER] [--dataset NAME] [--dry-run | --rollback | --history | --at DATE]`. CHALLENGER:
number of a version, DVC experiment, id or name of an MLflow run; by default the newest version that is not the
champion. Exit status: 0 promoted or unchanged, 3 refused, 2 a mistake to fix, 75 another try may help; of a dry run, 0
also where the challenger would be promoted or compared on the test split, and 3 where it would be refused.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import chdir
from datetime import UTC, datetime

from prefect import Flow, flow, runtime
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.settings import temporary_settings
from prefect.states import Completed, Failed

from flows import PROJECT
from flows.command_line import server_settings
from flows.doctor import register_process
from flows.flow_run import exit_status
from flows.live_progress import artifact_key
from flows.prefect_server import ensure_server
from flows.promotion import Result, promote_version, roll_back
from flows.promotion_ledger import Change, champion_at, history
from flows.promotion_models import choose_name, connect_store, find_challenger
from flows.promotion_page import as_markdown, as_text, change_as_markdown, describe_change, headline, history_table
from flows.run_log import leave_failure_to_caller, log, shorten_logs
from pipeline.core.errors import TemporaryError, UserError, report_errors
from pipeline.params import load_params
from pipeline.tracking.registrations import register_pending
from pipeline.tracking.registry import CHAMPION, version_of_alias
from pipeline.tracking.store_uri import check_connection, tracking_uri

EXIT_REFUSED = 3
Outcome = Result | Change  # of a promotion, and of a rollback
STATE_NAMES = {"promoted": "Promoted", "refused": "Refused", "unchanged": "Unchanged"}  # of completed runs in Prefect
EPILOG = (
    "Exit status: 0 promoted or unchanged (with --dry-run: would be promoted, or compared on the test split), "
    "3 refused (would be refused), 2 a mistake to fix, 75 another try may help."
)

shorten_logs()


def name_flow_run() -> str:
    """Return the name of the current flow run, such as `promote digits-lr-0-03-3fa9c1` or `rollback digits`."""
    values = runtime.flow_run.parameters
    if values.get("rollback"):
        return f"rollback {values.get('dataset') or ''}".strip()
    what = values.get("challenger") or values.get("dataset") or "the newest model"
    return f"promote {what}{' (dry run)' if values.get('dry_run') else ''}"


@flow(name="promote", flow_run_name=name_flow_run, persist_result=False)
def promote(
    challenger: str | None = None, dataset: str | None = None, dry_run: bool = False, rollback: bool = False
) -> State[Outcome]:
    """Decide whether an evaluated model becomes the champion of its data set, and make it so.

    Args:
        challenger: a version, a DVC experiment or an MLflow run; empty: the newest version that is not the champion.
        dataset: the registered model; empty: the only one, or that of the challenger.
        dry_run: decide without a look at the test split; nothing is changed or charged.
        rollback: make the previous champion the champion again instead.
    """
    try:
        with chdir(PROJECT):
            register_process(str(runtime.flow_run.id), run_count=runtime.flow_run.run_count)
            connect_store(PROJECT)
            register_pending()
            return _roll_back(dataset) if rollback else _decide(challenger, dataset=dataset, is_dry_run=dry_run)
    except (UserError, TemporaryError, OSError) as error:
        return Failed(message=str(error), data=error)


def _decide(text: str | None, *, dataset: str | None, is_dry_run: bool) -> State[Outcome]:
    """Decide about a challenger; log the decision, and publish it in Prefect."""
    version = find_challenger(PROJECT, text, dataset=dataset)
    result = promote_version(PROJECT, version, params=load_params(), is_dry_run=is_dry_run, log=log)
    line = headline(result)
    log(line)
    create_markdown_artifact(as_markdown(result), key=artifact_key(result.name, "promotion"), description=line)
    name = STATE_NAMES[result.decision.outcome] if result.decision and not is_dry_run else "Dry run"
    return Completed(name=name, message=line, data=result)


def _roll_back(dataset: str | None) -> State[Outcome]:
    """Make the previous champion the champion again; log that, and publish it in Prefect."""
    name = choose_name(dataset)
    change = roll_back(PROJECT, name, log=log)
    line = describe_change(name, change)
    log(line)
    text = change_as_markdown(name, change)
    create_markdown_artifact(text, key=artifact_key(name, "promotion"), description=line)
    return Completed(name="Rolled back", message=line, data=change)


def main() -> None:
    """Run the command line."""
    arguments = parse_arguments()
    with report_errors(), chdir(PROJECT):
        if arguments.history or arguments.at:
            connect_store(PROJECT)
            _print_history(choose_name(arguments.dataset), at=arguments.at)
            return
        load_params()
        check_connection(tracking_uri(PROJECT))
        connect_store(PROJECT)  # before a server is started for nothing
        register_pending()
        if not arguments.rollback:
            find_challenger(PROJECT, arguments.challenger, dataset=arguments.dataset)
        leave_failure_to_caller()
        with temporary_settings(server_settings(ensure_server())):
            run: Flow[..., State[Outcome]] = promote
            values = (arguments.challenger, arguments.dataset, arguments.dry_run, arguments.rollback)
            status = _report(run(*values, return_state=True))
    sys.exit(status)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, by default this process's own."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.promote",
        description="Make an evaluated model the champion of its data set, if it is better than the champion.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "challenger",
        metavar="CHALLENGER",
        nargs="?",
        help="number of a version, DVC experiment, or id or name of an MLflow run (default: the newest version that is "
        "not the champion)",
    )
    parser.add_argument("--dataset", metavar="NAME", help="the registered model (default: the only one)")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--dry-run", action="store_true", help="end before the look at the test split; change nothing")
    action.add_argument("--rollback", action="store_true", help="make the previous champion the champion again")
    action.add_argument("--history", action="store_true", help="print what was champion when, and why")
    action.add_argument(
        "--at", metavar="DATE", help="print what was champion then, as in 2026-11-26 or 2026-11-26T08:00"
    )
    values = parser.parse_args(arguments)
    if values.challenger and (values.rollback or values.history or values.at):
        parser.error("CHALLENGER: not allowed with --rollback, --history or --at; leave it out")
    return values


def _print_history(name: str, *, at: str | None) -> None:
    """Print the changes of the champion, or only the one that was in force at a time."""
    changes = history(name)
    if not at:
        print(
            history_table(changes) if changes else f"{name} has had no champion yet; `python -m flows.promote` decides"
        )
        _print_moved(name, changes)
        return
    time = read_time(at)
    change = champion_at(changes, time)
    if change is None or change.version is None:
        raise UserError(f"--at: {name} had no champion at {time:%Y-%m-%d %H:%M:%S} UTC; `--history` prints all changes")
    print(history_table([change]))
    if change == changes[0]:
        _print_moved(name, changes)


def _print_moved(name: str, changes: Sequence[Change]) -> None:
    """Print a line where the alias in MLflow is not of the version that the newest change has."""
    champion = version_of_alias(name, CHAMPION)
    number, newest = champion.number if champion else None, changes[0].version if changes else None
    if number != newest:
        print(
            f"the alias {CHAMPION} is now {f'of version {number}' if number else 'removed'}: it was moved since, by "
            "hand in MLflow or by a promotion that was interrupted; the next promotion adds it here"
        )


def read_time(text: str) -> datetime:
    """Return the time in UTC that a text names in the local time zone or with its own; a date alone is its end.

    Raises UserError where the text is no date.
    """
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(
            f"--at: found {text!r}; allowed: a date such as 2026-11-26, or a time such as 2026-11-26T08:00 or "
            "2026-11-26T08:00+00:00; correct it"
        ) from None
    if "T" not in text and " " not in text:
        time = time.replace(hour=23, minute=59, second=59, microsecond=999_999)
    return time.astimezone(UTC)


def _report(state: State[Outcome]) -> int:
    """Print what was decided, or the reason for the failure, and return the exit status."""
    if not state.is_completed():
        error = state.result(raise_on_failure=False)
        print(f"error: {error or state.message}", file=sys.stderr)
        return exit_status(error)
    result = state.result()
    if isinstance(result, Change):
        print(state.message)
        return 0
    print(as_text(result))
    return EXIT_REFUSED if result.decision and result.decision.outcome == "refused" else 0


if __name__ == "__main__":
    main()
