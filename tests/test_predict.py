import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipeline.artifacts import replace_folder
from pipeline.model import build, save_config, save_weights
from pipeline.predict import main, predict
from tests.conftest import coloured_images
from tests.test_model import config


@pytest.fixture
def model(workspace: Path) -> Path:
    """A LeNet whose last layer always favours "b"."""
    chosen = config(classes=3, class_names=("a", "b", "c"))
    classifier = build(chosen)
    with torch.no_grad():
        classifier.network[11].bias.copy_(torch.tensor([0.0, 5.0, 1.0]))  # type: ignore[index]
    with replace_folder(workspace / "artifacts" / "train") as folder:
        save_weights(classifier, folder / "best.safetensors")
        save_config(chosen, folder)
    Image.fromarray(coloured_images(1, size=50)[0][0]).save(workspace / "photo.png")
    return workspace / "artifacts" / "train"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["predict", *arguments])
    main()


def test_probabilities_are_sorted_and_sum_to_one(model: Path) -> None:
    (result,) = predict([Path("photo.png")], folder=model)
    assert list(result) == ["b", "c", "a"]
    assert sum(result.values()) == pytest.approx(1)


def test_it_prints_a_line_for_each_image(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "photo.png", "photo.png", "--top", "2")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("photo.png: b 9")
    assert ", c " in lines[0]
    assert " a " not in lines[0]


def test_json_has_all_classes(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "photo.png", "--json")
    assert set(json.loads(capsys.readouterr().out)["probabilities"]) == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["gone.png"], "error: gone.png: no such file"),
        (["artifacts"], "error: artifacts: a folder; name image files"),
        (["params.yaml"], "error: params.yaml: not readable as an image"),
        (["photo.png", "--model", "elsewhere"], "error: elsewhere/model.json: no such file"),
        (["photo.png", "--top", "0"], "error: --top is 0; allowed: 1 or more"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *arguments)
    stderr = capsys.readouterr().err
    assert stderr.startswith(told)
    assert len(stderr.splitlines()) == 1
