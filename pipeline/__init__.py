"""The pipeline: one module for each of its steps download, normalize, train and evaluate, and what they share."""

import atexit
import gc
import os
import pwd
import sys

from pipeline.core.project import pipeline_cache_folder, project_folder
from pipeline.core.settings import get_settings

# The imports of PyTorch and MLflow create half a million objects that live until the end. With Python's own threshold,
# the garbage collector examines them again and again, which takes two seconds.
gc.set_threshold(50_000)


def _ensure_user() -> None:
    """Set a name and a home for a user id that has none, as in `docker --user 12345`: libraries fail without them.

    Where the home does not exist or cannot be written, libraries write their files into the project's `.cache/`.
    """
    if not get_settings().user_name:
        try:
            pwd.getpwuid(os.getuid())
        except KeyError:
            os.environ["LOGNAME"] = f"uid-{os.getuid()}"
    home, cache = os.path.expanduser("~"), pipeline_cache_folder(project_folder())  # noqa: PTH111
    if not os.path.isdir(home):  # noqa: PTH112  # Path.home raises an error where there is no home
        os.environ["HOME"] = str(cache / "home")
    elif not os.access(home, os.W_OK):
        for name, folder in (("XDG_CACHE_HOME", "home"), ("MPLCONFIGDIR", "matplotlib"), ("TRITON_HOME", "home")):
            os.environ.setdefault(name, str(cache / folder))


def _ensure_streams() -> None:
    """Open /dev/null in place of each standard stream that is closed.

    The next file that is opened would otherwise get the number of the stream, and its output.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: PTH123, SIM115


_ensure_user()
_ensure_streams()
get_settings.cache_clear()  # a notebook may set variables after this import


def _skip_last_collection() -> None:
    """Save the time of the garbage collection at the end of the process, which frees all memory anyway."""
    if "triton" not in sys.modules:  # Triton warns about objects that were not collected
        gc.freeze()


atexit.register(_skip_last_collection)
