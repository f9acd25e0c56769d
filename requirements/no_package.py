"""A build backend that refuses to build: the project is a checkout to clone, not a package to install."""

from typing import NoReturn

MESSAGE = (
    "error: this project runs from its checkout and cannot be built or installed as a package: its stages need "
    "dvc.yaml, params.yaml, recipes and git beside the code; clone it and run `make run`, and to import pipeline from "
    "elsewhere use the Python of its .venv with the checkout in PYTHONPATH"
)


def build_wheel(*_arguments: object, **_options: object) -> NoReturn:
    """Exit with the message; `pip install`, `uv` and `build` call this function."""
    raise SystemExit(MESSAGE)


build_sdist = build_editable = build_wheel
