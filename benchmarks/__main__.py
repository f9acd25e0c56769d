"""Run the benchmarks for the CPU, one after another, in an hour: `python -m benchmarks [--images FOLDER]`.

`make bench IMAGES=FOLDER` does the same. The folder has JPEG files, `<split>/<class>/*.jpg`; without the
option, an archive of them beside the project is used (see benchmarks/cifar10.py). Nothing else should run on the
machine meanwhile.

The benchmarks are time_to_accuracy, ingest, floor, epochs, kernels, windows, frozen, repro and overhead;
`python -m benchmarks.<name>` runs one of them alone. This command leaves out results, selection, imbalance, population
and levels, which consist of many whole trainings, decode, finetune, own_images, predict and export, which need
photographs, promotion, which simulates years of decisions, serving, which compares two servers under load, and gpu,
which needs a GPU.
"""

import argparse
import subprocess
import sys

from benchmarks.cifar10 import add_images, prepare_apart
from pipeline.core.errors import report_errors

# by name: whether the benchmark has the option --images
TAKES_IMAGES = {
    "time_to_accuracy": True,
    "ingest": True,
    "floor": False,
    "epochs": False,
    "kernels": False,
    "windows": False,
    "frozen": False,
    "repro": True,
    "overhead": False,
}


def main() -> None:
    """Run all benchmarks; where one fails, the others still run, and the exit status is 1."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_images(parser)
    images = parser.parse_args().images
    option = ["--images", str(images)] if images else []
    prepare_apart(images)
    failed = []
    for name, takes_images in TAKES_IMAGES.items():
        command = [sys.executable, "-m", f"benchmarks.{name}", *(option if takes_images else [])]
        print(f"\n## {name}\n", flush=True)
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"error: these benchmarks failed: {', '.join(failed)}; each printed the reason above")


if __name__ == "__main__":
    with report_errors():
        main()
