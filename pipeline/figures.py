"""Matplotlib figures as PNG bytes that are the same for the same numbers."""

import io
import warnings

import matplotlib
from matplotlib.figure import Figure

matplotlib.rcParams["font.family"] = ["DejaVu Sans"]  # Matplotlib ships this font: the same bytes on every machine


def to_png(figure: Figure) -> bytes:
    """Return the figure as PNG bytes without the version of Matplotlib in them."""
    stream = io.BytesIO()
    with warnings.catch_warnings():  # a class name in a script that the font lacks shows as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(stream, format="png", dpi=110, metadata={"Software": None})
    return stream.getvalue()
