"""Write an export as a folder, which appears only once the exported network was verified."""

import runpy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts import Images, file_md5, replace_folder, write_json
from pipeline.core.errors import UserError
from pipeline.core.processes import cpu_name, num_cores
from pipeline.exporting.formats import FILE_NAMES, INPUT, OUTPUT, Format, Run, open_export, write
from pipeline.exporting.network import ExportedNetwork
from pipeline.exporting.server_files import LABELS, PREPROCESS, write_labels, write_preprocessing, write_server_files
from pipeline.exporting.verification import (
    MAX_PHOTOGRAPHS,
    Agreement,
    PhotographAgreement,
    check_agreement,
    check_photographs,
    compare,
    compare_photographs,
    latencies,
)
from pipeline.prediction.model import LoadedModel

DESCRIPTION = "export.json"
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "pillow", "numpy")
ORIGINAL = "original"
NOT_RECORDED = "unknown"  # in place of what an older model.json does not state


@dataclass(frozen=True)
class Export:
    """A verified export in `folder`; sizes in bytes, and median seconds by batch size, of the original and the export.

    Both are by name: ORIGINAL and the format. `photographs` is None where none were named.
    """

    folder: Path
    agreement: Agreement
    photographs: PhotographAgreement | None
    sizes: dict[str, int]
    seconds: dict[int, dict[str, float]]


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise UserError where the folder exists, unless it is an earlier export that may be replaced."""
    if not output.exists():
        return
    if not overwrite:
        raise UserError(f"--output {output}: already exists; name another folder, or replace it with --overwrite")
    if not (output / DESCRIPTION).is_file():
        raise UserError(
            f"--output {output}: is not an earlier export, as it has no {DESCRIPTION}; --overwrite replaces only "
            "exports; name another folder"
        )


def export(
    model: LoadedModel,
    images: Images,
    *,
    to: Format,
    name: str,
    output: Path,
    photographs: Sequence[Path] = (),
    report: Callable[[str], None] = lambda line: None,
) -> Export:
    """Export a model on the CPU, verify it on images (N, H, W, C) uint8, and write `output`, which is replaced.

    `report` is called with a line before each phase. Raises UserError where the network cannot be exported, or does not
    agree with the original; then nothing is written.
    """
    threads = num_cores()
    torch.set_num_threads(threads)  # PyTorch's own default ignores the CPU quota of a container
    config = model.config
    with _removing_new_parents(output), replace_folder(output.resolve()) as folder:
        model_folder = folder / name if to == "onnx" else folder
        path = (model_folder / "1" if to == "onnx" else folder) / FILE_NAMES[to]
        path.parent.mkdir(parents=True, exist_ok=True)
        report(f"exporting {config.model} to {path.name} …")
        write(ExportedNetwork(model.classifier, config=config).eval(), path, to=to, config=config)
        run = open_export(path, threads=threads)
        report(f"verifying on {len(images)} images …")
        agreement = compare(model.probabilities(images, threads=threads), run, images)
        check_agreement(agreement, export=f"--to {to}")
        write_labels(model_folder, config=config)
        write_preprocessing(folder, config=config, model=path, labels=model_folder / LABELS)
        if to == "onnx":
            write_server_files(folder, name=name, config=config)
        if photographs:
            report(f"comparing {min(len(photographs), MAX_PHOTOGRAPHS):,} photographs …")
        compared = _compare_photographs(model, run, folder / PREPROCESS, photographs, threads=threads, to=to)
        report("measuring the time for a batch …")
        weights = model.files.folder / f"{model.files.checkpoint}.safetensors"
        found = Export(
            output,
            agreement,
            compared,
            sizes={ORIGINAL: weights.stat().st_size, to: path.stat().st_size},
            seconds=latencies({ORIGINAL: model.quick_probabilities, to: run}, images),
        )
        write_json(folder / DESCRIPTION, _describe(found, model, to=to, name=name, folder=folder, path=path))
    return found


def _compare_photographs(
    model: LoadedModel, run: Run, preprocessing: Path, photographs: Sequence[Path], *, threads: int, to: Format
) -> PhotographAgreement | None:
    """Compare the classes of photographs, and raise UserError where too many differ; None without photographs.

    The preprocessing is that of the written file.
    """
    if not photographs:
        return None
    preprocess = runpy.run_path(str(preprocessing))["preprocess"]
    agreement = compare_photographs(model, run, preprocess, photographs, threads=threads)
    check_photographs(agreement, export=f"--to {to}")
    return agreement


def _describe(found: Export, model: LoadedModel, *, to: Format, name: str, folder: Path, path: Path) -> dict[str, Any]:
    """Return the content of `export.json`; what the model does not state is "unknown"."""
    config, files = model.config, model.files
    return {
        "name": name,
        "format": to,
        "file": path.relative_to(folder).as_posix(),
        "file_md5": file_md5(path),
        "model": files.label,
        "weights_md5": files.weights_md5,
        "model_json_md5": file_md5(files.folder / "model.json"),
        "network": config.model,
        "class_names": config.class_names,
        "temperature": NOT_RECORDED if config.temperature is None else config.temperature,
        "thresholds": NOT_RECORDED if config.thresholds is None else config.thresholds,
        "input": {
            "name": INPUT,
            "dtype": "uint8",
            "shape": ["N", config.image_size, config.image_size, config.channels],
        },
        "output": {"name": OUTPUT, "dtype": "float32", "shape": ["N", len(config.class_names)]},
        "preprocessing": {"image_size": config.image_size, "channels": config.channels, "resize": config.resize},
        "verification": {**asdict(found.agreement), "largest_difference": found.agreement.largest_difference},
        "photographs": None if found.photographs is None else asdict(found.photographs),
        "bytes": found.sizes,
        "median_seconds": found.seconds,
        "cpu": f"{num_cores()} cores of {cpu_name()}",
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "versions": {package: version(package) for package in PACKAGES},
    }


@contextmanager
def _removing_new_parents(output: Path) -> Iterator[None]:
    """Remove the empty folders above `output` that the block made, where the block fails."""
    missing = [parent for parent in output.resolve().parents if not parent.exists()]
    try:
        yield
    except BaseException:
        for parent in missing:
            with suppress(OSError):  # not made, or not empty
                parent.rmdir()
        raise
