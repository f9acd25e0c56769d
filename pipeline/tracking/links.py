"""Build addresses of MLflow's pages, all of which open MLflow in its mode for the training of models.

MLflow keeps that mode only where the address names the experiment too: from `#/runs/<id>` it redirects without it.
"""

MODE = "workflowType=machine_learning"
EXPERIMENTS_PAGE = f"#/experiments?{MODE}"
RESULTS_VIEW = "results"  # the name of the shared view of the table of runs that has columns of metrics
VIEW_TAG = f"mlflow.sharedViewState.{RESULTS_VIEW}"  # of an experiment: MLflow keeps the view there
REPORT = "report.html"  # an artifact of a run
UNKNOWN_EXPERIMENT = "0"  # MLflow shows the run all the same, beside the menu of the experiment 0


def run_page(run_id: str, *, experiment_id: str | None, artifact: str | None = None) -> str:
    """Return the page of a run, or of an artifact of the run, relative to the address of the MLflow server."""
    path = f"#/experiments/{experiment_id or UNKNOWN_EXPERIMENT}/runs/{run_id}"
    return f"{path}/artifacts/{artifact}?{MODE}" if artifact else f"{path}?{MODE}"


def runs_page(experiment_id: str) -> str:
    """Return the table of an experiment's runs with their metrics, relative to the address of the MLflow server."""
    return f"#/experiments/{experiment_id}/runs?{MODE}&viewStateShareKey={RESULTS_VIEW}"
