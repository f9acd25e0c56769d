"""Damaged arrays and model files are read or refused in one line; none raises another exception."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.artifacts import file_md5, read_array, verify, write_checksums
from pipeline.core.errors import UserError
from pipeline.models.build import build
from pipeline.models.config import ModelConfig
from pipeline.models.files import load_model, save_config, save_weights
from pipeline.models.pretrained import load_pretrained
from tests.damage import CHANGES, UNUSUAL_VALUES, Change, damaged, examples, refused


def npy_bytes(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


ARRAY = npy_bytes(np.zeros((4, 8, 8, 3), np.uint8))


@examples(500)
@given(changes=CHANGES)
def test_a_damaged_array_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, changes: list[Change]) -> None:
    path = tmp_path_factory.getbasetemp() / "images.npy"
    path.write_bytes(damaged(ARRAY, changes, head=128))

    def check() -> None:
        array = read_array(path, dtype=np.uint8, dimensions=4)
        assert array.ndim == 4
        assert array.astype(int).sum() >= 0

    refused(check)


CONFIG = ModelConfig(
    model="lenet", weights=None, loss="mse", class_names=("cat", "dog"), image_size=16, input_size=None,
    channels=1, resize="crop", mean=(0.5,), std=(0.2,),
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_config(CONFIG, folder)
    save_weights(build(CONFIG), folder / "best.safetensors")
    write_checksums(folder)
    return folder


@examples(40)
@given(changes=CHANGES, head=st.sampled_from([None, 900]))
def test_damaged_weights_are_read_unchanged_or_refused(model: Path, changes: list[Change], head: int | None) -> None:
    path = model / "best.safetensors"
    content = path.read_bytes()
    expected = load_model(model)[0].state_dict()
    path.write_bytes(damaged(content, changes, head=head))

    def check() -> None:
        verify(model, allow_unlisted=True)
        found = load_model(model)[0].state_dict()
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())

    try:
        refused(check)
    finally:
        path.write_bytes(content)


@examples(40)
@given(field=st.sampled_from(sorted(ModelConfig.model_fields)), value=UNUSUAL_VALUES)
def test_a_model_json_with_any_value_is_read_or_refused(model: Path, field: str, value: Any) -> None:
    path = model / "odd" / "model.json"
    path.parent.mkdir(exist_ok=True)
    (path.parent / "best.safetensors").write_bytes((model / "best.safetensors").read_bytes())
    text = CONFIG.model_dump(mode="json") | {field: value}
    path.write_text(json.dumps(text), encoding="utf-8")
    refused(lambda: load_model(path.parent))


@pytest.fixture(scope="module")
def weights_files(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, bytes]]:
    state, new, old = build(CONFIG).state_dict(), io.BytesIO(), io.BytesIO()
    torch.save(state, new)
    torch.save(state, old, _use_new_zipfile_serialization=False)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_weights(build(CONFIG), path)
    return [("w.pth", new.getvalue()), ("w.pth", old.getvalue()), ("w.safetensors", path.read_bytes())]


@examples(100)
@given(which=st.integers(0, 2), changes=CHANGES, head=st.sampled_from([None, 1500]))
def test_a_damaged_file_of_pretrained_weights_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    weights_files: list[tuple[str, bytes]],
    which: int,
    changes: list[Change],
    head: int | None,
) -> None:
    name, content = weights_files[which]
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(damaged(content, changes, head=head))
    config = CONFIG.model_copy(update={"weights": str(path)})
    refused(lambda: load_pretrained(build(CONFIG), config=config, md5=file_md5(path)))
    with pytest.raises(UserError, match="weights_md5"):
        load_pretrained(build(CONFIG), config=config, md5="0" * 32)
