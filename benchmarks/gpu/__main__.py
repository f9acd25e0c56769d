"""Check and measure the pipeline on a GPU, within a few minutes and without internet.

`python -m benchmarks.gpu [--images FOLDER_OR_FILE] [--minutes 8] [--out FOLDER]` (`make gpu`) runs these parts in turn:

    correctness   compare a step with the CPU; mixed precision, same bits, resuming, non-finite losses, out of memory
    fast94        train cifar10_fast94 once, measure the GPU's utilization, then train as many seeds as the time allows
    compile       train cifar10_fast94 with and without train.compile
    resnet18      measure images per second of cifar10_resnet18
    lock          start two trainings at once

Each part is a process of its own that is killed at its limit; its findings up to then are kept. `gpu.json` and `gpu.md`
in the output folder are rewritten after each finding. The exit status is 1 if a part or a check failed.

The images are those of CIFAR-10: a tree `<split>/<class>/*.jpg`, or the file into which `python -m benchmarks.gpu.pack`
has packed it. With that file, the only packages needed are torch, torchvision, numpy, pillow, safetensors, tqdm,
psutil, joblib, pydantic and ruamel.yaml; a tree needs the whole installation.
`--dry` runs the same code on the CPU with tiny inputs, within seconds, to show that it works; its figures mean nothing.
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

# in the order in which they run, by name: the fraction of the time for a part; time that it leaves goes to the next
PARTS: Mapping[str, tuple[float, Part]] = {
    "correctness": (0.25, check_correctness),
    "fast94": (0.30, measure_fast94),
    "compile": (0.28, measure_compile),
    "resnet18": (0.09, measure_resnet18),
    "lock": (0.08, check_lock),
}
OUT = Path(".cache/benchmarks/gpu")


def describe_machine(_setting: Setting, emit: Emit) -> None:
    """Emit the name of the GPU and the versions of its software.

    It is run as a part, in a process of its own: the main process forks others, and so must not use CUDA.
    """
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
    """Run the parts, and write what they find."""
    start = time.monotonic()
    arguments = _parse_arguments()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").unlink(missing_ok=True)  # from an earlier run
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(arrays=Path(folder) / "arrays", dry=arguments.dry)
        machine = run_part("machine", describe_machine, setting, seconds=60, out=out)
        if not machine.rows:
            raise UserError(
                f"{out / 'log.txt'}: PyTorch failed when it looked for a GPU; fix what the file reports, or use --dry"
            )
        if machine.rows[0]["gpu"] is None and not arguments.dry:
            raise UserError("found no GPU that PyTorch can use (CUDA); `python -m benchmarks.gpu --dry` needs none")
        make_arrays(arguments.images, setting)
        for name in ("gpu.json", "gpu.md"):
            (out / name).unlink(missing_ok=True)
        text = header(seeds="from 0") + f"GPU: {_describe_gpu(machine.rows[0])}\n"
        results: dict[str, PartResult] = {}

        def write_report() -> None:
            """Write all findings so far."""
            parts = {name: vars(result) for name, result in results.items()}
            content = {"machine": machine.rows[0], "header": text, "dry": setting.dry, "parts": parts}
            write_json(out / "gpu.json", content)
            write_text(out / "gpu.md", markdown(text, results, dry=setting.dry))

        total_seconds, later_fraction = 60 * arguments.minutes, 1.0
        for name, (fraction, part) in PARTS.items():
            later_fraction -= fraction  # of the parts after this one
            seconds = total_seconds - (time.monotonic() - start) - later_fraction * total_seconds
            print(f"{name}: at most {seconds:.0f} s", flush=True)
            results[name] = PartResult()
            run_part(name, part, setting, seconds=seconds, out=out, result=results[name], on_change=write_report)
            write_report()
    print(f"\n{markdown(text, results, dry=setting.dry)}\n{out / 'gpu.md'}, {out / 'gpu.json'}")
    sys.exit(0 if is_good(results) else 1)


def _parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
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
    """Convert an argument to a positive number; argparse reports the error."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed: a positive number")
    return value


def _describe_gpu(row: Mapping[str, Any]) -> str:
    """Return what `describe_machine` found as text."""
    if row["gpu"] is None:
        return "none"
    return f"{row['gpu']}, {row['memory_gib']} GiB, CUDA {row['cuda']}, cuDNN {row['cudnn']}"


if __name__ == "__main__":
    with report_errors():
        main()
