"""Write figures and names as a reader wants them: `95 %`, `248 kB`, `2.3 ms`, and no control characters."""

import json
import re
from typing import Any
from urllib.parse import urlsplit

from pipeline.core.errors import escape_control_chars
from pipeline.core.progress import format_bytes

UNKNOWN = "unknown"
NO_BREAK_SPACE = "\u00a0"
MINUS = "\u2212"
# the reasons of `training.selection` as patterns, and what they mean; `{0}` and `{1}` are the groups of the pattern
REASONS = {
    "latest of 1 in the 95% interval of the (.+), (.+)%": (
        f"it has the {{0}} ({{1}}{NO_BREAK_SPACE}%), and no other epoch is as good within what chance explains"
    ),
    r"latest of (\d+) in the 95% interval of the (.+), (.+)%": (
        f"it is the last of {{0}} epochs that are, within what chance explains, as good as the one of the {{1}} "
        f"({{2}}{NO_BREAK_SPACE}%)"
    ),
    r"lowest validation loss of (\d+) with the (.+)": (
        "it has the lowest validation loss of the {0} epochs that have the {1}"
    ),
    r"latest of (\d+) with the (.+)": "it is the last of {0} epochs that have the {1}",
    "((?:highest|lowest) .+)": "it has the {0}",
}


def percent(fraction: float | None, decimals: int = 1) -> str:
    """Return a fraction as a percentage; one that is not quite 0 or 1 is never shown as such."""
    if fraction is None:
        return UNKNOWN
    smallest = 10.0**-decimals
    if 0 < fraction < smallest / 200:
        text = f"<{NO_BREAK_SPACE}{smallest:g}"
    elif 1 - smallest / 200 <= fraction < 1:
        text = f">{NO_BREAK_SPACE}{100 - smallest:g}"
    else:
        text = f"{100 * fraction:.{decimals}f}"
    return f"{text}{NO_BREAK_SPACE}%"


def points(difference: float, decimals: int = 1) -> str:
    """Return a difference of fractions in percentage points, with its sign."""
    return signed(100 * difference, decimals)


def signed(value: float, decimals: int) -> str:
    """Return a number with its sign, or 0 without one if it is rounded to 0."""
    text = f"{value:+.{decimals}f}".replace("-", MINUS)
    return text if text[1:].strip("0.") else text[1:]


def distance(difference: float, decimals: int = 1) -> str:
    """Return the size of a difference of fractions in percentage points, without its sign."""
    return f"{100 * abs(difference):.{decimals}f}"


def probability(value: float) -> str:
    """Return a p-value with its sign of equality: `= 0.031`, or `< 0.001` for smaller ones."""
    return f"<{NO_BREAK_SPACE}0.001" if value < 0.001 else f"={NO_BREAK_SPACE}{value:.2g}"


def percentage(fraction: float) -> str:
    """Return a level or a confidence as a percentage with as many digits as it needs, at most four: `1.667 %`."""
    return f"{100 * fraction:.4g}{NO_BREAK_SPACE}%"


def confidence(level: float) -> str:
    """Return the confidence of the intervals of a test of this level: `95 %` for 0.05."""
    return percentage(1 - level)


def duration(seconds: float | None) -> str:
    """Return a duration in the largest fitting unit."""
    if seconds is None:
        return UNKNOWN
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f}{NO_BREAK_SPACE}{unit}"
    return f"{seconds:.1f}{NO_BREAK_SPACE}s"


def milliseconds(seconds: float) -> str:
    """Return a short duration in milliseconds, with three digits."""
    return f"{float(f'{1000 * seconds:.3g}'):g}{NO_BREAK_SPACE}ms"


def size(number: int) -> str:
    """Return a number of bytes as text, such as `163 MB`."""
    return re.sub(r"(?<=\d) ?(?=[a-zA-Z])", NO_BREAK_SPACE, format_bytes(number))


def reason(text: str) -> str:
    """Return the reason for the selected epoch, which `history.csv` has in short, as the end of a sentence."""
    for pattern, meaning in REASONS.items():
        if found := re.fullmatch(pattern, text):
            return meaning.format(*found.groups())
    return text


def label(name: object) -> str:
    """Return a name with control characters and direction marks escaped, as in `\\x1b`."""
    return escape_control_chars(str(name))


def web_link(address: str) -> str:
    """Return the address if it is one of the web, else an empty text: no other scheme may be a link."""
    try:
        return address if urlsplit(address).scheme in ("http", "https") else ""
    except ValueError:
        return ""


def as_yaml(value: Any) -> str:
    """Return the value of a parameter in one line of YAML."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
