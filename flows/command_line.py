"""The command line of the flow: reads it, checks what can be checked before a server starts, runs, reports."""

import argparse
import os
import signal
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any

from prefect import Flow
from prefect.client.schemas.objects import State
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

from flows import PROJECT
from flows.checks import check_inputs
from flows.dvc_client import StepError
from flows.form import Overrides
from flows.git import check_checkout
from flows.prefect_server import ensure_server
from flows.settings import PrefectServer
from flows.summary import Summary, as_text
from flows.workspace import KEPT, check_local_files
from pipeline.artifacts import expand
from pipeline.core.errors import (
    EXIT_INTERRUPTED,
    EXIT_TEMPORARY,
    EXIT_USER,
    TemporaryError,
    UserError,
    redact_url,
    report_errors,
)
from pipeline.params import compose, parse_override
from pipeline.tracking.store_uri import check_connection, check_recording, tracking_uri

FOLDER_PARAM = "download.folder"
TrainClassifier = Flow[..., State[Summary]]


def main(flow: TrainClassifier) -> None:
    """Check the parameters, ensure a server, run the flow, print its summary; exits with the status of the outcome."""
    arguments = parse_arguments()
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # a closed terminal is to end a run as tidily as SIGTERM
        signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with report_errors(), chdir(PROJECT):
        overrides = read_overrides(arguments)
        check_recording(tracking_uri(PROJECT))
        check_connection(tracking_uri(PROJECT))
        with temporary_settings(_server_settings(ensure_server())):
            values = Overrides.model_validate(overrides)
            state: State[Summary] = flow(arguments.recipe, values, arguments.keep_workspace, return_state=True)
        status = report(state, recipe=arguments.recipe)
        kept = KEPT / str(state.state_details.flow_run_id)
        if kept.is_dir():
            print(f"kept the clone: {kept}", file=sys.stderr)
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
        help="your images, <class>/… or <split>/<class>/…; relative to the project",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        dest="overrides",
        help="a value over the recipe's, as in --set train.epochs=3; may be given again",
    )
    parser.add_argument("--keep-workspace", action="store_true", help=f"keep the clone of a run that fails, in {KEPT}/")
    values = parser.parse_args(arguments)
    values.recipe = values.recipe or ("my_images" if values.images else "digits")
    return values


def read_overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the values of `--set` and `--images`; the current folder is the project's.

    Raises UserError where they, the recipe or the checkout do not allow a run: before any server is started.
    """
    overrides = dict(parse_override(text) for text in arguments.overrides)
    if arguments.images:
        if FOLDER_PARAM in overrides:
            raise UserError(f"--set {FOLDER_PARAM} and --images: found both; allowed: one of them")
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
    """Return the folder relative to the project where it lies in it, so that each clone gets a link; else absolute."""
    path = Path(os.path.normpath(PROJECT / expand(text)))
    return str(path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path)


def _server_settings(server: PrefectServer) -> dict[Any, Any]:
    """Prefect's settings for the flow run; Prefect logs the page of the run, which must not hold a password."""
    settings = {PREFECT_API_URL: server.api_url}
    if server.source is None or redact_url(server.api_url) != server.api_url:
        settings[PREFECT_UI_URL] = server.page
    return settings


def report(state: State[Any], *, recipe: str) -> int:
    """Print the summary, or the one line that says why there is none; returns the exit status."""
    if state.is_completed():
        print(as_text(state.result(), recipe=recipe))
        return 0
    if state.is_cancelled():
        print("interrupted; the same command resumes, a training from its last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED
    error = state.result(raise_on_failure=False)
    print(f"error: {error or state.message}", file=sys.stderr)
    return _exit_status(error)


def _exit_status(error: object) -> int:
    if isinstance(error, UserError) or (isinstance(error, StepError) and error.status == EXIT_USER):
        return EXIT_USER
    if isinstance(error, TemporaryError) or (isinstance(error, StepError) and error.status == EXIT_TEMPORARY):
        return EXIT_TEMPORARY
    return 1
