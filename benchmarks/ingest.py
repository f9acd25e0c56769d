"""Compare two ways from JPEG files to arrays: the steps download and normalize, and torchvision's ImageFolder.

`python -m benchmarks.ingest [ROUNDS] [--images FOLDER] [--large]` runs each way in turn, as a process of its own, and
prints the medians, the median of the ratios within the rounds, and images per second. The start-up (the interpreter and
its imports) is part of each way, and is also measured alone. torchvision reads each file once into an array in memory,
by a DataLoader; normalize also draws splits, finds duplicates, computes means and deviations, and writes arrays with
checksums. The second table has the peaks of memory for a tenth of the images, for all of them and, with `--large`, for
ten times as many. They are measured in other runs than the times. Nothing else should run on the machine meanwhile.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import psutil

from benchmarks.cifar10 import add_images, prepare_apart
from benchmarks.setting import PROJECT, options, scratch
from benchmarks.table import header, medians, table
from benchmarks.ways import CIFAR10_IMAGES, RECIPE
from pipeline.core.errors import UserError, report_errors
from pipeline.core.yaml import dump_yaml
from pipeline.recipes import compose

SAMPLE_SECONDS = 0.05
DOWNLOAD, NORMALIZE = ([sys.executable, "-m", f"pipeline.{step}"] for step in ("download", "normalize"))
TORCHVISION = [sys.executable, "-m", "benchmarks.ways.imagefolder"]
START_NORMALIZE = [sys.executable, "-c", "import pipeline.normalize"]
START_TORCHVISION = [sys.executable, "-c", "import benchmarks.ways.imagefolder"]
BASE = "normalize, all cores"


@contextmanager
def workspace(images: Path) -> Iterator[Path]:
    """Yield a temporary folder whose `params.yaml` makes the steps read these images."""
    with scratch() as name:
        overrides = {"download.dataset": "imagefolder", "download.folder": str(images.resolve())}
        (Path(name) / "params.yaml").write_text(dump_yaml(compose(RECIPE, overrides)))
        yield Path(name)


def start(
    command: list[str], folder: Path, *, one_core: bool = False, new_group: bool = False
) -> subprocess.Popen[bytes]:
    """Start a command in the folder; `one_core` pins it to one core, as if the machine had only one.

    With `new_group`, it and its processes are a process group, so that they can be killed at once.
    """
    prefix = ["taskset", "--cpu-list", str(min(os.sched_getaffinity(0)))] if one_core else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(PROJECT), *_python_path()])}
    return subprocess.Popen(
        [*prefix, *command], cwd=folder, env=environment, stdout=subprocess.DEVNULL, start_new_session=new_group
    )


def _python_path() -> list[str]:
    """Return the entries of PYTHONPATH."""
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def seconds(command: list[str], folder: Path, *, one_core: bool = False) -> float:
    """Return the seconds from the start of a command to its end."""
    begin = time.perf_counter()
    with start(command, folder, one_core=one_core) as child:
        status = child.wait()
    _check_status(command, status)
    return time.perf_counter() - begin


def _check_status(command: list[str], status: int) -> None:
    """Raise UserError where the command failed."""
    if status:
        raise UserError(f"{' '.join(command)} ended with status {status}; fix what it printed, then run this again")


def one_round(images: Path) -> dict[str, float]:
    """Run each way once; return its seconds."""
    with workspace(images) as folder:
        download = seconds(DOWNLOAD, folder)
        all_cores = seconds(NORMALIZE, folder)
        return {
            BASE: all_cores,
            "normalize, one core": seconds(NORMALIZE, folder, one_core=True),
            "start-up of normalize": seconds(START_NORMALIZE, folder),
            "download (the files into one archive)": download,
            "download and normalize, all cores": download + all_cores,
            "torchvision, all cores": seconds([*TORCHVISION, str(images.resolve())], folder),
            "start-up of torchvision": seconds(START_TORCHVISION, folder),
        }


def times_table(images: Path, *, rounds: int) -> str:
    """Return the table of seconds."""
    num_images = _num_images(images)
    found = [one_round(images) for _ in range(rounds)]
    taken = {way: [each[way] for each in found] for way in found[0]}
    speeds = {
        way: ", ".join(f"{num_images / value:,.0f}" for value in values)
        for way, values in taken.items()
        if "start-up" not in way
    }
    return f"{num_images:,} images\n{medians(taken, base=BASE, more={'images a second': speeds})}"


def _num_images(images: Path) -> int:
    """Return the number of JPEG files in a tree."""
    return sum(1 for _ in images.rglob("*.jpg"))


def memory_peaks(command: list[str], folder: Path) -> tuple[int, int]:
    """Return two peaks of memory in bytes: of all processes together (sampled), and of the largest (by the kernel)."""
    child = start(command, folder)
    process, peak = psutil.Process(child.pid), 0
    while True:
        ended, status, usage = os.wait4(child.pid, os.WNOHANG)
        if ended:
            child.returncode = os.waitstatus_to_exitcode(status)
            _check_status(command, child.returncode)
            return peak, usage.ru_maxrss * 1024
        peak = max(peak, _resident_bytes(process))
        time.sleep(SAMPLE_SECONDS)


def _resident_bytes(process: psutil.Process) -> int:
    """Return the memory of a process and its children in bytes; a page that several share counts once (PSS)."""
    try:
        processes = (process, *process.children(recursive=True))
        return sum(int(each.memory_full_info().pss) for each in processes)
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # a process ended during the sample; the next one counts
        return 0


def memory_table(images: Path, *, fractions: list[Fraction]) -> str:
    """Return the table of peaks of memory, for each of these fractions of the images."""
    rows = [["images", "way", "all processes (MB)", "largest process (MB)"]]
    for fraction in fractions:
        with resampled(images, fraction=fraction) as tree, workspace(tree) as folder:
            seconds(DOWNLOAD, folder)
            ways = {BASE: NORMALIZE, "torchvision, all cores": [*TORCHVISION, str(tree.resolve())]}
            for way, command in ways.items():
                peaks = (f"{value / 1e6:,.0f}" for value in memory_peaks(command, folder))
                rows.append([f"{_num_images(tree):,}", way, *peaks])
    return table(rows)


@contextmanager
def resampled(images: Path, *, fraction: Fraction) -> Iterator[Path]:
    """Yield a tree of links to the images; a fraction above 1 has each file several times."""
    if fraction == 1:
        yield images
        return
    with scratch() as name:
        for source in images.resolve().glob("*/*"):
            target = Path(name) / source.relative_to(images.resolve())
            target.mkdir(parents=True)
            files = sorted(source.glob("*.jpg"))
            for number in range(int(len(files) * fraction)):
                repeat, index = divmod(number, len(files))
                (target / f"{repeat}-{files[index].name}").symlink_to(files[index])
        yield Path(name)


def main() -> None:
    """Prepare the images, measure, print the tables."""
    parser = options("ingest", __doc__, repeats="ROUNDS", default=3)
    parser.add_argument(
        "--large", action="store_true", help="also measure memory at ten times the images (5 GB of disk)"
    )
    add_images(parser)
    arguments = parser.parse_args()
    prepare_apart(arguments.images)
    print(header(seeds="none"))
    images = CIFAR10_IMAGES
    print(times_table(images, rounds=arguments.repeats), flush=True)
    fractions = [Fraction(1, 10), Fraction(1), *([Fraction(10)] if arguments.large else [])]
    print(f"\npeaks of memory\n{memory_table(images, fractions=fractions)}")


if __name__ == "__main__":
    with report_errors():
        main()
