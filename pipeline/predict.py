"""Classify image files with the model in `artifacts/train/` or one from MLflow.

`python -m pipeline.predict photo.jpg scan.png`
`python -m pipeline.predict --model runs:/<run id>/model photo.jpg`

Predictions are printed batch by batch, in the order of the files. A file that cannot be read is reported on stderr with
the reason; all others are classified, and the exit status is EXIT_PARTIAL.
"""

import argparse
import json
import os
import shlex
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from pipeline.artifacts import BEST_WEIGHTS, CHECKSUMS, TRAIN, verify
from pipeline.core.errors import PartialError, UserError, escape_control_chars, report_errors
from pipeline.core.processes import num_cores
from pipeline.images.decode import MAX_FILE_BYTES, UnreadableImage, check_suffix, decode
from pipeline.models.config import ModelConfig
from pipeline.models.cpu_kernels import use_cpu_kernels
from pipeline.models.files import load_config, load_model
from pipeline.models.inference import class_probabilities

BATCH_SIZE = 32  # files that are read and classified together


@dataclass(frozen=True)
class Prediction:
    """The class probabilities of one image file, or why it could not be read."""

    path: Path
    probabilities: dict[str, float]  # by class name, the most probable first; empty for an unreadable file
    unreadable_reason: str = ""  # one line; empty for a readable file


def predict(paths: Iterable[Path], *, folder: Path) -> Iterator[Prediction]:
    """Classify image files with the model in `folder`, in their order; BATCH_SIZE of them are in memory at a time.

    Raises UserError where the model is missing or damaged. A file that cannot be read gives a prediction with the
    reason.
    """
    classifier, config = load_model(folder)
    for batch in _batches(paths):
        results = [_read_image(path, config=config) for path in batch]
        images = [image for image in results if not isinstance(image, UnreadableImage)]
        rows = iter(class_probabilities(classifier, np.stack(images), config=config)) if images else iter(())
        for path, image in zip(batch, results, strict=True):
            if isinstance(image, UnreadableImage):
                yield Prediction(path, {}, unreadable_reason=str(image))
            else:
                yield Prediction(path, _sorted_by_probability(next(rows), config=config))


def _batches(paths: Iterable[Path]) -> Iterator[list[Path]]:
    """Yield the paths in lists of up to BATCH_SIZE."""
    remaining = iter(paths)
    while batch := list(islice(remaining, BATCH_SIZE)):
        yield batch


def _sorted_by_probability(row: npt.NDArray[np.float32], *, config: ModelConfig) -> dict[str, float]:
    """Return the probabilities (num_classes,) of an image by class name, the most probable first."""
    return {config.class_names[index]: float(row[index]) for index in np.argsort(-row, kind="stable")}


def _read_image(path: Path, *, config: ModelConfig) -> npt.NDArray[np.uint8] | UnreadableImage:
    """Return the image as `normalize` would store it, (H, W, C) uint8, or the reason why it cannot be read."""
    try:
        check_suffix(path.name)
        content = _read_bytes(path)
        return decode(content, image_size=config.image_size, channels=config.channels, resize=config.resize)
    except FileNotFoundError:
        return UnreadableImage("no such file")
    except IsADirectoryError:
        return UnreadableImage(f"a folder; name image files, as in {shlex.quote(str(path))}/*.jpg")
    except OSError as error:
        return UnreadableImage(error.strerror or str(error))
    except UnreadableImage as error:
        return UnreadableImage(f"not readable as an image ({error})")


def _read_bytes(path: Path) -> bytes:
    """Return the content of a file or pipe; raises UnreadableImage for a device and for a file that is too large."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISFIFO(status.st_mode)):
            raise UnreadableImage("a device, not a file")
        if status.st_size > MAX_FILE_BYTES:
            raise UnreadableImage(f"{status.st_size:,} bytes; allowed: {MAX_FILE_BYTES:,}")
        return file.read()


def main() -> None:
    """Print the most probable classes of each image file."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.predict", description="Classify image files.")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument(
        "--model", help="a folder, or a model in MLflow such as runs:/RUN_ID/model (default: artifacts/train)"
    )
    parser.add_argument("--top", type=int, default=3, help="how many classes to print for each image (default: 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each image, with all classes")
    arguments = parser.parse_args()
    with report_errors():
        if arguments.top < 1:
            raise UserError(f"--top is {arguments.top}; allowed: 1 or more")
        folder = _model_folder(arguments.model)
        if folder == TRAIN and not folder.is_dir():
            raise UserError(
                f"{TRAIN}: no such folder: this checkout has no model; run `dvc exp apply NAME` for the model of a "
                "flow run, `dvc checkout` for that of the commit, or name one with --model runs:/RUN_ID/model"
            )
        _verify_model(folder)
        use_cpu_kernels(load_config(folder).cpu_kernels, field=f"{folder / 'model.json'}: cpu_kernels")
        torch.set_num_threads(num_cores())  # PyTorch's own default ignores the CPU quota of a container
        unreadable = 0
        for prediction in predict(arguments.images, folder=folder):
            if prediction.unreadable_reason:
                unreadable += 1
                print(
                    f"error: {escape_control_chars(f'{prediction.path}: {prediction.unreadable_reason}')}",
                    file=sys.stderr,
                    flush=True,
                )
            else:
                print(_as_json(prediction) if arguments.json else _as_text(prediction, top=arguments.top), flush=True)
        if unreadable:
            others = "all others were classified" if unreadable < len(arguments.images) else "none was classified"
            raise PartialError(
                f"{unreadable} of {len(arguments.images)} files cannot be read (reasons above); {others}; replace "
                "those files or leave them out"
            )


def _as_json(prediction: Prediction) -> str:
    answer = {"image": str(prediction.path), "probabilities": prediction.probabilities}
    try:
        text = json.dumps(answer, ensure_ascii=False)
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:  # a file's name may have bytes that are not text
        return json.dumps(answer)
    return text


def _as_text(prediction: Prediction, *, top: int) -> str:
    first = list(prediction.probabilities.items())[:top]
    classes = ", ".join(f"{name} {probability:.1%}" for name, probability in first)
    return escape_control_chars(f"{prediction.path}: {classes}")


def _verify_model(folder: Path) -> None:
    """Raise UserError where a file of the model was changed since it was written.

    Only `artifacts/train/` must have checksums; another folder without checksums is not checked.
    """
    if folder == TRAIN or (folder / CHECKSUMS).exists():
        verify(folder, ["model.json", BEST_WEIGHTS], allow_unlisted=folder != TRAIN)


def _model_folder(model: str | None) -> Path:
    """Return the folder with the model that `--model` names; a model in MLflow is downloaded into one."""
    if model is None:
        return TRAIN
    if ":/" not in model:
        return Path(model)
    from pipeline.tracking.models import fetch_model  # noqa: PLC0415  # MLflow takes seconds to import

    return fetch_model(model)


if __name__ == "__main__":
    main()
