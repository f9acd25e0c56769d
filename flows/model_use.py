"""Find the MLflow run that made a model, tag it with a flow run that took the model from DVC's cache, register it.

`python -m flows.model_use FOLDER FLOW_RUN_ID EXPERIMENT` searches while the flow run saves its experiment, and prints
the ids of the MLflow run and of its experiment, or an empty line. FOLDER is the clone of the flow run, which has the
model and its evaluation. When the experiment is saved, the flow run sends a line to standard input: the MLflow run is
tagged, and the model registered, if no version of it is. Neither Prefect nor DVC is imported, which would take seconds:
the flow run waits.
"""

import sys
from contextlib import chdir, redirect_stdout
from pathlib import Path

from flows import PROJECT
from pipeline.artifacts import BEST_WEIGHTS, EVALUATE, NORMALIZE, TRAIN, file_md5, read_json
from pipeline.core.errors import report_errors
from pipeline.core.yaml import read_yaml
from pipeline.evaluation.predictions import read_identity
from pipeline.params import PARAMS_FILE
from pipeline.tracking.experiments import experiment_name
from pipeline.tracking.logger import RunLogger
from pipeline.tracking.models import ensure_model
from pipeline.tracking.provenance import FLOW_RUN, tag_name
from pipeline.tracking.registrations import register_evaluation
from pipeline.tracking.search import Run, find_runs_of_model
from pipeline.tracking.store import connect, warn_on_failure
from pipeline.tracking.store_uri import tracking_uri


def find_maker(model_md5: str) -> Run | None:
    """Return the newest run that made the model, or None."""
    connect(tracking_uri(PROJECT))
    return next(iter(find_runs_of_model(model_md5)), None)


def register(run_id: str, folder: Path) -> None:
    """Register the model of a run as it was evaluated in a clone, whose evaluation came from DVC's cache.

    Does nothing where the weights of the last epoch were evaluated, or the code is of an earlier version. Raises
    UserError where a file of the clone cannot be read.
    """
    model, predictions = folder / TRAIN / BEST_WEIGHTS, folder / EVALUATE / "predictions.parquet"
    if not predictions.exists():
        return
    (weights_md5, test_md5), model_md5 = read_identity(predictions), file_md5(model)
    if weights_md5 != model_md5:
        return
    with warn_on_failure(f"MLflow run {run_id} has no model, which cannot be registered"):
        ensure_model(run_id, folder / TRAIN)
    download = read_yaml(folder / PARAMS_FILE)["download"]
    register_evaluation(
        run_id,
        experiment=experiment_name(download["dataset"], folder=download["folder"]),
        model_md5=model_md5,
        test_md5=test_md5,
        data_md5=file_md5(folder / NORMALIZE / "dataset.json"),
        metrics=read_json(folder / EVALUATE / "metrics.json"),
    )


def main() -> None:
    """Print the id of the run that made the model, tag it with the flow run of the command line, and register it."""
    folder, flow_run_id, experiment = Path(sys.argv[1]), *sys.argv[2:]
    with report_errors(), chdir(PROJECT):
        run = find_maker(file_md5(folder / TRAIN / BEST_WEIGHTS))
        print(f"{run.run_id} {run.experiment_id}" if run else "", flush=True)
        if run and sys.stdin.readline():
            with redirect_stdout(sys.stderr):
                with warn_on_failure("the run is not tagged with this flow run"):
                    RunLogger(run.run_id).set_tags({tag_name(f"{FLOW_RUN}{flow_run_id}"): experiment})
                register(run.run_id, folder)


if __name__ == "__main__":
    main()
