"""Build backend that refuses: the project is a checkout to clone, not a package to install."""

from typing import NoReturn

MESSAGE = (
    "error: this project runs from its checkout and cannot be built or installed as a package: its stages need "
    "dvc.yaml, params.yaml, recipes and git beside the code; clone it and run `make run`, and to import pipeline from "
    "elsewhere use the Python of its .venv with the checkout in PYTHONPATH"
)


def build_wheel(*_arguments: object, **_options: object) -> NoReturn:
    """End with one message; pip, uv and build call this for `wheel` and `install`."""
    raise SystemExit(MESSAGE)


build_sdist = build_editable = build_wheel
