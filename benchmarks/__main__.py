"""Run the benchmarks for the CPU, one after another, in an hour: `python -m benchmarks [--images FOLDER]`.

`make bench IMAGES=FOLDER` does the same. Without the folder of JPEG files, `<split>/<class>/*.jpg`, the images are
looked for beside the project (see benchmarks/cifar10.py). Nothing else should run on the machine meanwhile.

They are time_to_accuracy, ingest, floor, epochs, kernels, windows, repro and overhead; `python -m benchmarks.<name>`
runs one of them alone. Not among them are results and selection, which are many whole trainings, and gpu, which needs a
GPU.
"""

import argparse
import subprocess
import sys

from benchmarks.cifar10 import add_images, prepare_apart
from pipeline.core.errors import report_errors

BENCHMARKS = {
    "time_to_accuracy": True,
    "ingest": True,
    "floor": False,
    "epochs": False,
    "kernels": False,
    "windows": False,
    "repro": True,
    "overhead": False,
}
"""By name: whether the benchmark takes the option --images."""


def main() -> None:
    """Run all of them; where one fails, the others still run, and the exit status is 1."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_images(parser)
    images = parser.parse_args().images
    option = ["--images", str(images)] if images else []
    prepare_apart(images)
    failed = []
    for name, takes_images in BENCHMARKS.items():
        command = [sys.executable, "-m", f"benchmarks.{name}", *(option if takes_images else [])]
        print(f"\n## {name}\n", flush=True)
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"error: failed: {', '.join(failed)}")


if __name__ == "__main__":
    with report_errors():
        main()
