"""The steps of the pipeline: download, normalize, train, evaluate; one module a step."""

import atexit
import gc
import os
import pwd
import sys

from pipeline.core.project import pipeline_cache_folder, project_folder
from pipeline.core.settings import get_settings

# PyTorch and MLflow make half a million objects that stay. To look through them, again and again while they are
# imported and a few times more when the interpreter ends, takes two seconds.
gc.set_threshold(50_000)


def _ensure_user() -> None:
    """Give a name and a home to a user id that has none, as in `docker --user 12345`: libraries fail without.

    What they keep in a home that does not exist or cannot be written goes into the project's `.cache/` instead.
    """
    if not get_settings().user_name:
        try:
            pwd.getpwuid(os.getuid())
        except KeyError:
            os.environ["LOGNAME"] = f"uid-{os.getuid()}"
    home, cache = os.path.expanduser("~"), pipeline_cache_folder(project_folder())  # noqa: PTH111
    if not os.path.isdir(home):  # noqa: PTH112  # Path.home raises where there is none
        os.environ["HOME"] = str(cache / "home")
    elif not os.access(home, os.W_OK):
        for name, folder in (("XDG_CACHE_HOME", "home"), ("MPLCONFIGDIR", "matplotlib"), ("TRITON_HOME", "home")):
            os.environ.setdefault(name, str(cache / folder))


def _ensure_streams() -> None:
    """Open /dev/null for each standard stream that is closed: the next file would get its number, and its output."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: PTH123, SIM115


_ensure_user()
_ensure_streams()
get_settings.cache_clear()  # a notebook may set variables after this import


def _end_soon() -> None:
    if "triton" not in sys.modules:  # it complains of objects that are left
        gc.freeze()


atexit.register(_end_soon)
