"""Classify image files with the model in `artifacts/train/` or another one.

`python -m pipeline.predict photo.jpg scan.png`
`python -m pipeline.predict --model models:/digits@champion --output answers.parquet photographs/`

Without `--output`, the answers are printed block by block, in the order of the files. A file that cannot be read is
reported on stderr with the reason; all others are classified, and the exit status is EXIT_PARTIAL. The processes that
decode images import this module, so PyTorch is imported in `main` only.
"""

import argparse

from pipeline.artifacts import expand
from pipeline.core.errors import UserError, report_errors
from pipeline.training.thresholds import COVERAGES


def main() -> None:
    """Print the most probable classes of each image file, or write them into a file."""
    arguments = _parser().parse_args()
    with report_errors():
        _check(arguments)
        from pipeline.prediction import command  # noqa: PLC0415  # PyTorch, which takes seconds

        command.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipeline.predict", description="Classify image files.")
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="a file, a folder, a quoted pattern such as 'photos/**/*.jpg', or - for a list on standard input",
    )
    parser.add_argument(
        "--model",
        help="a folder, a .safetensors file, runs:/RUN_ID/model, models:/NAME@ALIAS, the id or name of an MLflow "
        "run, or a DVC experiment (default: artifacts/train)",
    )
    parser.add_argument(
        "--output", type=expand, metavar="FILE", help="write .csv, .jsonl or .parquet; the same command resumes"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --output if it exists")
    parser.add_argument("--top", type=int, default=3, help="how many classes to give for each image (default: 3)")
    parser.add_argument(
        "--coverage",
        type=float,
        help="answer `unknown` below the threshold that reported this fraction of the validation images: "
        + ", ".join(map(str, COVERAGES)),
    )
    parser.add_argument(
        "--views",
        choices=("none", "mirror", "mirror_and_shift"),
        default="none",
        help="average over views of each image, as evaluate.test_time_augmentation does (default: none)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto, the fastest one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each image, with all classes")
    parser.add_argument(
        "-0", "--null", action="store_true", help="the paths on standard input end with NUL, as of `find -print0`"
    )
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """Raise UserError for options that do not fit each other or are out of range."""
    if arguments.top < 1:
        raise UserError(f"--top is {arguments.top}; allowed: 1 or more; choose such a number")
    if arguments.output and arguments.json:
        raise UserError("--json prints answers, but --output writes them; use one of them: `--output FILE.jsonl`")
    if arguments.overwrite and not arguments.output:
        raise UserError("found --overwrite without --output; remove it, or name the file with --output FILE")
    if arguments.null and "-" not in arguments.paths:
        raise UserError("found --null without a list on standard input; remove it, or add - to the paths")


if __name__ == "__main__":
    main()
