"""Find the MLflow run that made a model, and tag it with a flow run that took the model from DVC's cache.

`python -m flows.model_use MODEL_MD5 FLOW_RUN_ID EXPERIMENT` prints the id of the run, or an empty line. It imports
neither Prefect nor DVC: the flow run waits for it.
"""

import sys
from contextlib import chdir

from flows import PROJECT
from pipeline.core.errors import report_errors
from pipeline.tracking.logger import RunLogger
from pipeline.tracking.provenance import FLOW_RUN
from pipeline.tracking.search import find_runs_of_model
from pipeline.tracking.store import connect, warn_on_failure
from pipeline.tracking.store_uri import tracking_uri


def record_use(model_md5: str, *, flow_run_id: str, experiment: str) -> str | None:
    """Tag the newest run that made the model with a flow run that took it from DVC's cache; returns the run's id."""
    connect(tracking_uri(PROJECT))
    made = find_runs_of_model(model_md5)
    if not made:
        return None
    with warn_on_failure("the run is not tagged with this flow run"):
        RunLogger(made[0].run_id).set_tags({f"{FLOW_RUN}{flow_run_id}": experiment})
    return made[0].run_id


def main() -> None:
    """Look the run up for the flow run that the command line names."""
    model_md5, flow_run_id, experiment = sys.argv[1:]
    with report_errors(), chdir(PROJECT):
        print(record_use(model_md5, flow_run_id=flow_run_id, experiment=experiment) or "")


if __name__ == "__main__":
    main()
