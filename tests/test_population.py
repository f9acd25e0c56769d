"""`benchmarks.population` trains what is missing, and keeps the probabilities of each model."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import population
from benchmarks.gpu.images import make_arrays
from benchmarks.gpu.part import Setting
from pipeline.core.errors import UserError


def train_models(monkeypatch: pytest.MonkeyPatch, arrays: Path, out: Path, *, seeds: int) -> int:
    """Run the command with tiny networks on tiny arrays; return its exit status."""
    options = f"digits --seeds {seeds} --out {out} --arrays {arrays} --threads 1"
    changes = ("train.epochs=1", "train.batch_size=4", "train.device=cpu")
    monkeypatch.setattr(sys, "argv", ["population", *options.split(), *(f"--set={change}" for change in changes)])
    return population.main()


@pytest.mark.slow
def test_a_second_call_trains_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    make_arrays(None, Setting(arrays=tmp_path / "arrays", dry=True))
    assert train_models(monkeypatch, tmp_path / "arrays", tmp_path / "out", seeds=1) == 0
    first = (tmp_path / "out" / "digits-0.npz").read_bytes()
    capfd.readouterr()
    assert train_models(monkeypatch, tmp_path / "arrays", tmp_path / "out", seeds=2) == 0
    assert (tmp_path / "out" / "digits-0.npz").read_bytes() == first
    assert "digits-0:" not in (printed := capfd.readouterr().out)
    assert "digits-1:" in printed
    with np.load(tmp_path / "out" / "digits-1.npz") as kept, np.load(tmp_path / "out" / "labels.npz") as labels:
        predicted = kept["test_probabilities"].argmax(1)
        assert math.isclose(kept["accuracy"], (predicted == labels["test_labels"]).mean())


def test_models_of_other_images_are_not_mixed(tmp_path: Path) -> None:
    make_arrays(None, Setting(arrays=tmp_path / "arrays", dry=True))
    population.save_labels(tmp_path / "arrays", tmp_path)
    labels = tmp_path / "arrays" / "test_labels.npy"
    np.save(labels, 1 - np.clip(np.load(labels), 0, 1))
    with pytest.raises(UserError, match="labels are of other images"):
        population.save_labels(tmp_path / "arrays", tmp_path)
