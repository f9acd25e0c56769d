"""Write the figures of docs/results.json into README.md, the heads of the recipes and docs/results.md.

`python -m benchmarks.published` does so; `python -m benchmarks.results --write` measures the figures.
"""

import re
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.picture import accuracy_picture
from benchmarks.setting import PROJECT
from benchmarks.table import mean_and_deviation, table
from pipeline.artifacts import read_json, write_bytes, write_json, write_text
from pipeline.core.errors import report_errors
from pipeline.recipes import recipe_path

RESULTS = Path("docs/results.json")
REPORT = Path("docs/results.md")
PICTURE = Path("docs/results.png")
README = Path("README.md")
# the table of results in README.md, between two comments
TABLE = re.compile("(?<=<!-- results -->\n).*?(?=<!-- end of results -->)", re.DOTALL)
INTRODUCTION = """# Results

Test accuracy of recipes over seeds, which draw the first weights, the order and the augmentation; data and splits are
the same for all. "Training" is the step `train` with its start and its record in MLflow. `make results` trains again
and compares; `python -m benchmarks.results --write` wrote this file and `results.json`.

![Test accuracy of each seed](results.png)

"""


@dataclass(frozen=True)
class SeedResult:
    """The result of one seed: accuracies are fractions of the test images, `model_md5` is that of best.safetensors."""

    seed: int
    accuracy: float
    accuracy_without_duplicates: float
    train_seconds: float
    model_md5: str


@dataclass(frozen=True)
class RecipeResult:
    """The result of a recipe; `setting` has date, commit, hardware, versions and command by name, as text."""

    seeds: tuple[SeedResult, ...]
    test_images: int
    test_duplicates: int
    setting: Mapping[str, str]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "RecipeResult":
        """Return the result that `asdict` turned into these values."""
        return cls(**{**values, "seeds": tuple(SeedResult(**seed) for seed in values["seeds"])})

    @property
    def accuracies(self) -> list[float]:
        """Return the test accuracy of each seed."""
        return [seed.accuracy for seed in self.seeds]

    @property
    def accuracies_without_duplicates(self) -> list[float]:
        """Return the test accuracy of each seed without near-duplicates of training images; empty if there are none."""
        return [seed.accuracy_without_duplicates for seed in self.seeds] if self.test_duplicates else []

    @property
    def seconds(self) -> float:
        """Return the median training time of the seeds."""
        return statistics.median(seed.train_seconds for seed in self.seeds)

    @property
    def models(self) -> dict[int, str]:
        """Return the MD5 of the model by seed."""
        return {seed.seed: seed.model_md5 for seed in self.seeds}


Results = Mapping[str, RecipeResult]  # by the name of the recipe


def read_results(project: Path = PROJECT) -> dict[str, RecipeResult]:
    """Read docs/results.json; raise UserError where it is missing or not JSON."""
    return {recipe: RecipeResult.of(values) for recipe, values in read_json(project / RESULTS).items()}


def write_results(results: Results, path: Path) -> None:
    """Write results as JSON."""
    write_json(path, {recipe: asdict(result) for recipe, result in results.items()})


def publish(results: Results, project: Path = PROJECT) -> None:
    """Write docs/results.json, and its figures into README.md, docs/results.md and the recipes."""
    write_results(results, project / RESULTS)
    for path, text in published_texts(results, project).items():
        write_text(path, text)
    write_bytes(project / PICTURE, picture(results))


def picture(results: Results) -> bytes:
    """Return docs/results.png: the test accuracy of each seed."""
    return accuracy_picture({recipe: result.accuracies for recipe, result in results.items()})


def published_texts(results: Results, project: Path = PROJECT) -> dict[Path, str]:
    """Return by file its text with these figures; in README.md and the recipes only the lines with figures change."""
    texts = {project / REPORT: INTRODUCTION + report(results) + "\n"}
    texts[project / README] = with_rows((project / README).read_text(encoding="utf-8"), results)
    for recipe, result in results.items():
        path = project / recipe_path(recipe)
        texts[path] = with_head(path.read_text(encoding="utf-8"), result)
    return texts


def report(results: Results) -> str:
    """Return a Markdown table with a column for each recipe."""
    columns = [_column(result) for result in results.values()]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return table([["", *results], *rows])


def _column(result: RecipeResult) -> dict[str, str]:
    """Return the cells of a recipe's column by the heading of the row."""
    unique = result.accuracies_without_duplicates
    return {
        "test accuracy, mean ± sd": mean_and_deviation(result.accuracies, ".2%"),
        "… without near-duplicates": mean_and_deviation(unique, ".2%") if unique else "the same: there are none",
        "near-duplicates": f"{result.test_duplicates:,} of {result.test_images:,} test images",
        "seeds": ", ".join(str(seed.seed) for seed in result.seeds),
        "test accuracy of each": ", ".join(f"{accuracy:.2%}" for accuracy in result.accuracies),
        "training, median": f"{result.seconds:.1f} s",
        "training of each": ", ".join(f"{seed.train_seconds:.1f}" for seed in result.seeds),
        **result.setting,
    }


def in_prose(accuracies: list[float]) -> str:
    """Return mean and standard deviation as README and recipes have them, such as `72.4 % ± 0.3`."""
    return mean_and_deviation([100 * accuracy for accuracy in accuracies], ".1f").replace(" ±", " % ±")


def with_rows(readme: str, results: Results) -> str:
    """Return the text of the README in which the table row of each recipe in `results` is replaced by its results.

    A recipe without a row in the table is left out.
    """
    rows = []
    for line in TABLE.findall(readme)[0].splitlines():
        recipe = next(iter(re.findall(r"^\| `(\w+)` ", line)), "")
        rows.append(_row(recipe, results[recipe]) if recipe in results else line)
    return TABLE.sub("".join(f"{row}\n" for row in rows).replace("\\", r"\\"), readme)


def _row(recipe: str, result: RecipeResult) -> str:
    """Return a recipe's row of the table in README.md."""
    unique = result.accuracies_without_duplicates
    cells = [f"`{recipe}`", in_prose(result.accuracies), in_prose(unique) if unique else "there are none"]
    return f"| {' | '.join([*cells, f'{result.seconds:.0f} s', '`make results`'])} |"


def with_head(recipe: str, result: RecipeResult) -> str:
    """Return a recipe's text with new lines for hardware, time and expected accuracy in its head."""
    seeds = f"{len(result.seeds)} seeds"
    lines = {
        "hardware": result.setting["CPU"],
        "time": f"{result.seconds:.0f} s for the step train (median of {seeds})",
        "expect": f"{in_prose(result.accuracies)} test accuracy (mean and standard deviation of {seeds})",
    }
    for name, text in lines.items():
        recipe = re.sub(rf"^# {name} .*$", f"# {name:<10} {text}", recipe, count=1, flags=re.MULTILINE)
    return recipe


def main() -> None:
    """Write the figures of docs/results.json into the other files."""
    publish(read_results())


if __name__ == "__main__":
    with report_errors():
        main()
