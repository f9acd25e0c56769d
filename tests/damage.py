"""Damage the bytes of a file in many ways, and check that a function refuses them in one line."""

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from pipeline.core.errors import UserError


def examples(number: int) -> settings:
    """Return settings for this number of examples, the same on every run; use it above `@given`."""
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],  # to shrink a failure, add Phase.shrink
        suppress_health_check=list(HealthCheck),
    )


# A change of the bytes: its kind, its position as a fraction of the length, and new bytes.
Change = tuple[str, float, bytes]
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "overwrite", "insert", "remove", "cut"]),
        st.floats(0, 1, exclude_max=True),
        st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 4, b"\x80" + b"\xff" * 7, b"\0" * 4])),
    ),
    min_size=1,
    max_size=4,
)


def damaged(content: bytes, changes: list[Change], *, head: int | None = None) -> bytes:
    """Return the content with the changes; with `head`, every second change is in the first `head` bytes."""
    result = bytearray(content)
    for number, (kind, position, new) in enumerate(changes):
        offset = int(position * (min(head, len(result)) if head and number % 2 == 0 else len(result)))
        if kind == "flip" and result:
            result[offset] ^= 1 << (new[0] % 8)
        elif kind == "overwrite":
            result[offset : offset + len(new)] = new
        elif kind == "insert":
            result[offset:offset] = new
        elif kind == "remove":
            del result[offset : offset + new[0] + 1]
        elif kind == "cut":
            del result[offset:]
    return bytes(result)


def refused(call: Callable[[], Any], *, error: type[Exception] = UserError) -> bool:
    """Return whether the call raised `error` with one printable line; any other exception fails the test."""
    message = None
    try:
        call()
    except error as refusal:
        message = str(refusal)
    assert message is None or (message and message.isprintable())
    return message is not None


UNUSUAL_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.one_of(st.integers(), st.text(max_size=5)), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)
