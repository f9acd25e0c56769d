"""Hold the model that answers requests, and replace it while requests are answered.

`open_model` loads a model; where that is the version of an alias in MLflow's registry, such as
`models:/digits@champion`, a thread polls every few seconds which version has the alias. Another version is fetched,
verified, loaded and warmed up beside the model that answers; only then it answers the next requests. A request keeps
the model that it got from `CurrentModel.get` until it is answered. Whatever fails meanwhile, the old model remains.
"""

import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

import numpy as np

from pipeline.arrays import CPU
from pipeline.artifacts import TRAIN
from pipeline.core.errors import UserError, escape_control_chars, first_line
from pipeline.datasets.layout import shorten_list
from pipeline.models.files import load_model
from pipeline.prediction.model import LoadedModel, find_threshold, load
from pipeline.tracking import registry
from pipeline.tracking.model_files import ModelFiles, find_model_files
from pipeline.tracking.store import connect

POLL_SECONDS = 2.0
STOP_SECONDS = 5.0  # how long the end of a server waits for the thread, which may be in a download
MAX_SKIPPED_POLLS = 15
_ALIAS = re.compile(r"models:/([^/]+)@([\w-]+)")
_VERSION = re.compile(r"models:/([^/]+)/(\d+)")


@dataclass(frozen=True)
class ServedNow:
    """A model that answers requests.

    `name` is that of the registered model, `version` the number of its version in MLflow's registry. Of a model that is
    not named by a version or an alias there, `version` is None and `name` is the text that named it. `since` is when it
    began to answer, in seconds since 1970. The files of the version of an alias are deleted after it was loaded.
    """

    model: LoadedModel
    name: str
    version: str | None = None
    since: float = field(default_factory=time.time)


class CurrentModel:
    """The model that answers requests now; another thread may replace it.

    `problem` states in one line why a newer model is not taken over, or why that is not known; it is None while all is
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
    text: str | None, *, poll_seconds: float = POLL_SECONDS, coverage: float | None = None
) -> Iterator[CurrentModel]:
    """Load the model that a text names, warm it up on the CPU, and yield it; follow an alias until the block ends.

    Without a text, the model is the champion of the only registered model that has one, or, as long as there is no
    champion, that in `artifacts/train/`. With a `coverage`, each model must have a threshold for it, as a server that
    reports unknown images by default could answer no request without one.

    Raises UserError where there is no such model, where several registered models have a champion, where a file is
    damaged, or where there is no such threshold; TemporaryError where MLflow's server does not answer.
    """
    text = text or _find_champion()
    alias = _ALIAS.fullmatch(text or "")
    if text and not alias:
        yield CurrentModel(_load_fixed(text, coverage=coverage))
        return
    name, alias_name = (alias[1], alias[2]) if alias else (None, registry.CHAMPION)
    follower = Follower(name=name, alias=alias_name, coverage=coverage)
    stop = Event()
    thread = Thread(target=follower.run, args=(stop,), kwargs={"poll_seconds": poll_seconds}, daemon=True)
    thread.start()
    try:
        yield follower.current
    finally:
        stop.set()
        thread.join(STOP_SECONDS)


def _find_champion() -> str | None:
    """Return the address of the only champion, or None where there is none and `artifacts/train/` has a model."""
    connect()
    addresses = [f"models:/{name}@{registry.CHAMPION}" for name in _names_with_champion()]
    if len(addresses) > 1:
        raise UserError(
            f"found {len(addresses)} champions: {', '.join(addresses)}; allowed: one model; name it, as in "
            f'`make serve MODEL="{addresses[0]}"`'
        )
    if addresses:
        return addresses[0]
    if not TRAIN.is_dir():
        raise UserError(
            f"found no model to serve: neither a champion in MLflow's model registry nor the folder {TRAIN}; "
            "`make run` trains a model, and MODEL=runs:/RUN_ID/model names one"
        )
    _print(f"no champion yet: serves {TRAIN} until there is one")
    return None


def _names_with_champion() -> list[str]:
    return [name for name in registry.find_names() if registry.number_of_alias(name, registry.CHAMPION)]


def _load_fixed(text: str | None, *, coverage: float | None) -> ServedNow:
    """Return a model that is never replaced, after a first prediction."""
    model = load(find_model_files(text))
    _try_out(model, coverage=coverage)
    version = _VERSION.fullmatch(text or "")
    return ServedNow(model, version[1], version[2]) if version else ServedNow(model, model.files.label)


class Follower:
    """The model that has an alias in MLflow's registry, kept up to date by `poll`.

    Without a name, it is the model in `artifacts/train/` until a registered model has the alias `champion`. Creating it
    loads the model; raises as `open_model`.
    """

    def __init__(self, *, name: str | None, alias: str, coverage: float | None = None) -> None:
        self._name, self._alias, self._coverage = name, alias, coverage
        self._registry_backoff, self._load_backoff = _BackOff(), _BackOff()
        self._number: str | None = None  # the version that `_load_backoff` is about
        self._kind: str | None = None  # of the problem
        connect()
        if name is None:
            self.current = CurrentModel(_load_fixed(None, coverage=coverage))
            return
        number = registry.number_of_alias(name, alias)
        if number is None:
            raise UserError(
                f"--model {self._uri}: no version in MLflow's model registry has this alias; allowed: a model that has "
                "one; MLflow's page Models shows the aliases"
            )
        self.current = CurrentModel(self._load(number, load))

    @property
    def _uri(self) -> str:
        return f"models:/{self._name}@{self._alias}" if self._name else "the first champion"

    @property
    def _served(self) -> str:
        served = self.current.get()
        return f"version {served.version}" if served.version else served.name

    def run(self, stop: Event, *, poll_seconds: float) -> None:
        """Poll every `poll_seconds` until `stop` is set."""
        while not stop.wait(poll_seconds):
            self.poll()

    def poll(self) -> None:
        """Replace the model if another version has the alias now; report what prevents that, and keep the old model.

        After a failure, some of the next polls do nothing, see `_BackOff`.
        """
        if not self._registry_backoff.is_due():
            return
        try:
            names = [self._name] if self._name else _names_with_champion()
            number = registry.number_of_alias(names[0], self._alias) if len(names) == 1 else None
        except Exception as error:  # no failure of MLflow may end the thread
            self._registry_backoff.fail()
            self._report("registry", f"the model registry does not answer: {first_line(error)}")
            return
        self._registry_backoff.reset()
        if not names:
            self._clear()
        elif len(names) > 1:
            self._report("champions", f"{len(names)} models have a champion; name one by MODEL and start again")
        elif number is None:
            self._report("alias", "no version has the alias any more; set it in MLflow")
        elif number == self.current.get().version:
            self._clear()
        else:
            self._name = names[0]
            self._take_over(number)

    def _take_over(self, number: str) -> None:
        """Load the version, and let it answer; where it was tried before, only when the next try is due."""
        if number != self._number:
            self._number = number
            self._load_backoff.reset()
        if not self._load_backoff.is_due():
            return
        try:
            served = self._load(number, _load_beside)
        except Exception as error:  # whatever is wrong with a new model, the old one continues to answer
            self._load_backoff.fail()
            self._report(f"version {number}", f"version {number} cannot be served: {first_line(error)}")
            return
        self._load_backoff.reset()
        for difference in _differences(self.current.get().model, served.model):
            _print(f"warning: {self._uri}: version {number} {difference}")
        _print(f"{self._uri}: version {number} answers now, in place of {self._served}")
        self.current.replace(served)
        self._kind = self.current.problem = None

    def _report(self, kind: str, problem: str) -> None:
        """Set the problem, and print it where it is of another kind than before: its text may vary while it lasts."""
        problem = f"{self._uri}: {problem}; {self._served} continues to answer"
        if kind != self._kind:
            _print(f"warning: {problem}")
        self._kind, self.current.problem = kind, problem

    def _clear(self) -> None:
        """Forget the problem and the version that could not be served, as the model that answers is the right one."""
        if self._kind:
            _print(f"{self._uri}: no problem any more; {self._served} answers")
        self._kind = self.current.problem = self._number = None

    def _load(self, number: str, load_files: Callable[[ModelFiles], LoadedModel]) -> ServedNow:
        """Return the version, ready to answer: fetched, verified by its checksums, loaded and used once."""
        assert self._name
        with tempfile.TemporaryDirectory(prefix="served-model-") as target:
            files = find_model_files(f"models:/{self._name}/{number}", target=Path(target))
            model = load_files(files)
        _try_out(model, coverage=self._coverage)
        return ServedNow(model, self._name, number)


class _BackOff:
    """A count of failures in a row: after the nth one, 2ⁿ - 1 polls are skipped, at most MAX_SKIPPED_POLLS."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._failures = self._skips = 0

    def fail(self) -> None:
        self._failures += 1
        self._skips = min(2**self._failures - 1, MAX_SKIPPED_POLLS)

    def is_due(self) -> bool:
        """Return whether to try now; a skipped poll is counted."""
        self._skips -= 1
        return self._skips < 0


def _load_beside(files: ModelFiles) -> LoadedModel:
    """Return the model as `load` does, with the kernels of the CPU that the process has already used."""
    classifier, config = load_model(files.folder, checkpoint=files.checkpoint)
    return LoadedModel(classifier, config, files, CPU)


def _try_out(model: LoadedModel, *, coverage: float | None) -> None:
    """Compute the answer for a black image, as the first answer takes longest.

    Raises UserError where the answer has a NaN, or the model has no threshold for the coverage.
    """
    find_threshold(model, coverage)
    size = model.config.image_size
    image = np.zeros((1, size, size, model.config.channels), dtype=np.uint8)
    if not np.isfinite(model.quick_probabilities(image)).all():
        raise UserError(f"{model.files.label}: found a non-finite probability; train the model again")


def _differences(old: LoadedModel, new: LoadedModel) -> Iterator[str]:
    """Yield what a client or the operator has to know about a new model, as the ends of sentences."""
    before, after = old.config, new.config
    if after.class_names != before.class_names:
        names = [shorten_list([*each.class_names]) for each in (after, before)]
        yield f"has other classes: {names[0]} instead of {names[1]}"
    shapes = [f"(N, {each.image_size}, {each.image_size}, {each.channels})" for each in (before, after)]
    if shapes[0] != shapes[1]:
        yield f"accepts arrays {shapes[1]} and no longer {shapes[0]}; photographs are accepted as before"
    lost = {*(before.thresholds or {})} - {*(after.thresholds or {})}
    if lost:
        yield f"has no threshold for coverage {shorten_list([*map(str, sorted(lost))])}; requests with it are refused"
    if after.cpu_kernels != before.cpu_kernels:
        yield (
            f"was trained with cpu_kernels {after.cpu_kernels}, and is used with {before.cpu_kernels}; the last bits "
            "differ until the server is started again"
        )


def _print(message: str) -> None:
    """Print a line to stdout, as the log of requests: stderr is discarded while a TIFF file is decoded."""
    print(escape_control_chars(message), flush=True)
