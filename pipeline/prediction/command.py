"""Run the command `python -m pipeline.predict`: print the answers, or write them into a file."""

import argparse
import json
import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from io import BufferedIOBase
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from pipeline.artifacts import BEST_WEIGHTS, file_md5
from pipeline.core.errors import PartialError, escape_control_chars
from pipeline.core.progress import progress
from pipeline.models.files import load_config
from pipeline.params import Views
from pipeline.prediction.decoding import read_images
from pipeline.prediction.inputs import Input, check_paths, expand_paths
from pipeline.prediction.model import LoadedModel, find_threshold, load
from pipeline.prediction.output import Answer, Errors, check_output_path, finish_earlier_start, open_output
from pipeline.prediction.output_folder import Counts, Request
from pipeline.prediction.rows import Row, answer_blocks
from pipeline.tracking.model_files import ModelFiles, find_model_files
from pipeline.training.device import choose_device


def run(arguments: argparse.Namespace) -> None:
    """Answer the inputs of the command line; raises PartialError where files cannot be read, and UserError."""
    check_paths(arguments.paths)
    if arguments.output:
        check_output_path(arguments.output)
    files = find_model_files(arguments.model)
    device = choose_device(arguments.device, field="--device")
    if arguments.output:
        _write(arguments, files=files, device=device)
    else:
        _print(arguments, files=files, device=device)


def _load(arguments: argparse.Namespace, *, files: ModelFiles, device: torch.device, top: int) -> Answer:
    """Load the model, and return the function that answers inputs with the `top` most probable classes."""
    model = load(files, device=device)
    # the network is computed by threads of our own; for the rest, threads of PyTorch would spin while they wait, and
    # take a quarter of the CPU time of this process from those that decode
    torch.set_num_threads(1)
    threshold = find_threshold(model, arguments.coverage)
    if threshold is not None:
        _warn_of_other_probabilities(files, views=arguments.views)
    return partial(_answers, model=model, top=top, threshold=threshold, views=arguments.views)


def _warn_of_other_probabilities(files: ModelFiles, *, views: Views) -> None:
    """Print a warning where the thresholds of the model were fitted to other probabilities than those it will give."""
    differences = [f"--views {views}"] if views != "none" else []
    if files.checkpoint != BEST_WEIGHTS.removesuffix(".safetensors"):
        differences.append(f"{files.checkpoint}.safetensors")
    if differences:
        print(
            f"warning: --coverage: the thresholds were fitted with {BEST_WEIGHTS} and --views none, and are used with "
            f"{' and '.join(differences)}: another fraction of the images may be reported",
            file=sys.stderr,
            flush=True,
        )


def _answers(
    inputs: Iterator[Input], *, model: LoadedModel, top: int, threshold: float | None, views: Views
) -> Generator[list[Row], None, None]:
    """Yield the rows of the inputs, block by block."""
    with closing(read_images(inputs, config=model.config)) as blocks:  # ends the decoding processes
        yield from answer_blocks(blocks, model=model, top=top, threshold=threshold, views=views)


def _inputs(arguments: argparse.Namespace) -> Iterator[Input]:
    return expand_paths(arguments.paths, stdin=cast(BufferedIOBase, sys.stdin.buffer), null=arguments.null)


def _report_error(path: str, reason: str) -> None:
    """Print why a file cannot be read, without breaking a bar on the terminal."""
    tqdm.write(f"error: {escape_control_chars(f'{path}: {reason}')}", file=sys.stderr)
    sys.stderr.flush()


def _count(rows: int) -> str:
    """Return the number of rows as a text; unreadable inputs have a row too."""
    return "1 row" if rows == 1 else f"{rows:,} rows"


def _raise_if_partial(counts: Counts, *, reasons: str = "above") -> None:
    """Raise PartialError where files cannot be read; `reasons` states where the reasons are."""
    if counts.unreadable:
        others = "all others were classified" if counts.unreadable < counts.rows else "none was classified"
        raise PartialError(
            f"{counts.unreadable:,} of {counts.rows:,} inputs cannot be read (reasons {reasons}); {others}; replace "
            "those inputs or leave them out"
        )


# ---- to a file


def _write(arguments: argparse.Namespace, *, files: ModelFiles, device: torch.device) -> None:
    """Write the answers into the file of `--output`."""
    path: Path = arguments.output
    request = _request(arguments, files=files, device=device)
    finished = None if arguments.overwrite else finish_earlier_start(path, request, _inputs(arguments))
    if finished:
        print(_escape(f"{path}: complete, {_count(finished.rows)}; an earlier start has written it"), flush=True)
        _raise_if_partial(finished, reasons="in its column `error`")
        return
    answer = _load(arguments, files=files, device=device, top=request.top)
    with (
        open_output(path, request, overwrite=arguments.overwrite) as output,
        progress("predict", total=None, unit="rows") as advance,
    ):

        def report(errors: Errors, rows: int) -> None:
            for name, reason in errors:
                _report_error(name, reason)
            advance(rows)

        output.write(_inputs(arguments), answer=answer, report=report)
    kept = f", {output.kept.rows:,} of them by an earlier start" if output.kept.rows else ""
    print(_escape(f"{path}: {_count(output.counts.rows)}{kept}"), flush=True)
    _raise_if_partial(output.counts)


def _request(arguments: argparse.Namespace, *, files: ModelFiles, device: torch.device) -> Request:
    """Return what the rows depend on besides the inputs."""
    return Request(
        weights_md5=files.weights_md5,
        config_md5=file_md5(files.folder / "model.json"),
        top=min(arguments.top, len(load_config(files.folder).class_names)),
        coverage=arguments.coverage,
        views=arguments.views,
        device=device.type,
    )


# ---- to standard output


def _print(arguments: argparse.Namespace, *, files: ModelFiles, device: torch.device) -> None:
    """Print the answers, with those classes that were asked for, or with `--json` with all."""
    num_classes = len(load_config(files.folder).class_names)
    answer = _load(arguments, files=files, device=device, top=num_classes if arguments.json else arguments.top)
    num_rows = num_unreadable = 0
    with closing(answer(_inputs(arguments))) as blocks:
        for row in (row for block in blocks for row in block):
            num_rows += 1
            if row.error is None:
                print(_as_json(row) if arguments.json else _as_text(row), flush=True)
            else:
                num_unreadable += 1
                _report_error(row.path, row.error)
    _raise_if_partial(Counts(num_rows, num_unreadable))


def _as_json(row: Row) -> str:
    answer: dict[str, Any] = {"image": row.path, "probabilities": dict(row.top)}
    if row.is_unknown is not None:
        answer |= {"class": row.class_name, "is_unknown": row.is_unknown}
    try:
        text = json.dumps(answer, ensure_ascii=False)
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:  # a file's name may have bytes that are not text
        return json.dumps(answer)
    return text


def _as_text(row: Row) -> str:
    classes = ", ".join(f"{name} {probability:.1%}" for name, probability in row.top)
    unknown = f"{row.class_name}: " if row.is_unknown else ""
    return _escape(f"{row.path}: {unknown}{classes}")


def _escape(text: str) -> str:
    """Return the text with characters escaped that control a terminal, or that the encoding of stdout lacks."""
    encoding = sys.stdout.encoding
    return escape_control_chars(text).encode(encoding, errors="backslashreplace").decode(encoding)
