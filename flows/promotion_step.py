"""The promotion as the last step of a training, which it never fails."""

from flows.run_log import warn
from pipeline.core.errors import first_line


def promote_experiment(experiment: str) -> str:
    """Run the promotion of an experiment's model as a flow run of its own, and return in one sentence what it decided.

    A failure of it is a warning, and its reason is in the sentence: the training has succeeded.
    """
    try:
        from flows.promote import promote  # noqa: PLC0415  # MLflow and PyTorch take seconds to import

        state = promote(experiment, return_state=True)
    except Exception as error:  # the experiment is saved, and its night must not count as failed
        warn(f"the promotion failed: {first_line(error)}")
        return f"the promotion failed: {first_line(error)}"
    if state.is_completed():
        return str(state.message)
    warn(f"the promotion failed: {state.message}")
    return f"the promotion failed: {state.message}"
