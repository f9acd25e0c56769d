"""The steps of the pipeline: download, normalize, train, evaluate; one module a step."""

import atexit
import gc
import sys

# PyTorch and MLflow make half a million objects that stay. To look through them, again and again while they are
# imported and a few times more when the interpreter ends, takes two seconds.
gc.set_threshold(50_000)


def _end_soon() -> None:
    if "triton" not in sys.modules:  # it complains of objects that are left
        gc.freeze()


atexit.register(_end_soon)
