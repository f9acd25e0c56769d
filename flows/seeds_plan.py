"""What a flow run over several seeds trains: the parameters of each seed, with one state of the checkout."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flows import PROJECT
from flows.flow_run import compose_run
from flows.git import Snapshot, take_snapshot
from flows.seed_values import SEED_PARAM, seeds_from, seeds_title
from pipeline.artifacts import bytes_md5
from pipeline.core.git import git
from pipeline.tracking.run_title import FOLDER_PARAM


@dataclass(frozen=True)
class Plan:
    """What a parent trains: the parameters of each seed, and the files of the checkout."""

    recipe: str
    title: str
    overrides: Mapping[str, Any]
    params: Mapping[int, Mapping[str, Any]]
    snapshot: Snapshot

    @property
    def seeds(self) -> list[int]:
        """Return the seeds in ascending order."""
        return list(self.params)

    @property
    def md5(self) -> str:
        """Return the hash of what decides the results: recipe, parameters, seeds, commit and tracked files."""
        tree = git(PROJECT, "rev-parse", f"{self.snapshot.commit}^{{tree}}")
        parts = [self.recipe, self.params, self.snapshot.head, tree]
        return bytes_md5(json.dumps(parts, default=str).encode())

    @property
    def command(self) -> str:
        """Return the command of this run."""
        values = {name: one for name, one in self.overrides.items() if name != FOLDER_PARAM}
        parts = ["make run", f"RECIPE={self.recipe}", f"SEEDS={len(self.params)}"]
        if folder := self.overrides.get(FOLDER_PARAM):
            parts.append(f'IMAGES="{folder}"')
        return " ".join([*parts, *([f'SET="{_as_settings(values)}"'] if values else [])])


def _as_settings(values: Mapping[str, Any]) -> str:
    """Return overrides as the value of SET."""
    return " ".join(f"{name}={one if isinstance(one, str) else json.dumps(one)}" for name, one in values.items())


def make_plan(recipe: str, overrides: Mapping[str, Any], *, seeds: int) -> Plan:
    """Return the plan for this many seeds, from train.seed on; raises UserError where a value is not allowed."""
    first, setup = compose_run(recipe, overrides)
    numbers = seeds_from(first["train"]["seed"], seeds)
    params = {seed: compose_run(recipe, {**overrides, SEED_PARAM: seed})[0] for seed in numbers}
    snapshot = Snapshot(take_snapshot(PROJECT), git(PROJECT, "rev-parse", "HEAD"))
    return Plan(recipe, seeds_title(setup, numbers), dict(overrides), params, snapshot)
