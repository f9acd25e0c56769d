"""Export a trained model as one file for other runtimes, and verify at once that it gives the same answers.

`python -m pipeline.export --to onnx`
`python -m pipeline.export --to torch --model models:/digits@champion --output exported --photographs photos`

The exported network takes pixels (N, H, W, C) uint8 and returns calibrated probabilities (N, num_classes) float32. The
folder also has what is needed to prepare photographs and to serve the file: docs/export.md.
"""

import argparse
import sys

from pipeline.artifacts import ARTIFACTS, expand
from pipeline.core.errors import escape_control_chars, report_errors
from pipeline.exporting.folder import Export, check_output, export
from pipeline.exporting.formats import FORMATS
from pipeline.exporting.images import MIN_IMAGES, find_files, read_images, validation_images
from pipeline.exporting.server_files import check_name, default_name
from pipeline.exporting.verification import BATCH_SIZES, MAX_DIFFERENCE, MAX_PHOTOGRAPHS, MIN_MARGIN, MIN_PHOTOGRAPHS
from pipeline.prediction.model import load
from pipeline.tracking.model_files import find_model_files


def main() -> None:
    """Export a model and print how it compares with the original."""
    arguments = _parser().parse_args()
    with report_errors():
        output = expand(arguments.output) if arguments.output else ARTIFACTS / "export" / arguments.to
        check_output(output, overwrite=arguments.overwrite)
        folder = expand(arguments.photographs) if arguments.photographs else None
        photographs = find_files(folder, option="--photographs") if folder else []
        model = load(find_model_files(arguments.model))
        name = arguments.name or default_name(model.config)
        check_name(name)
        if arguments.images:
            images, source = read_images(expand(arguments.images), config=model.config), f"from {arguments.images}"
        else:
            images, source = validation_images(model.config, label=model.files.label), "of the validation split"
        done = export(model, images, to=arguments.to, name=name, output=output, photographs=photographs, report=_report)
        for line in _lines(done, source=source):
            print(escape_control_chars(line))


def _report(line: str) -> None:
    """Print what the command does now."""
    print(escape_control_chars(line), file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipeline.export", description="Export a trained model.")
    parser.add_argument("--to", required=True, choices=FORMATS, help="ONNX, or a program of PyTorch (.pt2)")
    parser.add_argument("--model", help="as for pipeline.predict (default: artifacts/train)")
    parser.add_argument("--output", metavar="FOLDER", help="default: artifacts/export/onnx or artifacts/export/torch")
    parser.add_argument("--name", help="of the model in Triton and KServe (default: that of the network)")
    parser.add_argument(
        "--images",
        metavar="FOLDER",
        help=f"{MIN_IMAGES} image files or more to verify on (default: the validation split of this checkout)",
    )
    parser.add_argument(
        "--photographs",
        metavar="FOLDER",
        help=f"compare the classes of {MIN_PHOTOGRAPHS} photographs or more by the original with those by "
        f"preprocess.py and the export; of more than {MAX_PHOTOGRAPHS}, a selection",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    return parser


def _lines(done: Export, *, source: str) -> list[str]:
    """Return the table of sizes and times, and the lines on the agreement."""
    lines = [f"{'':10}{'size':>12}" + "".join(f"{f'batch of {size}':>16}" for size in done.seconds)]
    for name, size in done.sizes.items():
        times = "".join(f"{f'{seconds[name] * 1000:.2f} ms':>16}" for seconds in done.seconds.values())
        lines.append(f"{name:10}{f'{size / 1e6:.2f} MB':>12}{times}")
    found = done.agreement
    lines += [
        "",
        f"verified on {found.num_images} images {source}, in batches of {', '.join(map(str, BATCH_SIZES))}:",
        f"  largest difference of a probability: {found.largest_difference:.1e} (allowed: {MAX_DIFFERENCE:.0e})",
        f"  another class: {found.num_other_class} of {found.num_clear} images with a margin above {MIN_MARGIN:.0e}",
    ]
    if photographs := done.photographs:
        lines += [
            f"from the file to the class: {photographs.num_same_class} of {photographs.num_compared} photographs have "
            f"the same class ({photographs.fraction:.2%}), {photographs.num_same_pixels} the same pixels",
            f"  without a class, as preprocess.py cannot read them: {photographs.num_failed}",
            f"  left out: {photographs.num_unreadable} unreadable, {photographs.num_refused} of a format or mode that "
            "preprocess.py does not support",
        ]
    return [*lines, f"wrote {done.folder}"]


if __name__ == "__main__":
    main()
