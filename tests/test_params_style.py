"""`params.yaml` has the format that DVC writes, so that `dvc exp run -S` changes one line for one value."""

import difflib
import shutil
from pathlib import Path

import pytest
from dvc.utils.hydra import apply_overrides

from pipeline.core.yaml import dump_yaml
from pipeline.recipes import compose, parse_override
from tests.conftest import PROJECT

RECIPES = sorted(path.stem for path in (PROJECT / "recipes").glob("*.yaml"))
UNUSUAL_VALUES = {
    "small": "train.learning_rate=1e-5",
    "hexadecimal": "train.batch_size=0x20",
    "a list in one line": 'download.urls=["https://a.example/x.tar.gz", "https://b.example/y.tar.gz"]',
    "a long path with spaces": "download.folder=" + "/photographs of the summer" * 8,
    "a path like YAML": 'download.folder="/a: [b] #c"',
    "null": "train.gradient_clip_norm=null",
}


def changed_lines(text: str, override: str) -> list[str]:
    """Set a value by DVC in a params.yaml with this text, and return the lines that were removed or added."""
    path = Path("params.yaml")
    path.write_text(text)
    apply_overrides(path, [override])
    lines = list(difflib.ndiff(text.splitlines(), path.read_text().splitlines()))
    return [line for line in lines if line.startswith(("+", "-"))]


@pytest.fixture(autouse=True)
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to a folder with the committed parameters and recipes."""
    shutil.copy(PROJECT / "params.yaml", tmp_path)
    shutil.copytree(PROJECT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)


def test_the_committed_file_has_the_format_of_dvc() -> None:
    text = Path("params.yaml").read_text()
    assert dump_yaml(compose(None, {})) == text
    removed, added = changed_lines(text, "train.seed=2")
    assert (removed, added) == ("-   seed: 0", "+   seed: 2")


@pytest.mark.parametrize("recipe", RECIPES)
def test_setting_one_value_of_a_recipe_changes_one_line(recipe: str) -> None:
    removed, added = changed_lines(dump_yaml(compose(recipe, {})), "evaluate.top_k=4")
    assert (removed[2:].split("#")[0].strip(), added[2:].split("#")[0].strip()) == ("top_k: 5", "top_k: 4")


@pytest.mark.parametrize("override", UNUSUAL_VALUES.values(), ids=UNUSUAL_VALUES)
def test_setting_one_value_beside_an_unusual_one_changes_one_line(override: str) -> None:
    name, value = parse_override(override)
    section, _, field = name.partition(".")
    text = dump_yaml(compose(None, {name: value}))
    assert len(changed_lines(text, "train.seed=2")) == 2
    assert compose(None, {})[section][field] == value
