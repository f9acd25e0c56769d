"""What a promotion decided, as Markdown for Prefect's page and as text for the terminal; the history as a table."""

import shlex
from collections.abc import Iterable, Sequence
from datetime import datetime

from flows.progress_page import markdown_table
from flows.promotion import Result
from flows.promotion_ledger import Change
from flows.summary_page import escape
from pipeline.comparison.promotion import Check, Decision, Figures
from pipeline.core.errors import escape_control_chars
from pipeline.tracking.registry import Version

SHORT = 10  # digits of a commit and of an MD5 in a table
WIDTH = 14  # columns of the names in the terminal


def headline(result: Result) -> str:
    """Return in one line what was decided and why; the log and the state of the flow run have it."""
    version = describe(result.challenger)
    if result.decision:
        outcome = f"would be {result.decision.outcome}" if result.is_dry_run else result.decision.outcome
        return f"{version} {outcome}: {escape_control_chars(result.decision.reason)}"
    assert result.allowed
    return (
        f"{version} would be compared with the champion on the test split, at the level {result.allowed.level:.2g}; "
        "a dry run ends before this look"
    )


def describe(version: Version | None) -> str:
    """Return the name and the number of a version."""
    return escape_control_chars(f"{version.name} version {version.number}") if version else "none"


def as_text(result: Result) -> str:
    """Return the decision with all figures for the terminal."""
    checks = _checks(result)
    lines = [headline(result), ""]
    lines += [f"{name:<{WIDTH}}{value}" for name, value in _facts(result)]
    if checks:
        lines += ["", *(f"{'passed' if one.passed else 'FAILED':<{WIDTH}}{_describe_check(one)}" for one in checks)]
    return "\n".join(lines)


def as_markdown(result: Result) -> str:
    """Return the decision with all figures for Prefect's page."""
    title, _, reason = headline(result).partition(": ")
    parts = [
        f"# {escape(title)}",
        *([escape(reason)] if reason else []),
        "\n".join(f"- **{name}**: {escape(text)}" for name, text in _facts(result)),
    ]
    if checks := _checks(result):
        rows = [
            (escape(one.name), escape(one.found), escape(one.allowed), "passed" if one.passed else "**failed**")
            for one in checks
        ]
        parts += ["## Checks", markdown_table(["check", "found", "allowed", "result"], rows)]
    if result.decision and result.decision.figures:
        parts += ["## Classes", _classes(result.decision.figures)]
    parts += ["## Next", _next(result)]
    return "\n\n".join(parts) + "\n"


def _checks(result: Result) -> Sequence[Check]:
    found = result.decision or result.allowed
    assert found
    return found.checks


def _describe_check(check: Check) -> str:
    return escape_control_chars(f"{check.name}: {check.found} (allowed: {check.allowed})")


def _facts(result: Result) -> list[tuple[str, str]]:
    """Return name and value of each fact but the checks."""
    version, found = result.challenger, result.decision or result.allowed
    assert found
    facts = [
        (
            "challenger",
            f"{describe(version)}, {version.tags.get('title', 'untitled')}, MD5 {version.model_md5[:SHORT]}",
        ),
        ("champion", describe(result.champion)),
        ("looks", f"{found.looks_used} used, {found.looks_left} left on this test split ({version.test_md5[:SHORT]})"),
    ]
    if isinstance(found, Decision) and found.figures:
        facts += _describe_figures(found.figures, level=found.level)
    return facts


def _describe_figures(figures: Figures, *, level: float | None) -> list[tuple[str, str]]:
    """Return name and value of each figure of a look."""
    accuracy = figures.accuracy
    points = [f"{100 * value:+.2f}" for value in (accuracy.difference, accuracy.low, accuracy.high)]
    detectable = "no gain" if figures.detectable is None else f"a gain of {100 * figures.detectable:.2f} points"
    return [
        ("accuracy", f"{accuracy.a:.2%}, champion {accuracy.b:.2%}, on {figures.images:,} paired test images"),
        ("gain", f"{points[0]} points (95% interval {points[1]} to {points[2]})"),
        (
            "images",
            f"{figures.only_challenger:,} only the challenger gets right, {figures.only_champion:,} the champion",
        ),
        ("test", f"p = {figures.p_value:.3g} (exact McNemar, one-sided), level {level:.2g}"),
        ("detectable", f"{detectable} at this level with 80 % power"),
    ]


def _classes(figures: Figures) -> str:
    """Return a table of the classes, those with the smallest p-values first."""
    rows = [
        (
            escape(one.name),
            str(one.images),
            f"{one.recall_a:.2%}",
            f"{one.recall_b:.2%}",
            f"{one.corrected_p_value:.3g}",
        )
        for one in sorted(figures.classes, key=lambda one: one.p_value)
    ]
    return markdown_table(["class", "images", "recall", "champion's recall", "corrected p"], rows)


def _next(result: Result) -> str:
    """Return the commands that a reader may want next."""
    command = f"python -m flows.promote --dataset {shlex.quote(result.name)}"
    return "\n".join(
        [
            f"- print what was champion when, and why: `{command} --history`",
            f"- make the previous champion the champion again: `{command} --rollback`",
        ]
    )


def describe_change(name: str, change: Change) -> str:
    """Return in one line which version a rollback made the champion."""
    return escape_control_chars(f"{name} version {change.version} is the champion again: {change.reason}")


def change_as_markdown(name: str, change: Change) -> str:
    """Return a rollback for Prefect's page."""
    lines = [f"commit with its `dvc.lock`: {change.commit or 'unknown'}", f"MD5 of its weights: {change.model_md5}"]
    return f"# {escape(describe_change(name, change))}\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"


def history_table(changes: Iterable[Change]) -> str:
    """Return the changes of the champion as a table for the terminal, newest first."""
    rows = [("since (UTC)", "version", "model", "commit", "before", "why")]
    rows += [
        (
            f"{datetime.fromisoformat(one.time):%Y-%m-%d %H:%M:%S}",
            one.version or "none",
            (one.model_md5 or "-")[:SHORT],
            (one.commit or "unknown")[:SHORT],
            one.previous or "none",
            escape_control_chars(one.reason),
        )
        for one in changes
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
