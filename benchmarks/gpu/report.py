"""The findings on a GPU as Markdown tables, for docs/records.md."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.gpu.part import PartResult
from benchmarks.table import mean_and_deviation, table

PUBLISHED_SECONDS = (2.59, 1.99)
"""Published on an A100 for 94 % on CIFAR-10, the first by airbench94_muon; its airbench94 takes 3.09 s compiled and
3.83 s eager. They count whitening, training and test-time augmentation."""
Row = dict[str, Any]


def is_good(results: Mapping[str, PartResult]) -> bool:
    """Return whether each part ended by itself and each check passed."""
    rows = [row for result in results.values() for row in result.rows]
    return all(result.status == "done" for result in results.values()) and all(row.get("ok", True) for row in rows)


def markdown(header: str, results: Mapping[str, PartResult], *, dry: bool) -> str:
    """Return the report on what was found so far."""
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
        oks = [row["ok"] for row in rows if row["check"] == check]
        counts.append([check, f"{sum(oks)} of {len(oks)}"])
    cases = [["check", "case", "", "found"]]
    cases += [[row["check"], row["case"], "ok" if row["ok"] else "FAILED", _cell(row["found"])] for row in rows]
    return f"{table(counts)}\n\n{table(cases)}"


def _cell(text: str) -> str:
    """Return text on one line without what would end a cell of the table."""
    return " ".join(text.replace("|", "/").split())


def _fast94(rows: Sequence[Row]) -> str:
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
    if rows[0]["run"] == "skipped":
        return f"skipped: {rows[0]['reason']}"
    names = {False: "train.compile: false", True: "train.compile: true"}
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(names[row["compiled"]] + (", the first" if row["run"] == "first" else ""), []).append(row)
    return _timings(kinds)


def _timings(kinds: Mapping[str, Sequence[Row]]) -> str:
    """Return a table of medians of the phases, in seconds, and of accuracy, by kind of training."""
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
