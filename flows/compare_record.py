"""Record a comparison in MLflow: figures, verdict, page, and links to the compared runs."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from flows.candidates import Group
from flows.compare_text import outcome
from flows.comparison import Comparison
from flows.ui import mlflow_page
from pipeline.comparison.models import ModelComparison
from pipeline.comparison.recipes import RecipeComparison
from pipeline.reporting.comparison import Against
from pipeline.reporting.verdict import model_verdict, recipe_verdict
from pipeline.tracking.comparisons import PAGE, record_comparison
from pipeline.tracking.description import escape_markdown
from pipeline.tracking.links import run_page
from pipeline.tracking.search import find_run

VERDICTS = {0: "better", 3: "not shown", 4: "worse"}  # by exit status: the tag of the run, of A
FIGURES = ("accuracy", "macro_f1", "loss", "calibration_error")


def record(project: Path, comparison: Comparison, *, page: Path) -> str:
    """Record the comparison as an MLflow run in the experiment of the first model's data set; return its page.

    Raises UserError or TemporaryError where the store cannot be reached.
    """
    labels = [group.label for group in comparison.groups]
    run_id, experiment_id = record_comparison(
        project,
        experiment=comparison.models[0].data_set,
        name=f"compare {labels[0]} with {' and '.join(labels[1:])}",
        verdict=VERDICTS[comparison.exit_status],
        description=describe(comparison),
        metrics=as_metrics(comparison),
        json_text=json.dumps(as_values(comparison), indent=2, ensure_ascii=False) + "\n",
        page=page,
    )
    return mlflow_page(run_id, experiment_id=experiment_id, artifact=PAGE, project=project)


def describe(comparison: Comparison) -> str:
    """Return the description of the MLflow run, as Markdown: the answers, and what the letters stand for."""
    names = [f"- {letter}: {_linked(group)}" for letter, group in zip(ascii_uppercase, comparison.groups, strict=False)]
    answers = []
    for letter, against in zip(ascii_uppercase[1:], comparison.against, strict=False):
        answers.append(escape_markdown(str(model_verdict(against.model, a="A", b=letter))))
        if against.recipe:
            answers.append(escape_markdown(str(recipe_verdict(against.recipe, a="A", b=letter))))
    return "\n\n".join([*answers, "\n".join(names), escape_markdown(outcome(comparison))])


def _linked(group: Group) -> str:
    """Return the name of what is compared, with a link to its MLflow run."""
    label = escape_markdown(group.label)
    run = find_run(group.run_id) if group.run_id else None
    return f"[{label}]({run_page(run.run_id, experiment_id=run.experiment_id)})" if run else label


def as_metrics(comparison: Comparison) -> dict[str, float]:
    """Return the figures as MLflow's metrics, such as `a_minus_b_accuracy` and the ends of its interval."""
    metrics: dict[str, float] = {}
    for letter, against in zip(ascii_uppercase[1:].lower(), comparison.against, strict=False):
        found = against.model
        for name in FIGURES:
            difference = getattr(found, name)
            metrics |= {f"a_{name}": difference.a, f"{letter}_{name}": difference.b}
            metrics |= _ends(f"a_minus_{letter}_{name}", difference)
        metrics |= {f"a_only_right_against_{letter}": found.only_a, f"{letter}_only_right": found.only_b}
        metrics |= {f"p_value_against_{letter}": found.p_value, f"images_with_{letter}": len(found.pairing)}
        if against.recipe:
            metrics |= _ends(f"a_minus_{letter}_mean_accuracy_of_seeds", against.recipe.accuracy)
    return {name: float(value) for name, value in metrics.items()}


def _ends(name: str, difference: Any) -> dict[str, float]:
    return {name: difference.difference, f"{name}_low": difference.low, f"{name}_high": difference.high}


def as_values(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison as values for JSON."""
    return {
        "compared": [_group(group, best=model) for group, model in _pairs(comparison)],
        "question": comparison.question,
        "level": comparison.level,
        "result": VERDICTS[comparison.exit_status],
        "against": [_against(against) for against in comparison.against],
        **{
            name: None if rows is None else {row.what: list(row.values) for row in rows}
            for name, rows in (
                ("parameters", comparison.parameters),
                ("code", comparison.code),
                ("data", comparison.data),
            )
        },
    }


def _pairs(comparison: Comparison) -> Any:
    return zip(comparison.groups, comparison.models, strict=True)


def _group(group: Group, *, best: Any) -> dict[str, Any]:
    models = [
        {name: getattr(model, name) for name in ("label", "model_md5", "test_md5", "commit", "experiment", "run_id")}
        for model in group.models
    ]
    return {"label": group.label, "run_id": group.run_id, "best_on_validation": best.label, "models": models}


def _against(against: Against) -> dict[str, Any]:
    return {
        "model": _model(against.model),
        "recipe": _recipe(against.recipe) if against.recipe else None,
        "recipe_reason": against.recipe_reason,
    }


def _model(found: ModelComparison) -> Mapping[str, Any]:
    """Return the figures of the question about models, without the predictions."""
    counts = ("both", "only_a", "only_b", "neither", "p_value", "level", "detectable")
    left_out = ("same_split", "not_common", "trained_on", "leaked", "relabeled")
    return {
        "verdict": found.verdict,
        "images": len(found.pairing),
        **{name: getattr(found.pairing, name) for name in left_out},
        **{name: getattr(found, name) for name in counts},
        **{name: asdict(getattr(found, name)) for name in FIGURES},
        "classes": [asdict(each) for each in found.classes],
    }


def _recipe(found: RecipeComparison) -> Mapping[str, Any]:
    return {"verdict": found.verdict, **asdict(found)}
