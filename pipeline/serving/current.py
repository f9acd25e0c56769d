"""Hold the model that answers requests, and replace it while requests are answered.

`open_model` loads a model; where that is the version of an alias in MLflow's registry, such as
`models:/digits@champion`, a thread looks every few seconds which version has the alias. Another version is fetched,
verified, loaded and warmed up beside the model that answers; only then it answers the next requests. A request keeps
the model that it got from `CurrentModel.get` until it is answered. Whatever fails meanwhile, the old model remains.
"""

import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

import numpy as np
import torch

from pipeline.arrays import CPU
from pipeline.artifacts import TRAIN
from pipeline.core.errors import UserError, escape_control_chars, first_line
from pipeline.models.files import load_model
from pipeline.prediction.model import LoadedModel, load
from pipeline.tracking.model_files import ModelFiles, find_model_files

POLL_SECONDS = 2.0
MAX_WAIT_SECONDS = 60.0  # between two tries after failures


@dataclass(frozen=True)
class ServedNow:
    """A model that answers requests.

    `name` is that of the registered model, `version` the number of the version in MLflow's registry. Of a model that
    is not named by its version or alias there, `version` is None and `name` is the text that named it. `since` is when
    it began to answer, in seconds since 1970.
    """

    model: LoadedModel
    name: str
    version: str | None = None
    since: float = field(default_factory=time.time)


class CurrentModel:
    """The model that answers requests now; another thread may replace it.

    `problem` states in one line why a newer model cannot be taken over, or why that is not known; None while all is
    well.
    """

    def __init__(self, served: ServedNow) -> None:
        self._served = served
        self.problem: str | None = None

    def get(self) -> ServedNow:
        """Return the model that answers now. A request calls this once, so that one model answers all of it."""
        return self._served

    def replace(self, served: ServedNow) -> None:
        """Let another model answer from now on; the memory of the old one is free once no request uses it."""
        self._served = served


@contextmanager
def open_model(
    text: str | None, *, poll_seconds: float = POLL_SECONDS, device: torch.device = CPU
) -> Iterator[CurrentModel]:
    """Load the model that a text names, warm it up, and yield it; follow an alias until the end of the block.

    Without a text, the model is the champion of the only registered model that has one, or, as long as there is no
    champion, that in `artifacts/train/`. Raises UserError where there is no such model, where several registered models
    have a champion, or where a file is damaged; TemporaryError where MLflow's server does not answer.
    """
    raise NotImplementedError
    yield
