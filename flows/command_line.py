"""The command line of the flow: parse and check it before a server starts, then run the flow and print its result."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

from prefect import Flow
from prefect.client.schemas.objects import State
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings
from prefect.utilities.urls import url_for

from flows import PROJECT
from flows.checks import check_inputs
from flows.flow_run import exit_status
from flows.form import Overrides
from flows.git import check_checkout
from flows.prefect_server import ensure_server
from flows.run_log import leave_failure_to_caller
from flows.seed_values import parse_seeds
from flows.seeds_summary import SeedsSummary
from flows.seeds_summary import as_text as seeds_as_text
from flows.settings import PrefectServer
from flows.summary import Summary
from flows.summary_text import as_text
from flows.workspace import KEPT_CLONES, check_local_files
from pipeline.artifacts import expand
from pipeline.core.errors import (
    EXIT_INTERRUPTED,
    EXIT_USER,
    UserError,
    redact_url,
    report_errors,
)
from pipeline.recipes import compose, parse_overrides
from pipeline.tracking.store_uri import check_connection, check_recording, tracking_uri

FOLDER_PARAM = "download.folder"
TrainClassifier = Flow[..., State[Summary | SeedsSummary]]


def main(flow: TrainClassifier) -> None:
    """Check the parameters, ensure a server, run the flow, print its summary, and exit with the outcome's status."""
    arguments = parse_arguments()
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # closing the terminal then ends a run as cleanly as SIGTERM
        signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with report_errors(), chdir(PROJECT):
        overrides, seeds = read_overrides(arguments), parse_seeds(arguments.seeds)
        check_recording(tracking_uri(PROJECT))
        check_connection(tracking_uri(PROJECT))
        leave_failure_to_caller()
        with temporary_settings(server_settings(ensure_server())):
            values = Overrides.model_validate(overrides)
            state: State[Any] = flow(
                arguments.recipe, values, keep_workspace=arguments.keep_workspace, seeds=seeds, return_state=True
            )
            status = report(state, recipe=arguments.recipe, images=arguments.images, overrides=arguments.overrides)
        kept_clone = KEPT_CLONES / str(state.state_details.flow_run_id)
        if kept_clone.is_dir():
            print(f"kept the clone: {kept_clone}", file=sys.stderr)
    sys.exit(status)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, by default this process's own."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.train_classifier",
        description="Run download, normalize, train, evaluate in a clone of this checkout; save a DVC experiment.",
        epilog="Exit status: 0 done, 2 a mistake to fix, 75 another try may help, 130 interrupted, 1 anything else.",
    )
    parser.add_argument("--recipe", help="a name from recipes/ (default: digits, or my_images with --images)")
    parser.add_argument(
        "--images",
        metavar="FOLDER",
        help="your images: <class>/…, <split>/<class>/… or a table labels.csv; relative to the project",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        dest="overrides",
        help="a value that replaces the recipe's, as in --set train.epochs=3; repeat the option for more",
    )
    parser.add_argument(
        "--seeds",
        default="1",
        metavar="N",
        help="train N times, with train.seed and the N - 1 seeds after it, and print mean and standard deviation",
    )
    parser.add_argument(
        "--keep-workspace", action="store_true", help=f"keep the clone of a failed run in {KEPT_CLONES}/"
    )
    values = parser.parse_args(arguments)
    values.recipe = values.recipe or ("my_images" if values.images else "digits")
    return values


def read_overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the values of `--set` and `--images`; the current folder must be the project's.

    Raises UserError where they, the recipe or the checkout do not allow a run.
    """
    overrides = parse_overrides(arguments.overrides)
    if arguments.images:
        if FOLDER_PARAM in overrides:
            raise UserError(f"--set {FOLDER_PARAM} and --images: found both; allowed: one of them; leave one out")
        overrides[FOLDER_PARAM] = _images_folder(arguments.images)
    params = compose(arguments.recipe, overrides)
    if arguments.images and params["download"]["dataset"] != "imagefolder":
        raise UserError(
            f"--images: recipe {arguments.recipe} has download.dataset {params['download']['dataset']}; "
            "allowed: a recipe for imagefolder, such as my_images; name one, or leave --images out"
        )
    check_checkout(PROJECT)
    check_local_files(PROJECT, params)
    check_inputs(params)
    return overrides


def _images_folder(text: str) -> str:
    """Return the path of the folder: relative where it is in the project, so that clones link to it; else absolute."""
    path = Path(os.path.normpath(PROJECT / expand(text)))
    return str(path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path)


def server_settings(server: PrefectServer) -> dict[Any, Any]:
    """Return Prefect's settings for the flow run; the address of its page, which Prefect logs, has no password."""
    settings = {PREFECT_API_URL: server.api_url}
    if server.source is None or redact_url(server.api_url) != server.api_url:
        settings[PREFECT_UI_URL] = server.page
    return settings


def report(state: State[Any], *, recipe: str, images: str | None = None, overrides: Sequence[str] = ()) -> int:
    """Print the summary, or the reason for the failure and what to do next, and return the exit status."""
    if state.is_completed():
        summary = state.result()
        if isinstance(summary, SeedsSummary):
            print(seeds_as_text(summary))
        else:
            print(as_text(summary, recipe=recipe, images=images, overrides=overrides))
        return 0
    if state.is_cancelled():
        print(
            "interrupted; run the same command to resume: finished steps are cached, and a training resumes from its "
            "last checkpoint",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    error = state.result(raise_on_failure=False)
    status = exit_status(error)
    page = redact_url(url_for("flow-run", obj_id=state.state_details.flow_run_id) or "unknown")
    remedy = "correct that, then run" if status == EXIT_USER else "run"
    print(f"error: {error or state.message}", file=sys.stderr)
    print(f"Prefect's page of this run: {page}", file=sys.stderr)
    print(f"next: {remedy} the same command again; steps that are done are cached", file=sys.stderr)
    return status
