"""Write the report on a data set: a table of counts, then numbers of unreadable files, duplicates and groups."""

from collections.abc import Mapping
from typing import Any

from pipeline.images.blocks import SPLITS

MAX_JOINED_FRACTION = 0.25  # of images with a near-duplicate, above which the report has a warning


def report(description: Mapping[str, Any]) -> str:
    """Return the report as lines of text; `description` is the content of `dataset.json`."""
    counts = description["counts"]
    rows = {name: [counts[split][name] for split in SPLITS] for name in description["class_names"]}
    total = ("all", [sum(counts[split].values()) for split in SPLITS])
    if len(rows) > 10:
        smallest, largest = (pick(rows, key=lambda name: sum(rows[name])) for pick in (min, max))
        rows = {f"{name} ({word})": rows[name] for name, word in ((smallest, "fewest"), (largest, "most"))}
        total = (f"all {len(description['class_names'])} classes", total[1])
    width = max(len(name) for name in ("class", total[0], *rows))
    table = [f"{'class':{width}}  {'  '.join(f'{split:>10}' for split in SPLITS)}"]
    table += [f"{name:{width}}  {'  '.join(f'{count:>10,}' for count in row)}" for name, row in [*rows.items(), total]]
    return "\n".join([*table, *_findings(description)])


def _findings(description: Mapping[str, Any]) -> list[str]:
    """Return lines of text with the numbers of unreadable files, duplicates and groups."""
    exact, near = description["exact_duplicates"], description["near_duplicates"]
    unreadable, ignored = description["unreadable_files"], description["ignored_files"]
    first = f" (first: {unreadable[0]['file']}: {unreadable[0]['reason']})" if unreadable else ""
    num_test = sum(description["counts"]["test"].values())
    found = near["test_images_with_one_in_train"]
    return [
        f"unreadable files: {len(unreadable)}{first}; files that are not images: {len(ignored)}",
        f"exact duplicates within splits: {_join(exact['within'])}; across splits: {_join(exact['across'])}",
        f"test images with a near-duplicate in train or validation: {found} of {num_test:,} ({found / num_test:.2%}) "
        f"at correlation {near['correlation']:g}",
        *_groups(description["groups"]),
    ]


def _groups(groups: Mapping[str, Any]) -> list[str]:
    """Return lines of text with the numbers of groups of images."""
    lines = []
    if groups["named"]:
        across = f"{groups['across_splits']:,} ({groups['images_across_splits']:,} images)"
        lines.append(
            f"named groups: {groups['named']:,} ({groups['named_images']:,} images); in more than one split: {across}"
        )
    if groups["drawn_splits"]:
        lines.append(
            f"drawn: {', '.join(groups['drawn_splits'])}; images kept together: {groups['joined_images']:,} of "
            f"{groups['images']:,}"
            + (
                f", in {groups['joined_groups']:,} groups, the largest of {groups['largest']:,}; because of "
                f"duplicates or near-duplicates: {groups['joined_duplicates']:,}"
                if groups["joined_images"]
                else ""
            )
        )
        if groups["joined_duplicates"] > MAX_JOINED_FRACTION * groups["images"]:
            lines.append(
                "so many near-duplicates make test and validation small or one-sided; if your images are not that "
                "alike, raise normalize.near_duplicate_correlation"
            )
        if groups["kept_in_train"]:
            lines.append(
                f"kept in train, as test or validation has an image of their group: {groups['kept_in_train']:,}"
            )
    return lines


def _join(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
