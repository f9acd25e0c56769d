"""Find the MLflow run that made a model, and tag it with a flow run that took the model from DVC's cache.

`python -m flows.model_use MODEL_MD5 FLOW_RUN_ID EXPERIMENT` finds the run while the flow run saves its experiment,
waits for a line on standard input, which means that it is saved, and then tags the run. It prints the run's id, or an
empty line. It imports neither Prefect nor DVC: the flow run waits for it.
"""

import sys
from contextlib import chdir, redirect_stdout

from flows import PROJECT
from pipeline.core.errors import report_errors
from pipeline.tracking.logger import RunLogger
from pipeline.tracking.provenance import FLOW_RUN
from pipeline.tracking.search import find_runs_of_model
from pipeline.tracking.store import connect, warn_on_failure
from pipeline.tracking.store_uri import tracking_uri


def find_maker(model_md5: str) -> str | None:
    """Return the id of the newest run that made the model, or None."""
    connect(tracking_uri(PROJECT))
    made = find_runs_of_model(model_md5)
    return made[0].run_id if made else None


def main() -> None:
    """Look the run up for the flow run that the command line names."""
    model_md5, flow_run_id, experiment = sys.argv[1:]
    with report_errors(), chdir(PROJECT):
        run_id = find_maker(model_md5)
        print(run_id or "")
        if run_id and sys.stdin.readline():
            with redirect_stdout(sys.stderr), warn_on_failure("the run is not tagged with this flow run"):
                RunLogger(run_id).set_tags({f"{FLOW_RUN}{flow_run_id}": experiment})


if __name__ == "__main__":
    main()
