"""The columns and the filter of MLflow's table of runs, which shows no metric by default.

MLflow keeps a shared view of the table in a tag of the experiment; an address with `viewStateShareKey=<name>` opens it.
"""

import json

from mlflow import MlflowClient

from pipeline.tracking.links import VIEW_TAG
from pipeline.tracking.provenance import COMPARISON
from pipeline.tracking.store import warn_on_failure

NO_COMPARISONS = f"tags.{COMPARISON} IS NULL"  # they have none of the metrics; emptying the search field shows them too
METRICS = ("selected/validation_accuracy", "test/accuracy", "test/macro_f1", "test/loss")


def ensure_results_view(run_id: str) -> None:
    """Store the view of the metrics with the experiment of the run, unless it is there; on failure, only warn.

    An MLflow server with logins may allow the user to record runs, but not to change the experiment.
    """
    columns = [f"metrics.`{name}`" for name in METRICS]
    view = json.dumps({"selectedColumns": columns, "searchFilter": NO_COMPARISONS})
    with warn_on_failure("MLflow's table of runs will show no metric"):
        client = MlflowClient()
        experiment = client.get_experiment(client.get_run(run_id).info.experiment_id)
        if experiment.tags.get(VIEW_TAG) != view:
            client.set_experiment_tag(experiment.experiment_id, VIEW_TAG, view)
