"""CONTRIBUTING.md names files that exist, and as many as its headings promise."""

import re

import pytest

from tests.conftest import PROJECT

TEXT = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CHANGES = {text.partition(":")[0]: text for text in TEXT.split("\n## ") if text.startswith("Add ")}
MAX_FILES = {
    "Add a network of your own": 3,
    "Add a data source": 6,
    "Add a metric of the test split": 2,
    "Add a metric by epoch": 3,
    "Add a stage": 7,
}


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:\w+/)+\w+\.\w+|\w+\.yaml)`", TEXT))))
def test_every_file_that_the_document_names_exists(path: str) -> None:
    assert (PROJECT / path).exists() or path.startswith("artifacts/")


@pytest.mark.parametrize("change", MAX_FILES)
def test_a_section_lists_as_many_files_as_its_heading_states_and_no_more_than_allowed(change: str) -> None:
    [promised] = re.findall(r"(\d+) files\n", CHANGES[change])
    assert int(promised) <= MAX_FILES[change]
    assert len(re.findall(r"^\d\. `", CHANGES[change], re.MULTILINE)) == int(promised)
