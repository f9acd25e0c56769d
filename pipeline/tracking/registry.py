"""Register evaluated models in MLflow's model registry, and read and set aliases and tags there; `connect` comes first.

A registered model stands for a data set. Each of its versions is a model as it was evaluated on one test split: the
identity of a version is the MD5 of the weights and the MD5 of the test split (`predictions.split_md5`). Raises, as all
of the package, TemporaryError where a server fails, UserError where a file or a database does.

Limits of MLflow 3: a name has at most 256 characters, an alias 255 of letters, digits, `_` and `-`, the key of a tag
250. The value of a version's tag may have 100,000 characters, that of a registered model's tag only 5,000: MLflow
itself allows more there, but the column of its database does not, and PostgreSQL and MySQL refuse a longer value.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from pipeline.artifacts import bytes_md5
from pipeline.core.errors import UserError
from pipeline.tracking.models import find_model
from pipeline.tracking.provenance import HIDDEN
from pipeline.tracking.provenance_file import exclusive
from pipeline.tracking.store import store_errors

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"  # aliases
# tags of a version that people read; all others get the prefix that hides them on most of MLflow's pages
ACCURACY, TITLE, DECISION = "accuracy", "title", "decision"
VISIBLE_TAGS = (ACCURACY, TITLE, DECISION, "keep")
MODEL_MD5, TEST_MD5 = "model.md5", "test.md5"  # tags with the identity of a version
# tag of a version: all that is registered with it and people need not read, as JSON; the list of versions in MLflow's
# pages shows each hidden tag too, so there is one
RECORD = f"{HIDDEN}record"
DATA_SET = f"{HIDDEN}data_set"  # tag of the registered models that this project fills: the name of the experiment
MAX_NAME_LENGTH = 200
MAX_TAG_LENGTH = 5_000  # of a registered model
PAGE_SIZE = 1_000
_MISSING, _EXISTS = "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"


@dataclass(frozen=True)
class Version:
    """A version of a registered model.

    `number` is MLflow's number of the version, in decimal. `model_md5` is the MD5 of the weights file, `test_md5` the
    identity of the test split on which the model was evaluated. `tags` have the names that they were set by, without
    the prefix that hides them. `created` is in milliseconds since 1970.
    """

    name: str
    number: str
    run_id: str | None
    model_md5: str
    test_md5: str
    tags: Mapping[str, str]
    aliases: tuple[str, ...]
    created: int

    @property
    def uri(self) -> str:
        """Return the address of the model in MLflow, as in `models:/digits/3`."""
        return f"models:/{self.name}/{self.number}"


def registered_name(experiment: str) -> str:
    """Return the name of the registered model for the data set of an experiment: the same name, where that is possible.

    MLflow allows neither `/` nor `:` in it, and reads `@`, `?`, `%` and quotation marks otherwise in an address or a
    search. A name with such characters, or that is too long, gets a hyphen for each of them and the first digits of its
    MD5 at the end, so that no two experiments share a registered model.
    """
    name = re.sub(r"[^\w ().,+-]", "-", experiment)[:MAX_NAME_LENGTH].strip(" .") or "-"
    return name if name == experiment else f"{name}-{bytes_md5(experiment.encode())[:6]}"


def find_names() -> list[str]:
    """Return the names of the registered models that this project fills, sorted."""
    with store_errors():
        return sorted(model.name for model in _models(f"tags.`{DATA_SET}` LIKE '%'"))


def register_version(*, name: str, run_id: str, model_md5: str, test_md5: str, tags: Mapping[str, str]) -> Version:
    """Register the model of a run, unless a version of this identity exists; return that version.

    An existing version keeps its tags. Processes of this project register one after the other. Of two that register the
    same model through a server at the same time, the one with the higher number removes its version again. Raises
    UserError where the run has no model.
    """
    hidden = {key: value for key, value in tags.items() if key not in VISIBLE_TAGS}
    record = json.dumps({MODEL_MD5: model_md5, TEST_MD5: test_md5, **hidden}, ensure_ascii=False)
    wanted = {**{key: value for key, value in tags.items() if key in VISIBLE_TAGS}, RECORD: record}
    with store_errors(), exclusive():
        _ensure_model(name)
        found = _find_version(name, model_md5=model_md5, test_md5=test_md5)
        if found is None:
            number = _create_version(name, run_id=run_id, tags=wanted)
            found = _find_version(name, model_md5=model_md5, test_md5=test_md5)
            assert found
            if found.number != number:
                MlflowClient().delete_model_version(name, number)
    return found


def _ensure_model(name: str) -> None:
    """Create the registered model, unless it exists, and mark it as one that this project fills."""
    client = MlflowClient()
    model = _find_model(name)
    if model is None:
        try:
            client.create_registered_model(name, tags={DATA_SET: name})
        except MlflowException as error:  # another process has just created it
            if error.error_code != _EXISTS:
                raise
    elif DATA_SET not in model.tags:  # a user has made it
        client.set_registered_model_tag(name, DATA_SET, name)


def _create_version(name: str, *, run_id: str, tags: Mapping[str, str]) -> str:
    """Create a version of the model that the run has recorded; return its number."""
    model_id = find_model(run_id)
    if model_id is None:
        raise UserError(
            f"MLflow run {run_id}: found no complete model to register; `dvc repro --force evaluate` records it"
        )
    made = MlflowClient().create_model_version(
        name,
        f"models:/{model_id}",
        run_id,
        tags=dict(tags),
        await_creation_for=0,
        model_id=model_id,
    )
    return str(made.version)


def _find_version(name: str, *, model_md5: str, test_md5: str) -> Version | None:
    """Return the version of this identity, the oldest if there are several, or None."""
    return next((one for one in reversed(versions_of_model(name, model_md5)) if one.test_md5 == test_md5), None)


def find_versions(name: str) -> list[Version]:
    """Return the versions of a registered model that have an identity, newest first; empty where there is no model."""
    with store_errors():
        model = _find_model(name)
        if model is None:
            return []
        found, token = list[ModelVersion](), None
        while True:
            page = MlflowClient().search_model_versions(f"name = '{name}'", max_results=PAGE_SIZE, page_token=token)
            found += page
            token = page.token
            if not token:
                break
    versions = [_as_version(one, aliases=model.aliases) for one in found if RECORD in one.tags]
    return sorted(versions, key=lambda one: int(one.number), reverse=True)


def versions_of_model(name: str, model_md5: str) -> list[Version]:
    """Return the versions with these weights, each of another test split, newest first."""
    return [one for one in find_versions(name) if one.model_md5 == model_md5]


def version_of_alias(name: str, alias: str) -> Version | None:
    """Return the version that has the alias, or None."""
    return next((one for one in find_versions(name) if alias in one.aliases), None)


def number_of_alias(name: str, alias: str) -> str | None:
    """Return the number of the version that has the alias, or None; quicker than `version_of_alias`."""
    with store_errors():
        model = _find_model(name)
    number = model.aliases.get(alias) if model else None
    return None if number is None else str(number)


def set_alias(name: str, alias: str, number: str) -> None:
    """Give the alias to the version of this number, also where another version has it."""
    with _known(f"{name} version {number}"):
        MlflowClient().set_registered_model_alias(name, alias, number)


def remove_alias(name: str, alias: str) -> None:
    """Remove the alias, if a version has it."""
    with store_errors():
        model = _find_model(name)
        if model and alias in model.aliases:
            MlflowClient().delete_registered_model_alias(name, alias)


def read_tags(name: str) -> dict[str, str]:
    """Return the tags of a registered model, under the names that they were set by; empty where there is no model."""
    with store_errors():
        model = _find_model(name)
    return _unprefixed(model.tags) if model else {}


def set_tag(name: str, key: str, value: str) -> None:
    """Set a tag of a registered model; raises UserError where its value has more than MAX_TAG_LENGTH characters."""
    if len(value) > MAX_TAG_LENGTH:
        raise UserError(
            f"tag {key} of MLflow's registered model {name}: found {len(value):,} characters; allowed: "
            f"{MAX_TAG_LENGTH:,}; shorten it"
        )
    with _known(name):
        MlflowClient().set_registered_model_tag(name, _tag_name(key), value)


def remove_tag(name: str, key: str) -> None:
    """Remove a tag of a registered model, if it has the tag."""
    with store_errors():
        model = _find_model(name)
        if model and _tag_name(key) in model.tags:
            MlflowClient().delete_registered_model_tag(name, _tag_name(key))


def set_version_tags(name: str, number: str, tags: Mapping[str, str]) -> None:
    """Set tags of a version, shown in MLflow's list of versions; the version's own page shows only VISIBLE_TAGS."""
    with _known(f"{name} version {number}"):
        for key, value in tags.items():
            MlflowClient().set_model_version_tag(name, number, _tag_name(key), value)


@contextmanager
def _known(what: str) -> Iterator[None]:
    """Raise UserError where MLflow does not have what the block names, other failures as `store_errors`."""
    with store_errors():
        try:
            yield
        except MlflowException as error:
            if error.error_code != _MISSING:
                raise
            raise UserError(
                f"MLflow's model registry: found no {what}; name one that MLflow's page Models lists"
            ) from None


def _tag_name(key: str) -> str:
    """Return the name of a tag in MLflow: with the prefix that hides it, unless people read it."""
    return key if key in VISIBLE_TAGS else f"{HIDDEN}{key}"


def _unprefixed(tags: Mapping[str, str]) -> dict[str, str]:
    return {key.removeprefix(HIDDEN): value for key, value in tags.items()}


def _find_model(name: str) -> RegisteredModel | None:
    return next(_models(f"name = '{name}'"), None)


def _models(condition: str) -> Iterator[RegisteredModel]:
    """Yield the registered models that meet a condition."""
    token = None
    while True:
        page = MlflowClient().search_registered_models(condition, max_results=PAGE_SIZE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _as_version(one: ModelVersion, *, aliases: Mapping[str, Any]) -> Version:
    """Return the project's record of a version; `aliases` are those of the registered model, with their versions.

    Raises UserError where the tag with the record is damaged.
    """
    others = {key: value for key, value in one.tags.items() if key != RECORD}
    number = str(one.version)
    try:
        tags = {**json.loads(one.tags[RECORD]), **_unprefixed(others)}
        model_md5, test_md5 = tags[MODEL_MD5], tags[TEST_MD5]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"MLflow model {one.name} version {number}: its tag {RECORD} is damaged ({error}); delete the version, "
            "then `dvc repro --force evaluate` registers the model again"
        ) from None
    own = sorted(alias for alias, of in aliases.items() if str(of) == number)
    return Version(
        one.name,
        number,
        one.run_id or None,
        model_md5,
        test_md5,
        tags,
        tuple(own),
        one.creation_timestamp,
    )
