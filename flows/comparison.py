"""Compare the first of several models or recipes with each of the others; nothing is printed or recorded here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from flows.candidates import Group, Model, best_model, candidate
from flows.lineage import as_number
from flows.stored_models import DATASET, SEED, SHORT_ID, file_of, seeds_command
from pipeline.artifacts import NORMALIZE, read_json
from pipeline.comparison.models import Verdict, compare_models
from pipeline.comparison.pairing import pair
from pipeline.comparison.recipes import compare_recipes
from pipeline.core.errors import UserError
from pipeline.reporting.comparison import Against, Differing
from pipeline.reporting.data import Row

Question = Literal["model", "recipe"]
EXIT_BETTER, EXIT_NOT_SHOWN, EXIT_WORSE = 0, 3, 4
SEEDS_TO_TRAIN = 5
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Comparison:
    """The comparison of the first of `groups` with each of the others: `against` has the answers in their order.

    `models` has the one model of each group that the question about models is about. `question` decides the exit
    status. Each test has `level` divided by the number of others (Bonferroni), so that `level` holds for all together.
    `parameters`, `code` and `data` are what differs, None if unknown. `dataset` is `dataset.json` of the first model.
    """

    groups: tuple[Group, ...]
    models: tuple[Model, ...]
    against: tuple[Against, ...]
    question: Question
    level: float
    parameters: Sequence[Differing] | None
    code: Sequence[Differing] | None
    data: Sequence[Differing] | None
    dataset: Row

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """Return the answers of the deciding question about the first group and each of the others."""
        answers = [each.recipe if self.question == "recipe" else each.model for each in self.against]
        return tuple(answer.verdict for answer in answers if answer)

    @property
    def exit_status(self) -> int:
        """Return 0 if the first is better than all others, 4 if it is worse than one, else 3."""
        if "worse" in self.verdicts:
            return EXIT_WORSE
        return EXIT_BETTER if set(self.verdicts) == {"better"} else EXIT_NOT_SHOWN

    @property
    def is_one_recipe(self) -> bool:
        """Return whether the parameters, code and data of all are known, and at most the seed differs."""
        if self.parameters is None or self.code is None or self.data is None:
            return False
        return {each.what for each in self.parameters} <= {SEED} and not self.code and not self.data


def compare(groups: Sequence[Group], *, level: float, question: Question | None = None) -> Comparison:
    """Compare the first group with each of the others.

    `question` is by default the one about recipes if all have two seeds or more, else the one about models. Raises
    UserError where the models know different classes, no image is left, a file is missing, or the question about
    recipes is asked of a single seed.
    """
    single = next((group for group in groups if len(group.models) < 2), None)
    if single and question == "recipe":
        raise UserError(f"--question recipe: {_too_few(single)}")
    models = tuple(map(best_model, groups))
    own_level = level / (len(groups) - 1)
    return Comparison(
        groups=tuple(groups),
        models=models,
        against=tuple(
            _against(groups[0], other, models=(models[0], model), level=own_level)
            for other, model in zip(groups[1:], models[1:], strict=True)
        ),
        question=question or ("model" if single else "recipe"),
        level=level,
        parameters=_differing_parameters(groups),
        code=_differing_code(groups),
        data=_differing_data(groups),
        dataset=read_json(file_of(models[0], DATASET)),
    )


def _too_few(group: Group) -> str:
    """Return why the question about recipes is not answered for a group of a single model, and what to do."""
    command = seeds_command(group.models[0], number=SEEDS_TO_TRAIN)
    return (
        f"found one seed of {group.label}, which does not show how much the seed matters; allowed: two or more of each "
        f"recipe; `{command}` trains {SEEDS_TO_TRAIN}, whose run can be named here"
    )


def _against(a: Group, b: Group, *, models: tuple[Model, Model], level: float) -> Against:
    """Return the answers about A and one other group; the question about recipes has a reason if it has no answer."""
    model = compare_models(pair(*map(candidate, models)), level=level)
    few = next((group for group in (a, b) if len(group.models) < 2), None)
    if few:
        return Against(model, None, recipe_reason=_too_few(few))
    pairing = pair(*map(candidate, (*a.models, *b.models)))
    correct = np.array([each.is_correct for each in pairing.models])
    recipe = compare_recipes(correct[: len(a.models)], correct[len(a.models) :], level=level)
    return Against(model, recipe)


def _differing_parameters(groups: Sequence[Group]) -> list[Differing] | None:
    """Return the parameters that differ; None where those of a model are unknown."""
    if not all(model.params for group in groups for model in group.models):
        return None
    return _differing(groups, lambda model: model.params)


def _differing_code(groups: Sequence[Group]) -> list[Differing] | None:
    """Return the files and folders of code that differ, by MD5; None where those of a model are unknown.

    The commit does not count: most commits change nothing that a stage depends on.
    """
    if not all(model.stage_code for group in groups for model in group.models):
        return None
    return _differing(groups, lambda model: {path: md5[:SHORT_ID] for path, md5 in model.stage_code.items()})


def _differing_data(groups: Sequence[Group]) -> list[Differing] | None:
    """Return the kinds of data that differ, by MD5; None where those of a model are unknown."""
    paths = {
        f"{split} {kind}": str(NORMALIZE / f"{split}_{kind}.npy") for split in SPLITS for kind in ("images", "labels")
    }
    if not all(path in model.files for group in groups for model in group.models for path in paths.values()):
        return None
    return _differing(groups, lambda model: {name: _hash(model, path) for name, path in paths.items()})


def _hash(model: Model, path: str) -> str:
    """Return the first digits of the MD5 of a file in DVC's cache, which is its path there."""
    found = model.files[path]
    return f"{found.parent.name}{found.name}"[:SHORT_ID]


def _differing(groups: Sequence[Group], values_of: Callable[[Model], Mapping[str, str]]) -> list[Differing]:
    """Return the values that are not the same in all groups; several of one group are separated by commas."""
    values = [[values_of(model) for model in group.models] for group in groups]
    rows = []
    for name in sorted({name for group in values for one in group for name in one}):
        of_groups = [list(dict.fromkeys(one.get(name) for one in group)) for group in values]
        if len({tuple(map(as_number, found)) for found in of_groups}) > 1:
            rows.append(Differing(name, [_joined(found) for found in of_groups]))
    return rows


def _joined(values: Sequence[str | None]) -> str | None:
    known = [value for value in values if value is not None]
    return ", ".join(known) if known else None
