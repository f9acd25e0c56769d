"""Run the command `python -m pipeline.predict`: print the answers, or write them into a file."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from functools import partial

import torch
from tqdm import tqdm

from pipeline.artifacts import file_md5
from pipeline.core.errors import PartialError, escape_control_chars
from pipeline.core.processes import num_cores
from pipeline.core.progress import progress
from pipeline.prediction.decoding import read_images
from pipeline.prediction.inputs import Input, expand_paths
from pipeline.prediction.model import LoadedModel, find_threshold, load
from pipeline.prediction.output import Counts, Request, check_output_path, finish_earlier_start, open_output
from pipeline.prediction.rows import Row, answer_blocks
from pipeline.tracking.model_files import ModelFiles, find_model_files
from pipeline.training.device import choose_device


def run(arguments: argparse.Namespace) -> None:
    """Answer the inputs of the command line; raises PartialError where files cannot be read, and UserError."""
    if arguments.output:
        check_output_path(arguments.output)
    files = find_model_files(arguments.model)
    device = choose_device(arguments.device, field="--device")
    if arguments.output:
        counts = _write(arguments, files=files, device=device)
    else:
        counts = _print(arguments, model=_load(files, device=device))
    if counts.unreadable:
        others = "all others were classified" if counts.unreadable < counts.rows else "none was classified"
        raise PartialError(
            f"{counts.unreadable:,} of {counts.rows:,} files cannot be read (reasons above); {others}; replace those "
            "files or leave them out"
        )


def _load(files: ModelFiles, *, device: torch.device) -> LoadedModel:
    """Return the model on its device, with as many threads of PyTorch as this process may use."""
    model = load(files, device=device)
    torch.set_num_threads(num_cores())  # PyTorch's own default ignores the CPU quota of a container
    return model


def _inputs(arguments: argparse.Namespace) -> Iterator[Input]:
    return expand_paths(arguments.paths, stdin=sys.stdin.buffer, null=arguments.null)


def _answers(
    inputs: Iterator[Input], *, model: LoadedModel, top: int, arguments: argparse.Namespace
) -> Iterator[list[Row]]:
    """Yield the rows of the inputs, block by block."""
    threshold = find_threshold(model, arguments.coverage)
    with closing(read_images(inputs, config=model.config)) as blocks:  # ends the decoding processes
        yield from answer_blocks(blocks, model=model, top=top, threshold=threshold, views=arguments.views)


# ---- to a file


def _write(arguments: argparse.Namespace, *, files: ModelFiles, device: torch.device) -> Counts:
    """Write the answers into the file of `--output`, and return their counts."""
    path = arguments.output
    request = Request(
        weights_md5=files.weights_md5,
        config_md5=file_md5(files.folder / "model.json"),
        top=arguments.top,
        coverage=arguments.coverage,
        views=arguments.views,
        device=device.type,
    )
    if finished := finish_earlier_start(path, request):
        print(f"{path}: complete, {finished.rows:,} images: an earlier start has written it", flush=True)
        return finished
    with open_output(path, request, overwrite=arguments.overwrite) as output:
        model = _load(files, device=device)
        answer = partial(_answers, model=model, top=arguments.top, arguments=arguments)
        with progress("predict", total=None, unit="images") as advance:
            counts = output.write(_inputs(arguments), answer=answer, report_error=_report_error, advance=advance)
    kept = f", {output.kept.rows:,} of them by an earlier start" if output.kept.rows else ""
    print(f"{path}: {counts.rows:,} images{kept}", flush=True)
    return counts


def _report_error(path: str, reason: str) -> None:
    """Print why a file cannot be read, without breaking a bar on the terminal."""
    tqdm.write(f"error: {escape_control_chars(f'{path}: {reason}')}", file=sys.stderr)
    sys.stderr.flush()


# ---- to standard output


def _print(arguments: argparse.Namespace, *, model: LoadedModel) -> Counts:
    """Print the answers, and return their counts."""
    top = len(model.config.class_names) if arguments.json else arguments.top
    num_rows = num_unreadable = 0
    with closing(_answers(_inputs(arguments), model=model, top=top, arguments=arguments)) as blocks:
        for row in (row for block in blocks for row in block):
            num_rows += 1
            if row.error is None:
                print(_as_json(row) if arguments.json else _as_text(row), flush=True)
            else:
                num_unreadable += 1
                _report_error(row.path, row.error)
    return Counts(num_rows, num_unreadable)


def _as_json(row: Row) -> str:
    answer = {"image": row.path, "probabilities": dict(row.top)}
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
    return escape_control_chars(f"{row.path}: {unknown}{classes}")
