"""Measure how much longer an epoch of cifar10_lenet takes with a checkpoint, and with MLflow.

`python -m benchmarks.epochs [ROUNDS]` runs each way in turn in one process. It prints the medians, the median ratios
within the rounds, and the seconds that MLflow takes for the finished model. The images are random pixels in the number
and size of CIFAR-10's, since the time does not depend on what they show. MLflow's store is a new sqlite file.
"""

import contextlib
import io
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.lenet import CONFIG, PARAMS, Splits, new_classifier, random_splits, train_epoch
from benchmarks.setting import options, scratch
from benchmarks.table import header, medians
from pipeline.artifacts import BEST_WEIGHTS, replace_folder
from pipeline.core.errors import report_errors
from pipeline.core.settings import get_settings
from pipeline.models.files import save_config, save_weights
from pipeline.tracking.logger import RunLogger
from pipeline.tracking.models import log_model
from pipeline.tracking.runs import describe_dataset, training_run
from pipeline.train import report_epoch
from pipeline.training.checkpoints import Checkpoints
from pipeline.training.device import prepare_torch


@contextlib.contextmanager
def mlflow_run(*, number: int) -> Iterator[RunLogger]:
    """Start a run in MLflow, as the step train does, and end it after the block."""
    dataset = describe_dataset("random", source=None, digest="0" * 32)
    with training_run(experiment="benchmark", params=PARAMS.flat(), dataset=dataset, training=str(number)) as run:
        yield run


def logged_epoch(splits: Splits, *, number: int) -> tuple[float, float]:
    """Return the seconds of an epoch that is logged to MLflow, and those of the upload of the model."""
    classifier = new_classifier()
    with mlflow_run(number=number) as run, tempfile.TemporaryDirectory() as folder:
        run.start_system_metrics()
        seconds = train_epoch(
            classifier,
            splits,
            on_step=lambda step, loss, rate: run.log({"step/loss": loss, "step/learning_rate": rate}, step=step),
            on_epoch=lambda epoch, speed: report_epoch(epoch, speed, params=PARAMS.train, run=run),
        )
        with replace_folder(Path(folder) / "train") as target:
            save_weights(classifier, target / BEST_WEIGHTS)
            save_config(CONFIG, target)
        start = time.perf_counter()
        log_model(Path(folder) / "train")
        return seconds, time.perf_counter() - start


def main() -> None:
    """Measure each way in turn, and print the table."""
    rounds = options("epochs", __doc__, repeats="ROUNDS", default=8).parse_args().repeats
    print(header(seeds="0"))
    prepare_torch(PARAMS.train)
    splits = random_splits()
    alone, checkpoint, logged = "epoch alone", "epoch and its checkpoint", "epoch logged to MLflow"
    seconds: dict[str, list[float]] = {alone: [], checkpoint: [], logged: []}
    uploads = []
    with scratch() as folder:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        os.environ["PIPELINE_PROJECT"] = folder
        get_settings.cache_clear()
        checkpoints = Checkpoints(Path(folder) / "checkpoints")
        for number in range(rounds + 1):
            with contextlib.redirect_stdout(io.StringIO()):
                logged_seconds, upload = logged_epoch(splits, number=number)
            found = {alone: train_epoch(new_classifier(), splits), logged: logged_seconds}
            found[checkpoint] = train_epoch(new_classifier(), splits, save=checkpoints.write)
            for way, value in found.items() if number else ():  # the first round warms up
                seconds[way].append(value)
            uploads.append(upload)
    print(medians(seconds, base=alone, digits=3))
    print(f"\nupload of the model: median {statistics.median(uploads):.2f} s, the first {uploads[0]:.2f} s")


if __name__ == "__main__":
    with report_errors():
        main()
