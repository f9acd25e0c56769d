"""Find the MLflow run that made a model, and tag it with a flow run that took the model from DVC's cache.

`python -m flows.model_use MODEL_MD5 FLOW_RUN_ID EXPERIMENT` searches while the flow run saves its experiment, and
prints the ids of the MLflow run and of its experiment, or an empty line. When the experiment is saved, the flow run
sends a line to standard input, and the MLflow run is tagged. Neither Prefect nor DVC is imported, which would take
seconds: the flow run waits.
"""

import sys
from contextlib import chdir, redirect_stdout

from flows import PROJECT
from pipeline.core.errors import report_errors
from pipeline.tracking.logger import RunLogger
from pipeline.tracking.provenance import FLOW_RUN, tag_name
from pipeline.tracking.search import Run, find_runs_of_model
from pipeline.tracking.store import connect, warn_on_failure
from pipeline.tracking.store_uri import tracking_uri


def find_maker(model_md5: str) -> Run | None:
    """Return the newest run that made the model, or None."""
    connect(tracking_uri(PROJECT))
    return next(iter(find_runs_of_model(model_md5)), None)


def main() -> None:
    """Print the id of the run that made the model, and tag it with the flow run of the command line."""
    model_md5, flow_run_id, experiment = sys.argv[1:]
    with report_errors(), chdir(PROJECT):
        run = find_maker(model_md5)
        print(f"{run.run_id} {run.experiment_id}" if run else "")
        if run and sys.stdin.readline():
            with redirect_stdout(sys.stderr), warn_on_failure("the run is not tagged with this flow run"):
                RunLogger(run.run_id).set_tags({tag_name(f"{FLOW_RUN}{flow_run_id}"): experiment})


if __name__ == "__main__":
    main()
