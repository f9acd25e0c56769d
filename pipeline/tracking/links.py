"""Build addresses of MLflow's pages, all of which open MLflow in its mode for the training of models.

MLflow keeps that mode only where the address names the experiment too: from `#/runs/<id>` it redirects without it.
"""

MODE = "workflowType=machine_learning"
EXPERIMENTS_PAGE = f"#/experiments?{MODE}"
UNKNOWN_EXPERIMENT = "0"  # MLflow shows the run all the same, beside the menu of the experiment 0


def run_page(run_id: str, *, experiment_id: str | None, artifact: str | None = None) -> str:
    """Return the page of a run, or of an artifact of the run, relative to the address of the MLflow server."""
    path = f"#/experiments/{experiment_id or UNKNOWN_EXPERIMENT}/runs/{run_id}"
    return f"{path}/artifacts/{artifact}?{MODE}" if artifact else f"{path}?{MODE}"
