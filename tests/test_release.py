"""A release has one version everywhere, and hosted CI runs only code that is pinned by its hash."""

import re
import tomllib
from typing import Any

from pipeline.core.yaml import read_yaml
from tests.conftest import PROJECT

PYPROJECT: dict[str, Any] = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
WORKFLOW = PROJECT / ".github" / "workflows" / "check.yml"


def test_pyproject_citation_and_changelog_name_the_same_version() -> None:
    changelog = (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")
    unreleased, newest, *_ = re.findall(r"^## \[(.+?)\]", changelog, re.MULTILINE)
    assert unreleased == "Unreleased"
    assert newest == PYPROJECT["project"]["version"] == read_yaml(PROJECT / "CITATION.cff")["version"]


def test_each_action_of_the_workflow_is_pinned_by_a_commit() -> None:
    actions = re.findall(r"uses: (.+)", WORKFLOW.read_text(encoding="utf-8"))
    assert actions
    assert not [action for action in actions if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+", action)]


def test_the_workflow_checks_the_oldest_python_that_is_allowed() -> None:
    pythons = read_yaml(WORKFLOW)["jobs"]["check"]["strategy"]["matrix"]["python"]
    assert PYPROJECT["project"]["requires-python"] == f">={pythons[0]}"
