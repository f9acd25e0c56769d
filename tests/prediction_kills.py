"""Kill `python -m pipeline.predict --output FILE` by SIGKILL at each of its points; the next start makes the same file.

`python -m tests.prediction_kills [--points N]` kills at N points, by default at all, for each format, and prints a line
for each. A point is a moment before the command opens a file to write it, renames, removes or makes something, and the
last one is the end of the process. At each point, the command is killed twice: the next start has the same images, or
other ones.
"""

import argparse
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import chdir
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline import predict
from pipeline.core.errors import EXIT_PARTIAL, EXIT_USER
from pipeline.core.settings import get_settings
from pipeline.models.build import build
from pipeline.models.files import save_config, save_weights
from pipeline.prediction import output
from tests.conftest import PROJECT, colored_images
from tests.test_model import config

FORMATS = ("csv", "jsonl", "parquet")
NUM_IMAGES = 9
ROWS = 4  # in a part
EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
CONTEXT = multiprocessing.get_context("forkserver")  # imports once
CONTEXT.set_forkserver_preload(["tests.conftest", "tests.test_model", "pipeline.prediction.command"])


class Points:
    """Counts the points that this process reaches, and kills its group before the one of number `last`."""

    def __init__(self, last: int | None, journal: Path) -> None:
        self.last, self.count, self.journal = last, 0, os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        sys.addaudithook(self._audit)

    def _audit(self, name: str, arguments: tuple[Any, ...]) -> None:
        is_write = name == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if not is_write and name not in EVENTS:
            return
        self.reach(f"{name} {Path(os.fsdecode(arguments[0])).name}")

    def reach(self, point: str) -> None:
        self.count += 1
        if self.count == self.last:
            os.killpg(0, signal.SIGKILL)
        os.write(self.journal, f"{point}\n".encode())


def prepare(folder: Path) -> None:
    """Write a model and images, of which one cannot be read."""
    (folder / "model").mkdir()
    chosen = config(classes=3, cpu_kernels="portable")
    save_weights(build(chosen), folder / "model" / "best.safetensors")
    save_config(chosen, folder / "model")
    (folder / "photos").mkdir()
    for number, pixels in enumerate(colored_images(NUM_IMAGES, size=32)[0]):
        Image.fromarray(pixels).save(folder / "photos" / f"{number}.png")
    (folder / "photos" / "5.png").write_bytes(b"no image")


def change_images(folder: Path) -> None:
    """Remove an image, add one, and replace one by another with the same size and modification time."""
    photos = folder / "photos"
    (photos / "0.png").rename(photos / "8a.png")
    status = (photos / "2.png").stat()
    content = (photos / "3.png").read_bytes()[: status.st_size]
    (photos / "2.png").write_bytes(content.ljust(status.st_size, b"\0"))
    os.utime(photos / "2.png", ns=(status.st_atime_ns, status.st_mtime_ns))


def _predict(folder: Path, suffix: str, last: int | None, journal: Path, options: Sequence[str]) -> None:
    """Run the command in this process, which is a group of its own."""
    os.setsid()
    os.chdir(folder)
    get_settings.cache_clear()
    output.PART_ROWS = ROWS
    sys.argv[1:] = ["photos", "--model", "model", "--device", "cpu", "--output", f"out.{suffix}", *options]
    with Path(os.devnull).open("w") as null:
        sys.stdout = sys.stderr = null
        points = Points(last, journal)
        try:
            predict.main()
        finally:
            points.reach("the end")


def start_fork_server() -> None:
    """Start the process that imports this module once, for all processes that are killed."""
    with chdir(PROJECT):  # it imports from the current folder
        forkserver.ensure_running()


def run(folder: Path, suffix: str, *options: str, last: int | None = None) -> tuple[int | None, list[str]]:
    """Run the command in a process of its own, and return its exit status and the points that it has reached."""
    journal = folder / "points"
    journal.unlink(missing_ok=True)
    process = CONTEXT.Process(target=_predict, args=(folder, suffix, last, journal, options))
    process.start()
    process.join()
    return process.exitcode, journal.read_text().splitlines() if journal.exists() else []


def expected(prepared: Path, folder: Path, suffix: str, *, changed: bool) -> tuple[bytes, list[str]]:
    """Return the file that an uninterrupted start makes of the images, or of the changed ones, and its points."""
    project = shutil.copytree(prepared, folder / f"whole-{suffix}")
    if changed:
        change_images(project)
    status, reached = run(project, suffix)
    assert status == EXIT_PARTIAL
    content = (project / f"out.{suffix}").read_bytes()
    shutil.rmtree(project)
    return content, reached


def kill_at(prepared: Path, folder: Path, suffix: str, *, last: int, content: bytes, changed: bool) -> str:
    """Kill the command before a point, start it again, check what it makes, and return what the point followed.

    `content` is that of the file for the images that the next start has.
    """
    project = shutil.copytree(prepared, folder / f"{suffix}-{last}")
    status, reached = run(project, suffix, last=last)
    assert status == -signal.SIGKILL, (status, reached)
    if changed:
        change_images(project)
    output_path = project / f"out.{suffix}"
    before = output_path.read_bytes() if output_path.exists() else None
    status, _ = run(project, suffix)
    if changed and before is not None:  # the file is complete, with the answers to the images before
        assert (status, output_path.read_bytes()) == (EXIT_USER, before), (last, reached)
        status, _ = run(project, suffix, "--overwrite")
    assert status == EXIT_PARTIAL, (last, reached)
    assert output_path.read_bytes() == content, (last, reached)
    known = {"model", "photos", "points", output_path.name, f".{output_path.name}.complete.json"}
    left = {path.name for path in project.iterdir()} - known
    assert not left, (last, reached, left)
    shutil.rmtree(project)
    return reached[-1] if reached else "the start"


def spread(number_of_all: int, wanted: int | None) -> list[int]:
    """Return `wanted` of all points, evenly spread, the last one included; by default all."""
    count = min(wanted or number_of_all, number_of_all)
    return sorted({round(1 + index * (number_of_all - 1) / max(1, count - 1)) for index in range(count)})


def main() -> None:
    """Kill at the points of the command line, and print each."""
    parser = argparse.ArgumentParser(prog="python -m tests.prediction_kills", description=__doc__)
    parser.add_argument("--points", type=int, help="number of points for each format (default: all)")
    arguments = parser.parse_args()
    start_fork_server()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (prepared := folder / "prepared").mkdir()
        prepare(prepared)
        for suffix in FORMATS:
            for changed in (False, True):
                _, reached = expected(prepared, folder, suffix, changed=False)
                content, _ = expected(prepared, folder, suffix, changed=changed)
                images = "other" if changed else "same"
                for last in spread(len(reached), arguments.points):
                    after = kill_at(prepared, folder, suffix, last=last, content=content, changed=changed)
                    print(f"{suffix} point {last} of {len(reached)}, after {after}, {images} images: right", flush=True)


if __name__ == "__main__":
    main()
