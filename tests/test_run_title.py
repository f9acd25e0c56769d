"""The title of a run: its recipe, and what differs from it."""

from pathlib import Path

import pytest

from pipeline.core.yaml import dump_yaml, read_yaml
from pipeline.recipes import compose, parse_overrides
from pipeline.tracking.run_title import read_setup
from tests.conftest import PROJECT


def titled(*overrides: str, recipe: str, folder: Path, known: str | None = None) -> str:
    """Return the title of a run with these parameters in a copy of the project without git."""
    folder.mkdir(exist_ok=True)
    (folder / "recipes").symlink_to(PROJECT / "recipes")
    (folder / "params.yaml").write_text(dump_yaml(compose(recipe, parse_overrides(overrides))))
    return read_setup(folder, recipe=known).title


@pytest.mark.parametrize("recipe", ["cifar10_lenet", "cifar10_tutorial", "cifar10_resnet18"])
def test_the_title_of_an_unchanged_recipe_is_its_name(recipe: str, tmp_path: Path) -> None:
    assert titled(recipe=recipe, folder=tmp_path / "a") == recipe


def test_a_title_names_what_differs_from_the_recipe(tmp_path: Path) -> None:
    values = ("train.learning_rate=0.03", "train.epochs=6", "train.nesterov=false")
    title = titled(*values, recipe="cifar10_lenet", folder=tmp_path / "a")
    assert title == "cifar10_lenet lr=0.03 nesterov=false epochs=6"


def test_a_title_counts_further_differences(tmp_path: Path) -> None:
    values = ("train.learning_rate=0.03", "train.epochs=6", "train.flip=false", "train.batch_size=8")
    title = titled(*values, "train.model=resnet18", recipe="cifar10_lenet", folder=tmp_path / "a")
    assert title.endswith(" +1 more")
    assert len(title.split()) == 7


def test_a_title_names_the_folder_of_own_images(tmp_path: Path) -> None:
    title = titled("download.folder=/somewhere/my birds", recipe="my_images", folder=tmp_path / "a")
    assert title == "my_images my birds"


def test_a_flow_run_names_its_recipe_even_where_another_one_is_nearer(tmp_path: Path) -> None:
    assert titled(recipe="digits", folder=tmp_path / "a", known="cifar10_lenet").startswith("cifar10_lenet ")


def test_differences_from_the_committed_parameters_are_found_by_git() -> None:
    committed = read_yaml(PROJECT / "params.yaml")
    setup = read_setup(PROJECT)
    assert setup.recipe == "digits"
    assert all(committed[name.split(".")[0]][name.split(".")[1]] == new for name, (_, new) in setup.differences.items())
