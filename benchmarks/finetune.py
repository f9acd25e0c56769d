"""Compare the speed of fine-tuning with that of timm's own training script, on the CPU.

`python -m benchmarks.finetune FOLDER TIMM_TRAIN [ROUNDS]` trains EfficientNet-Lite0 for an epoch on the photographs in
FOLDER (`train/<class>/…` and `validation/<class>/…`), in turn with this pipeline and with TIMM_TRAIN, the file train.py
of timm's repository. Both have batches of 32, AdamW, float32, two threads, random crops of 224 pixels, mirroring and
color jitter. It prints the images per second of the training epoch. timm decodes the photographs in every epoch, in a
process beside; the pipeline decodes them once, before.
"""

import argparse
import re
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.results import ON_CPU, REMOVED_VARIABLES, run, set_params
from benchmarks.setting import clone, positive, scratch, timed
from benchmarks.table import header, median_ratio, table
from pipeline.core.errors import UserError, report_errors
from pipeline.core.step_progress import PROGRESS_FILE, read_progress

ROUNDS = 3
PARAMS = ("train.epochs=1", "train.color_jitter=0.4", "train.cpu_kernels=native", "normalize.test_fraction=0.01")
TIMM_OPTIONS = (
    *("--model", "tf_efficientnet_lite0", "--device", "cpu", "--channels-last", "--batch-size", "32", "--workers", "1"),
    *("--opt", "adamw", "--lr", "0.0005", "--epochs", "1", "--warmup-epochs", "0", "--log-interval", "1"),
    *("--train-split", "train", "--val-split", "validation"),
)
OURS, TIMMS = "this pipeline", "timm's train.py"


def speed_of_pipeline(folder: Path) -> float:
    """Train in the clone; return the images per second of the epoch."""
    with TemporaryDirectory() as temporary:
        path = Path(temporary) / "progress.json"
        variables = ("env", f"{PROGRESS_FILE}={path}")
        timed(*variables, sys.executable, "-m", "pipeline.train", cwd=folder, without=REMOVED_VARIABLES)
        progress = read_progress(path)
    assert progress
    assert progress.training
    assert progress.training.last
    assert progress.training.last.images_per_second
    return progress.training.last.images_per_second


def speed_of_timm(script: Path, images: Path, *, output: Path) -> float:
    """Train with timm's script; return the mean images per second of the epoch."""
    classes = len([each for each in (images / "train").iterdir() if each.is_dir()])
    folders = ("--data-dir", str(images), "--output", str(output), "--num-classes", str(classes))
    # `env`: two threads, as the pipeline has by train.cpu_threads
    command = ("env", "OMP_NUM_THREADS=2", sys.executable, str(script), *folders, *TIMM_OPTIONS)
    _, text = timed(*command, cwd=output)
    return _last_number(r"Train: .*\(\s*[\d.]+s,\s*([\d.]+)/s\)", text)


def _last_number(pattern: str, text: str) -> float:
    """Return the number in the last match; raises UserError where there is none."""
    found = re.findall(pattern, text)
    if not found:
        raise UserError(f"the output of a training has no {pattern!r}; use timm 1.0's train.py: {text[-300:]}")
    return float(found[-1].replace(",", ""))


def main() -> None:
    """Measure both in turn, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.finetune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", type=Path, metavar="FOLDER")
    parser.add_argument("script", type=Path, metavar="TIMM_TRAIN")
    parser.add_argument("rounds", nargs="?", type=positive, default=ROUNDS, help=f"default: {ROUNDS}")
    arguments = parser.parse_args()
    images, script = arguments.images.resolve(), arguments.script.resolve()
    speeds: dict[str, list[float]] = {OURS: [], TIMMS: []}
    with scratch() as name:
        folder = Path(name) / "clone"
        clone(folder)
        set_params(folder, "my_images_finetune", [*ON_CPU, f"download.folder={images}", *PARAMS])
        for step in ("download", "normalize"):
            run(f"pipeline.{step}", folder=folder)
        for _ in range(arguments.rounds):
            speeds[OURS].append(speed_of_pipeline(folder))
            speeds[TIMMS].append(speed_of_timm(script, images, output=Path(name)))
    rows = [["way", "images/s (median)", "each", f"ratio to {TIMMS}"]]
    for way, values in speeds.items():
        each = ", ".join(f"{value:.1f}" for value in values)
        rows.append([way, f"{statistics.median(values):.1f}", each, f"{median_ratio(values, speeds[TIMMS]):.2f}"])
    print(f"{header(seeds='0')}\n{table(rows)}")


if __name__ == "__main__":
    with report_errors():
        main()
