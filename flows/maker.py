"""Which MLflow run made a model that a flow run had from DVC's cache; the run is told of that flow run.

`python -m flows.maker MODEL_MD5 FLOW_RUN_ID EXPERIMENT` prints the run's id, or nothing. A process of its own, since
MLflow takes 2 s to import: the flow meanwhile saves its experiment.
"""

import os
import sys

from flows import PROJECT
from pipeline.core.errors import report_errors
from pipeline.core.settings import tracking_uri
from pipeline.tracking import runs as tracking


def adopt(model_md5: str, *, flow_run_id: str, experiment: str) -> str | None:
    """Note with the run that made the model that the flow run took it from the cache; gives the run's id."""
    made = tracking.makers(model_md5)
    if not made:
        return None
    with tracking.told("the run is not told of this flow run"):
        tracking.Run(made[0].run_id).tag({f"{tracking.FLOW_RUN}{flow_run_id}": experiment})
    return made[0].run_id


def main() -> None:
    """Look, tag, print."""
    model_md5, flow_run_id, experiment = sys.argv[1:]
    os.environ["MLFLOW_TRACKING_URI"] = tracking_uri(PROJECT)
    with report_errors():
        tracking.connect()
        print(adopt(model_md5, flow_run_id=flow_run_id, experiment=experiment) or "")


if __name__ == "__main__":
    main()
