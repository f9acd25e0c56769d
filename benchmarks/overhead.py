"""What DVC, MLflow and Prefect cost around a training: each way in turn, several times, on the digits.

`python -m benchmarks.overhead [ROUNDS]` clones the commit that is checked out into a temporary folder for each round
and prints the median seconds of each way. Nothing else should run on the machine meanwhile.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.table import medians

PROJECT = Path(__file__).resolve().parents[1]
LOOP = """
import time
from pipeline.data import DatasetInfo, Split
from pipeline.loop import prepare_torch, train
from pipeline.model import build, configure
from pipeline.params import load_params
params, info = load_params().train, DatasetInfo.read()
device = prepare_torch(params)
splits = {name: Split.read(name, info=info, device=device) for name in ("train", "validation")}
start = time.perf_counter()
train(build(configure(params, info)), params=params, train_split=splits["train"], validation_split=splits["validation"])
print(time.perf_counter() - start)
"""
FLOW = [sys.executable, "-m", "flows.train_classifier"]


def run(*command: str, cwd: Path) -> tuple[float, str]:
    """Seconds from start to end, and what was printed."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME"):
        environment.pop(name, None)
    start = time.perf_counter()
    done = subprocess.run(command, cwd=cwd, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - start, done.stdout


def one_round(folder: Path) -> dict[str, float]:
    """Each way once; the flow runs in a clone of its own, so that its cache is empty."""
    repro, flow = folder / "repro", folder / "flow"
    for clone in (repro, flow):
        run("git", "clone", "--quiet", str(PROJECT), str(clone), cwd=folder)
    seconds = {"dvc repro, empty cache": run("dvc", "repro", cwd=repro)[0]}
    seconds["training loop alone (in the process)"] = float(run(sys.executable, "-c", LOOP, cwd=repro)[1].split()[-1])
    seconds["training loop alone (the whole process)"] = run(sys.executable, "-c", LOOP, cwd=repro)[0]
    seconds["dvc repro, nothing to do"] = run("dvc", "repro", cwd=repro)[0]
    seconds["Prefect server started"] = run(sys.executable, "-m", "flows.server", "start", cwd=flow)[0]
    try:
        seconds["flow run, empty cache"] = run(*FLOW, cwd=flow)[0]
        seconds["flow run, all cached"] = run(*FLOW, cwd=flow)[0]
    finally:
        run(sys.executable, "-m", "flows.server", "stop", cwd=flow)
    return seconds


def main() -> None:
    """Run the rounds; print the table."""
    rounds = []
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 3):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(one_round(Path(folder)))
    print(medians({way: [found[way] for found in rounds] for way in rounds[0]}))


if __name__ == "__main__":
    main()
