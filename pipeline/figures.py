"""Convert Matplotlib figures to PNG bytes, which are the same for the same numbers."""

import io
import warnings

import matplotlib
from matplotlib.figure import Figure

matplotlib.rcParams["font.family"] = ["DejaVu Sans"]  # Matplotlib ships this font: the same bytes on every machine


def to_png(figure: Figure) -> bytes:
    """Return the figure as PNG bytes, which do not hold the version of Matplotlib."""
    stream = io.BytesIO()
    with warnings.catch_warnings():  # characters of a class name that the font lacks are drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(stream, format="png", dpi=110, metadata={"Software": None})
    return stream.getvalue()
