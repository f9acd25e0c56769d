"""Measure the time that `dvc repro` adds: where all is up to date, and to the training of cifar10_lenet.

`python -m benchmarks.repro [ROUNDS] [--images FOLDER]` measures in turn

    dvc repro of the project where all is up to date, compared with dvc repro of as many stages that only copy a file
    dvc repro of cifar10_lenet from the archive to the evaluation, in a new clone of the commit that is checked out
    with an empty cache, compared with one process that reads the archive, trains and evaluates (see ways/bare.py)

The archive is on this machine, and MLflow's store is created before. Nothing else should run meanwhile.
"""

import sys
from pathlib import Path

from benchmarks.cifar10 import add_images, archive_overrides, prepare_apart
from benchmarks.setting import PROJECT, clone, options, scratch, timed
from benchmarks.table import header, medians
from benchmarks.ways import RECIPE
from pipeline.core.errors import report_errors

STAGES = ("download", "normalize", "train", "evaluate")
NUM_NO_OPS = 5  # how often a round measures `dvc repro` with nothing to do
NO_OP, EMPTY = "dvc repro, nothing to do", "dvc repro of an empty pipeline, nothing to do"
REPRO, BARE = f"dvc repro of {RECIPE}", "bare loop, the archive read once"


def seconds(*command: str, cwd: Path) -> float:
    """Run a command without the user's MLflow server; return its seconds."""
    return timed(*command, cwd=cwd, without=("MLFLOW_TRACKING_URI", "PYTHONPATH"))[0]


def make_empty_pipeline(folder: Path) -> None:
    """Make a DVC project of as many stages as ours, each of which copies the output of the one before."""
    folder.mkdir()
    previous, stages = "start", []
    (folder / previous).write_text("")
    for name in STAGES:
        stages.append(f"  {name}:\n    cmd: cp {previous} {name}\n    deps: [{previous}]\n    outs: [{name}]\n")
        previous = name
    (folder / "dvc.yaml").write_text("stages:\n" + "".join(stages))
    seconds("git", "init", "--quiet", cwd=folder)
    seconds("dvc", "init", "--quiet", cwd=folder)
    seconds("dvc", "repro", cwd=folder)


def make_clone(folder: Path) -> None:
    """Clone the project, write the parameters of the recipe into the clone, and create its MLflow store."""
    clone(folder)
    options = [argument for value in archive_overrides() for argument in ("--set", value)]
    seconds(sys.executable, "-m", "pipeline.recipes", "--recipe", RECIPE, *options, cwd=folder)
    seconds(sys.executable, "-c", "from pipeline.tracking.store import connect; connect()", cwd=folder)


def one_round(folder: Path) -> dict[str, list[float]]:
    """Run each way, those with nothing to do several times in turn; return the seconds."""
    make_clone(folder / "clone")
    make_empty_pipeline(folder / "empty")
    found = {REPRO: [seconds("dvc", "repro", cwd=folder / "clone")]}
    found[BARE] = [seconds(sys.executable, "-m", "benchmarks.ways.bare", cwd=PROJECT)]
    no_ops: dict[str, list[float]] = {NO_OP: [], EMPTY: []}
    for _ in range(NUM_NO_OPS):
        no_ops[NO_OP].append(seconds("dvc", "repro", cwd=folder / "clone"))
        no_ops[EMPTY].append(seconds("dvc", "repro", cwd=folder / "empty"))
    return {**found, **no_ops}


def main() -> None:
    """Run the rounds, and print the tables."""
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
