"""Which MLflow run made a model that a flow run had from DVC's cache; the run is told of that flow run.

`python -m flows.maker MODEL_MD5 FLOW_RUN_ID EXPERIMENT` prints the run's id, or nothing. A process of its own, since
MLflow takes 2 s to import: the flow meanwhile saves its experiment.
"""

import sys

from flows import PROJECT
from pipeline.core.errors import report_errors
from pipeline.tracking.logger import RunLogger
from pipeline.tracking.provenance import FLOW_RUN
from pipeline.tracking.search import find_runs_of_model
from pipeline.tracking.store import connect, warn_on_failure
from pipeline.tracking.store_uri import tracking_uri


def adopt(model_md5: str, *, flow_run_id: str, experiment: str) -> str | None:
    """Note with the run that made the model that the flow run took it from the cache; gives the run's id."""
    made = find_runs_of_model(model_md5)
    if not made:
        return None
    with warn_on_failure("the run is not tagged with this flow run"):
        RunLogger(made[0].run_id).set_tags({f"{FLOW_RUN}{flow_run_id}": experiment})
    return made[0].run_id


def main() -> None:
    """Look, tag, print."""
    model_md5, flow_run_id, experiment = sys.argv[1:]
    with report_errors():
        connect(tracking_uri(PROJECT))
        print(adopt(model_md5, flow_run_id=flow_run_id, experiment=experiment) or "")


if __name__ == "__main__":
    main()
