"""One plotting style: colour-blind safe, a light ground of its own, compact PNG with alt text."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import PIL.Image
from IPython.display import Image, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by readers with any kind of colour vision.
BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
RED, SKY, PURPLE = "#D55E00", "#56B4E9", "#CC79A7"
BLACK, GREY = "#222222", "#8A8A8A"
PALETTE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK)
PNG_COLOURS = 128

STYLE = {
    "figure.figsize": (6.4, 3.4),
    "figure.dpi": 110,
    # An explicit light ground: a transparent one makes dark labels vanish on a dark page.
    "figure.facecolor": "#FCFCFA",
    "savefig.facecolor": "#FCFCFA",
    "axes.facecolor": "#FCFCFA",
    "axes.edgecolor": GREY,
    "axes.labelcolor": BLACK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": plt.cycler(color=PALETTE),
    "grid.color": "#E3E3DE",
    "grid.linewidth": 0.8,
    "text.color": BLACK,
    "xtick.color": BLACK,
    "ytick.color": BLACK,
    "font.size": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
}


def use_style() -> None:
    """Apply the course's style to every figure made from now on."""
    plt.rcParams.update(STYLE)


def png(fig: Figure) -> bytes:
    """The figure as PNG bytes, without a date, so that equal figures are equal files.

    An indexed palette makes it several times smaller, and no eye sees that in a plot.
    """
    drawn, packed = io.BytesIO(), io.BytesIO()
    fig.savefig(drawn, format="png", dpi=fig.dpi)
    pixels = PIL.Image.open(drawn).convert("RGB")
    pixels.quantize(PNG_COLOURS).save(packed, format="png", optimize=True)
    return packed.getvalue()


def show(fig: Figure, alt: str) -> None:
    """Display a figure and close it.

    `alt` states what the figure shows, with the numbers computed, for readers who cannot see it;
    it is stored beside the image and stands in for it in plain-text output. Raises `ValueError`
    when it is empty.
    """
    if not alt.strip():
        raise ValueError("show() needs an alt text that states the figure's finding.")
    bundle, extra = Image(png(fig), format="png", alt=alt)._repr_mimebundle_()
    display({**bundle, "text/plain": alt}, raw=True, metadata={"image/png": {**extra, "alt": alt}})
    plt.close(fig)


Rows = Sequence[Mapping[str, Any]] | Mapping[str, Mapping[str, Any]]


def dot_interval(ax: Axes, rows: Rows, color: str = BLUE) -> Axes:
    """One dot with its 95% interval a row, first row on top.

    `rows` hold `label`, `value`, `low` and `high`, and may hold `color`; a mapping from labels to
    intervals will do as well. A value of None leaves its row empty. Axis labels are the caller's,
    who knows the unit.
    """
    if isinstance(rows, Mapping):
        rows = [{**interval, "label": label} for label, interval in rows.items()]
    for place, row in enumerate(rows):
        value = row["value"]
        if value is None:
            continue
        error = [[value - row["low"]], [row["high"] - value]]
        hue = row.get("color", color)
        ax.errorbar(value, place, xerr=error, fmt="o", color=hue, capsize=3, markersize=6)
    ax.set_yticks(range(len(rows)), [row["label"] for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    return ax
