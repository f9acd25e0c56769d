"""Classify image files with the workspace's model or one from MLflow.

`python -m pipeline.predict photo.jpg scan.png`
`python -m pipeline.predict --model runs:/<run id>/model photo.jpg`
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.artifacts import CHECKSUMS, TRAIN, verify
from pipeline.errors import UserError, printable, report_errors
from pipeline.images import UnreadableImage, decode
from pipeline.model import ModelConfig, class_probabilities, load_model


def predict(paths: Sequence[Path], *, folder: Path) -> list[dict[str, float]]:
    """Probabilities by class name, the likeliest first, for each image file.

    Raises UserError naming the first file that cannot be read.
    """
    classifier, config = load_model(folder)
    images = np.stack([_read(path, config=config) for path in paths])
    order = class_probabilities(classifier, images, config=config)
    return [
        {config.class_names[index]: float(row[index]) for index in np.argsort(-row, kind="stable")} for row in order
    ]


def _read(path: Path, *, config: ModelConfig) -> np.ndarray:
    """(H, W, C) uint8, as `normalize` would have made it."""
    try:
        return decode(path.read_bytes(), image_size=config.image_size, channels=config.channels, resize=config.resize)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder; name image files, as in {path}/*.jpg") from None
    except UnreadableImage as error:
        raise UserError(f"{path}: not readable as an image ({error})") from None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.predict", description="Classify image files.")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument(
        "--model", help="a folder, or a model in MLflow such as runs:/RUN_ID/model (default: artifacts/train)"
    )
    parser.add_argument("--top", type=int, default=3, help="how many classes to print for each image (default: 3)")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line, with all classes")
    arguments = parser.parse_args()
    with report_errors():
        if arguments.top < 1:
            raise UserError(f"--top is {arguments.top}; allowed: 1 or more")
        folder = _model_folder(arguments.model)
        _verify_model(folder)
        results = predict(arguments.images, folder=folder)
        for path, result in zip(arguments.images, results, strict=True):
            if arguments.json:
                print(json.dumps({"image": str(path), "probabilities": result}, ensure_ascii=False))
            else:
                likeliest = list(result.items())[: arguments.top]
                classes = ", ".join(f"{name} {probability:.1%}" for name, probability in likeliest)
                print(printable(f"{path}: {classes}"))


def _verify_model(folder: Path) -> None:
    """Raises UserError where a file of the model is not as it was written; a foreign folder may have no checksums."""
    if folder == TRAIN or (folder / CHECKSUMS).exists():
        verify(folder, ["model.json", "best.safetensors"], strangers=folder != TRAIN)


def _model_folder(model: str | None) -> Path:
    if model is None:
        return TRAIN
    if ":/" not in model:
        return Path(model)
    from pipeline.tracking import fetch_model  # noqa: PLC0415  # MLflow takes seconds to import

    return fetch_model(model)


if __name__ == "__main__":
    main()
