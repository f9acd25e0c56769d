"""Write the HTML page of a comparison."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flows.candidates import Group, Model
from flows.comparison import Comparison
from flows.lineage import Sources
from flows.stored_models import describe_code
from flows.ui import mlflow_page
from pipeline.artifacts import NORMALIZE, read_array, write_text
from pipeline.core.errors import UserError
from pipeline.reporting.comparison import ComparedModel, ComparisonPage, Fact, TestImages, render
from pipeline.tracking.search import find_run

TEST_IMAGES = str(NORMALIZE / "test_images.npy")
COMMAND = ".venv/bin/python -m flows.compare"


def write_page(sources: Sources, comparison: Comparison, *, names: Sequence[str], path: Path) -> Path:
    """Write the page of a comparison of `names`, the texts on the command line; return its path."""
    labels = [group.label for group in comparison.groups]
    page = ComparisonPage(
        title=f"{labels[0]} compared with {' and '.join(labels[1:])}",
        models=[
            _compared(sources, group, best=model)
            for group, model in zip(comparison.groups, comparison.models, strict=True)
        ],
        against=comparison.against,
        dataset=comparison.dataset,
        parameters=comparison.parameters,
        code=comparison.code,
        data=comparison.data,
        test_images=_test_images(comparison.models[0]),
        commands=[("compare them again", shlex.join([*COMMAND.split(), *names]))],
        output=path,
    )
    write_text(path, render(page))
    return path


def _compared(sources: Sources, group: Group, *, best: Model) -> ComparedModel:
    """Return what the page states about a model, or about the recipe of several seeds."""
    facts = [Fact("MLflow run", group.run_id, _link(sources, group.run_id))]
    if group.is_recipe:
        facts.append(Fact("best seed on validation", best.label))
    facts += [
        Fact("DVC experiment", best.experiment),
        Fact("code", describe_code(best)),
        Fact("model MD5", best.model_md5),
        Fact("test split MD5", best.test_md5),
    ]
    commands = []
    if best.experiment:
        commands.append(("use this model in the checkout", f".venv/bin/dvc exp apply {shlex.quote(best.experiment)}"))
    if best.run_id:
        commands.append(("train it again, with the same bits", f".venv/bin/python -m flows.reproduce {best.run_id}"))
    return ComparedModel(group.label, facts, commands, group.seeds)


def _link(sources: Sources, run_id: str | None) -> str:
    """Return the address of the page of an MLflow run, or an empty text."""
    run = find_run(run_id) if run_id and sources.has_mlflow else None
    return mlflow_page(run.run_id, experiment_id=run.experiment_id, project=sources.project) if run else ""


def _test_images(model: Model) -> TestImages | None:
    """Return the pixels of the model's test images, or None where DVC's cache lacks them."""
    path = model.files.get(TEST_IMAGES)
    if path is None or not path.is_file():
        return None
    try:
        return TestImages(read_array(path, dtype=np.uint8, dimensions=4), model.predictions.content_hashes)
    except UserError:  # a damaged file
        return None
