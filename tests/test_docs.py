"""The documents name tests that exist, and their links lead to files and headings that exist."""

import re

import pytest

from tests.conftest import PROJECT

DOCUMENTS = [
    str(path.relative_to(PROJECT)) for path in (*sorted(PROJECT.glob("*.md")), *sorted(PROJECT.glob("docs/*.md")))
]
TESTS = "\n".join(path.read_text(encoding="utf-8") for path in (PROJECT / "tests").rglob("*.py"))


def anchors(document: str) -> set[str]:
    """Return the anchors of the headings in a document, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_to_files_and_headings_that_exist(name: str) -> None:
    document = PROJECT / name
    links = re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", document.read_text(encoding="utf-8"))
    for path, anchor in [link for link in links if "://" not in link[0]]:
        target = document.parent / path if path else document
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{path}#{anchor}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_tests_that_a_document_names_exist(name: str) -> None:
    text = (PROJECT / name).read_text(encoding="utf-8")
    for file in set(re.findall(r"test_\w+\.py", text)):
        assert list((PROJECT / "tests").rglob(file)), file
    for test, more in set(re.findall(r"`(test_\w+?)(_?…)?`", text)):
        assert re.search(rf"def {test}{'' if more else '[(]'}", TESTS), test
