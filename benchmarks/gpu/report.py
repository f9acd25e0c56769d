"""Format the findings on a GPU as Markdown tables, for docs/records.md."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.gpu.part import PartResult
from benchmarks.table import mean_and_deviation, table

# Published times on an A100 to 94 % on CIFAR-10, whitening, training and test-time augmentation included. The first is
# that of airbench94_muon; airbench94 of the same author takes 3.09 s compiled and 3.83 s eager.
PUBLISHED_SECONDS = (2.59, 1.99)
Row = dict[str, Any]


def is_good(results: Mapping[str, PartResult]) -> bool:
    """Return whether all parts ended by themselves and all checks passed."""
    rows = [row for result in results.values() for row in result.rows]
    return all(result.status == "done" for result in results.values()) and all(row.get("ok", True) for row in rows)


def markdown(header: str, results: Mapping[str, PartResult], *, dry: bool) -> str:
    """Return the report on the findings so far; `dry` adds that the figures mean nothing."""
    sections = [header.strip()]
    if dry:
        sections.append("A dry run on the CPU with tiny inputs: these figures mean nothing.")
    for name, result in results.items():
        state = f"{result.status} after {result.seconds:.0f} s of at most {result.limit:.0f} s"
        sections.append(f"### {name}: {state}")
        if result.rows:
            sections.append(SECTIONS[name](result.rows))
    return "\n\n".join(sections) + "\n"


def _checks(rows: Sequence[Row]) -> str:
    """Return how many cases of each check passed, and the table of all cases."""
    checks = list(dict.fromkeys(row["check"] for row in rows))
    counts = [["check", "passed"]]
    for check in checks:
        passed = [row["ok"] for row in rows if row["check"] == check]
        counts.append([check, f"{sum(passed)} of {len(passed)}"])
    cases = [["check", "case", "", "found"]]
    cases += [[row["check"], row["case"], "ok" if row["ok"] else "FAILED", _cell(row["found"])] for row in rows]
    return f"{table(counts)}\n\n{table(cases)}"


def _cell(text: str) -> str:
    """Return the text as one line, with `/` for each `|`, which would end the cell of the table."""
    return " ".join(text.replace("|", "/").split())


def _fast94(rows: Sequence[Row]) -> str:
    """Return the table of trainings, and a line on the utilization."""
    seeds = [row for row in rows if row["run"].isdecimal()]
    lines = [_timings({"first, which warms up": rows[:1], "seeds": seeds})]
    for row in rows:
        if row["run"] == "profile":
            lines.append(
                f"utilization {row['utilization']:.0%} ({row['kernels']} kernels and copies in an epoch); "
                f"{row['matrix_tflops']:.0f} TFLOP/s for matrices in bfloat16, by which a training takes at least "
                f"{row['floor_seconds']:.3f} s"
            )
    return "\n\n".join(lines)


def _compile(rows: Sequence[Row]) -> str:
    """Return the table of trainings with and without train.compile, or why there are none."""
    if rows[0]["run"] == "skipped":
        return f"skipped: {rows[0]['reason']}"
    names = {False: "train.compile: false", True: "train.compile: true"}
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(names[row["compiled"]] + (", the first" if row["run"] == "first" else ""), []).append(row)
    return _timings(kinds)


def _timings(kinds: Mapping[str, Sequence[Row]]) -> str:
    """Return a table with a row for each kind of training: median seconds of the phases, accuracy and memory."""
    phases = ("whitening", "training", "evaluation")
    ratios = [f"sum / {seconds} s" for seconds in PUBLISHED_SECONDS]
    lines = [["trainings", *phases, "sum, mean ± sd", *ratios, "test accuracy", "memory (GiB)", "n"]]
    for name, rows in kinds.items():
        if not rows:
            continue
        sums = [sum(row[phase] for phase in phases) for row in rows]
        mean = statistics.mean(sums)
        memory = max(row["peak_memory_gib"] or 0 for row in rows)
        lines.append(
            [
                name,
                *(f"{statistics.median(row[phase] for row in rows):.3f}" for phase in phases),
                mean_and_deviation(sums, ".3f"),
                *(f"{mean / seconds:.2f}" for seconds in PUBLISHED_SECONDS),
                mean_and_deviation([row["accuracy"] for row in rows], ".2%"),
                f"{memory:.2f}",
                str(len(rows)),
            ]
        )
    note = "Medians in seconds; training includes validation, evaluation is on the test split with augmentation."
    return f"{table(lines)}\n\n{note}"


def _resnet18(rows: Sequence[Row]) -> str:
    """Return the table of speeds."""
    lines = [["batch size", "images/s by epoch", "seconds", "memory (GiB)"]]
    for row in rows:
        speeds = ", ".join(f"{speed:,}" for speed in row["images_per_second"])
        lines.append([str(row["batch_size"]), speeds, f"{row['training']:.2f}", f"{row['peak_memory_gib'] or 0:.2f}"])
    return table(lines)


SECTIONS: Mapping[str, Callable[[Sequence[Row]], str]] = {
    "correctness": _checks,
    "fast94": _fast94,
    "compile": _compile,
    "resnet18": _resnet18,
    "lock": _checks,
}
