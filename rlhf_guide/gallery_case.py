"""An exhibit of the failure gallery: two runs' curves, and what a detector says of each.

case = gallery.run_case(ws, "swapped labels")
show(draw(case), alt=described(case))
"""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlhf_guide.detectors import Finding
from rlhf_guide.figures import BLUE, GREY, RED


@dataclass(frozen=True)
class Panel:
    """Two curves on one pair of axes; `x`, `y` are labels with units, `at` the places on x.

    Without `at` the values stand at 1, 2, …; `limit` is a level to compare them with; `log` makes
    y logarithmic above 2, from 0 on.
    """

    x: str
    y: str
    healthy: Sequence[float]
    broken: Sequence[float]
    at: Sequence[float] | None = None
    limit: float | None = None
    log: bool = False


@dataclass(frozen=True)
class Case:
    """A failure: its curves and the detector's finding on the healthy and on the broken run."""

    panels: tuple[Panel, ...]
    healthy: Finding
    broken: Finding


def draw(case: Case) -> Figure:
    """The panels of a case side by side: blue is healthy, red is broken, grey a limit."""
    count = len(case.panels)
    fig, axes = plt.subplots(1, count, figsize=(4 * count + 1, 2.9), squeeze=False)
    for ax, panel in zip(axes[0], case.panels, strict=True):
        for name, values, color, style in (
            ("healthy", panel.healthy, BLUE, "o-"),
            ("broken", panel.broken, RED, "s--"),
        ):
            at = panel.at or range(1, len(values) + 1)
            ax.plot(at, values, style, color=color, markersize=3, label=name)
        if panel.limit is not None:
            ax.axhline(panel.limit, color=GREY, linestyle=":")
        ax.set(xlabel=panel.x, ylabel=panel.y)
        if panel.log:
            ax.set_yscale("symlog")
            ax.set_ylim(0, 2 * max(*panel.healthy, *panel.broken))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0][0].legend(fontsize=8)
    return fig


def told(case: Case) -> str:
    """What the detector measured on both runs, in one sentence."""
    healthy, broken = (
        f"{run.value:.3g} ({'fires' if run.fired else 'passes'})"
        for run in (case.healthy, case.broken)
    )
    return f"{case.broken.name}: healthy {healthy}, broken {broken}, limit {case.broken.limit:.3g}."


def described(case: Case) -> str:
    """The figure in words: where the curves of each panel end, then what the detector measured."""
    ends = (
        f"{panel.y}: the last value is {panel.healthy[-1]:.3g} healthy, {panel.broken[-1]:.3g} "
        "broken."
        for panel in case.panels
    )
    return " ".join([*ends, told(case)])
