"""Measure what `dvc repro` costs: with nothing to do, and around the training of cifar10_lenet.

`python -m benchmarks.repro [ROUNDS] [--images FOLDER]` measures in turn

    dvc repro of the project, all up to date, against dvc repro of a pipeline of as many stages that do nothing
    dvc repro of cifar10_lenet from the archive to the evaluation, in a fresh clone of the commit that is checked out
    with an empty cache, against one process that reads the archive, trains and evaluates (benchmarks/ways/bare.py)

The archive lies on this machine, and MLflow's store is made once, before. Nothing else should run meanwhile.
"""

import sys
from pathlib import Path

from benchmarks.cifar10 import add_images, archive_overrides, prepare_apart
from benchmarks.setting import PROJECT, clone, options, scratch, timed
from benchmarks.table import header, medians
from benchmarks.ways import RECIPE
from pipeline.core.errors import report_errors

STAGES = ("download", "normalize", "train", "evaluate")
NO_OPS, NO_OP, EMPTY = 5, "dvc repro, nothing to do", "dvc repro of an empty pipeline, nothing to do"
REPRO, BARE = f"dvc repro of {RECIPE}", "bare loop, the archive read once"


def seconds(*command: str, cwd: Path) -> float:
    """Return the seconds of a command, without the user's MLflow server."""
    return timed(*command, cwd=cwd, without=("MLFLOW_TRACKING_URI", "PYTHONPATH"))[0]


def make_empty_pipeline(folder: Path) -> None:
    """Make a DVC project of as many stages as ours, each of which copies the output of the one before."""
    folder.mkdir()
    before, stages = "start", []
    (folder / before).write_text("")
    for name in STAGES:
        stages.append(f"  {name}:\n    cmd: cp {before} {name}\n    deps: [{before}]\n    outs: [{name}]\n")
        before = name
    (folder / "dvc.yaml").write_text("stages:\n" + "".join(stages))
    seconds("git", "init", "--quiet", cwd=folder)
    seconds("dvc", "init", "--quiet", cwd=folder)
    seconds("dvc", "repro", cwd=folder)


def make_clone(folder: Path) -> None:
    """Make a clone of the project, with the parameters of the recipe and a store for MLflow."""
    clone(folder)
    options = [argument for value in archive_overrides() for argument in ("--set", value)]
    seconds(sys.executable, "-m", "pipeline.params", "--recipe", RECIPE, *options, cwd=folder)
    seconds(sys.executable, "-c", "from pipeline.tracking.store import connect; connect()", cwd=folder)


def one_round(folder: Path) -> dict[str, list[float]]:
    """Return the seconds of each way; those with nothing to do are measured several times in turn."""
    make_clone(folder / "clone")
    make_empty_pipeline(folder / "empty")
    found = {REPRO: [seconds("dvc", "repro", cwd=folder / "clone")]}
    found[BARE] = [seconds(sys.executable, "-m", "benchmarks.ways.bare", cwd=PROJECT)]
    nothing: dict[str, list[float]] = {NO_OP: [], EMPTY: []}
    for _ in range(NO_OPS):
        nothing[NO_OP].append(seconds("dvc", "repro", cwd=folder / "clone"))
        nothing[EMPTY].append(seconds("dvc", "repro", cwd=folder / "empty"))
    return {**found, **nothing}


def main() -> None:
    """Run the rounds and print the tables."""
    parser = options("repro", __doc__, repeats="ROUNDS", default=3)
    add_images(parser)
    arguments = parser.parse_args()
    prepare_apart(arguments.images)
    print(header(seeds="0"))
    found: dict[str, list[float]] = {REPRO: [], BARE: [], NO_OP: [], EMPTY: []}
    for _ in range(arguments.repeats):
        with scratch() as folder:
            for way, values in one_round(Path(folder)).items():
                found[way] += values
    print(medians({way: found[way] for way in (REPRO, BARE)}, base=BARE))
    print()
    print(medians({way: found[way] for way in (NO_OP, EMPTY)}, base=EMPTY, digits=2))


if __name__ == "__main__":
    with report_errors():
        main()
