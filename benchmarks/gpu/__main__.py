"""Check and measure the pipeline on a GPU, within a few minutes and without internet.

`python -m benchmarks.gpu [--images FOLDER_OR_FILE] [--minutes 8] [--out FOLDER]` (`make gpu`) runs these parts in turn:

    correctness   a step against the CPU, mixed precision, same bits, resuming, non-finite losses, a full memory
    fast94        the recipe cifar10_fast94: once, the GPU's utilization, then as many seeds as the time allows
    compile       the same with and without train.compile
    resnet18      images per second
    lock          two trainings at once

Each part is a process of its own that is killed at its limit; what it had found by then stays. `gpu.json` and `gpu.md`
in the output folder are written anew after each finding. The exit status is 1 if a part failed or a check did.

The images are those of CIFAR-10: a tree `<split>/<class>/*.jpg`, or the file into which `python -m benchmarks.gpu.pack`
has packed it. With that file it needs beside torch and torchvision only numpy, pillow, safetensors, tqdm, psutil,
joblib, pydantic and ruamel.yaml; a tree needs the whole installation.
`--dry` runs the same code on tiny inputs on the CPU, in seconds, to show that it runs; its figures mean nothing.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.correctness import check_correctness
from benchmarks.gpu.images import make_arrays
from benchmarks.gpu.lock import check_lock
from benchmarks.gpu.part import Emit, Part, PartResult, Setting, run_part
from benchmarks.gpu.report import is_good, markdown
from benchmarks.gpu.speed import measure_compile, measure_fast94, measure_resnet18
from benchmarks.table import header
from pipeline.artifacts import write_json, write_text
from pipeline.core.errors import UserError, report_errors

PARTS: Mapping[str, tuple[float, Part]] = {
    "correctness": (0.25, check_correctness),
    "fast94": (0.30, measure_fast94),
    "compile": (0.28, measure_compile),
    "resnet18": (0.09, measure_resnet18),
    "lock": (0.08, check_lock),
}
"""In this order; by name, the fraction of the time that is a part's own. What a part leaves, the next ones may use."""
OUT = Path(".cache/benchmarks/gpu")


def describe_machine(_setting: Setting, emit: Emit) -> None:
    """Emit the name of the GPU and its software; in a process of its own, as a process that forks may not use CUDA."""
    if not torch.cuda.is_available():
        emit(gpu=None)
        return
    found = torch.cuda.get_device_properties(0)
    emit(
        gpu=found.name,
        memory_gib=round(found.total_memory / 2**30, 1),
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    )


def main() -> None:
    """Run the parts and write what they find."""
    start = time.monotonic()
    arguments = _arguments()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").unlink(missing_ok=True)  # of an earlier run
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(arrays=Path(folder) / "arrays", dry=arguments.dry)
        machine = run_part("machine", describe_machine, setting, seconds=60, out=out)
        if not machine.rows:
            raise UserError(f"{out / 'log.txt'}: PyTorch cannot be asked for a GPU; fix what it names, or use --dry")
        if machine.rows[0]["gpu"] is None and not arguments.dry:
            raise UserError("found no GPU that PyTorch can use (CUDA); `python -m benchmarks.gpu --dry` needs none")
        make_arrays(arguments.images, setting)
        for name in ("gpu.json", "gpu.md"):
            (out / name).unlink(missing_ok=True)
        text = header(seeds="from 0") + f"GPU: {_words(machine.rows[0])}\n"
        results: dict[str, PartResult] = {}

        def write() -> None:
            parts = {name: vars(result) for name, result in results.items()}
            content = {"machine": machine.rows[0], "header": text, "dry": setting.dry, "parts": parts}
            write_json(out / "gpu.json", content)
            write_text(out / "gpu.md", markdown(text, results, dry=setting.dry))

        total, later = 60 * arguments.minutes, 1.0
        for name, (fraction, part) in PARTS.items():
            later -= fraction
            seconds = total - (time.monotonic() - start) - later * total
            print(f"{name}: at most {seconds:.0f} s", flush=True)
            results[name] = PartResult()
            run_part(name, part, setting, seconds=seconds, out=out, result=results[name], on_change=write)
            write()
    print(f"\n{markdown(text, results, dry=setting.dry)}\n{out / 'gpu.md'}, {out / 'gpu.json'}")
    sys.exit(0 if is_good(results) else 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER_OR_FILE", help="the tree or packed file; default with --dry: random"
    )
    parser.add_argument("--minutes", type=_minutes, default=8.0, help="for everything; default: 8")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help=f"for the results; default: {OUT}")
    parser.add_argument("--dry", action="store_true", help="tiny inputs on the CPU")
    return parser.parse_args()


def _minutes(text: str) -> float:
    """Read a positive number for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed: a positive number")
    return value


def _words(row: Mapping[str, Any]) -> str:
    if row["gpu"] is None:
        return "none"
    return f"{row['gpu']}, {row['memory_gib']} GiB, CUDA {row['cuda']}, cuDNN {row['cudnn']}"


if __name__ == "__main__":
    with report_errors():
        main()
