"""Measure the time that DVC, MLflow and Prefect add to a training of the digits.

`python -m benchmarks.overhead [ROUNDS]` clones the commit that is checked out into a temporary folder for each round,
runs each way in turn, and prints the median seconds. Nothing else should run on the machine meanwhile.
"""

import sys
from pathlib import Path

from benchmarks.setting import clone, options, scratch, timed
from benchmarks.table import header, medians
from pipeline.core.errors import report_errors

TRAINING_LOOP = """
import time
from pipeline.arrays import DatasetInfo, Split
from pipeline.models.build import build
from pipeline.models.config import configure
from pipeline.params import load_params
from pipeline.training.device import prepare_torch
from pipeline.training.loop import train
params, info = load_params().train, DatasetInfo.read()
device = prepare_torch(params)
splits = {name: Split.read(name, info=info, device=device) for name in ("train", "validation")}
start = time.perf_counter()
train(build(configure(params, info)), params=params, train_split=splits["train"], validation_split=splits["validation"])
print(time.perf_counter() - start)
"""
# removed from the environment, since they would send the runs to the user's own servers
SERVER_VARIABLES = ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME")
FLOW = [sys.executable, "-m", "flows.train_classifier"]


def run(*command: str, cwd: Path) -> tuple[float, str]:
    """Run a command without the user's servers; return its seconds and its output."""
    return timed(*command, cwd=cwd, without=SERVER_VARIABLES)


def one_round(folder: Path) -> dict[str, float]:
    """Run each way once, and return its seconds; the flow has a clone of its own, so that its cache is empty."""
    repro, flow = folder / "repro", folder / "flow"
    for copy in (repro, flow):
        clone(copy)
    seconds = {"dvc repro, empty cache": run("dvc", "repro", cwd=repro)[0]}
    loop = (sys.executable, "-c", TRAINING_LOOP)
    seconds["training loop alone (in the process)"] = float(run(*loop, cwd=repro)[1].split()[-1])
    seconds["training loop alone (the whole process)"] = run(*loop, cwd=repro)[0]
    seconds["dvc repro, nothing to do"] = run("dvc", "repro", cwd=repro)[0]
    seconds["Prefect server started"] = run(sys.executable, "-m", "flows.server", "start", cwd=flow)[0]
    try:
        seconds["flow run, empty cache"] = run(*FLOW, cwd=flow)[0]
        seconds["flow run, all cached"] = run(*FLOW, cwd=flow)[0]
    finally:
        run(sys.executable, "-m", "flows.server", "stop", cwd=flow)
    return seconds


def main() -> None:
    """Run the rounds, and print the table."""
    rounds = options("overhead", __doc__, repeats="ROUNDS", default=3).parse_args().repeats
    print(header(seeds="0"))
    found = []
    for _ in range(rounds):
        with scratch() as folder:
            found.append(one_round(Path(folder)))
    print(medians({way: [each[way] for each in found] for way in found[0]}))


if __name__ == "__main__":
    with report_errors():
        main()
