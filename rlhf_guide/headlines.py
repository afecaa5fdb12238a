"""The results that stand first, as a figure and a table: gains and win rates of the two DPOs.

Everything is read from the README's table of results, which `rlhf-guide report --readme` writes;
`python -m rlhf_guide.book_pages` then draws the figure and puts both where they belong.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import GuideError

# A panel of the figure: its axis, the value of no difference, and its metrics in words.
PANELS = (
    (
        "gain in true utility, points",
        0.0,
        {
            "utility_gain_offline_over_sft": "offline DPO − SFT",
            "utility_gain_over_sft": "online DPO − SFT",
            "utility_gain_over_offline": "online − offline DPO",
            "seeds_online_minus_sft": "online DPO − SFT, over seeds",
            "seeds_online_minus_matched": "online − as much offline DPO, over seeds",
        },
    ),
    (
        "win rate over SFT, ties half",
        0.5,
        {
            "win_rate_offline_over_sft": "offline DPO",
            "lc_win_rate_offline_over_sft": "offline DPO, at equal length",
            "win_rate_online_over_sft": "online DPO",
            "lc_win_rate_online_over_sft": "online DPO, at equal length",
        },
    ),
)
RESULT = re.compile(
    r"^\| (\w+) \| (-?[\d.]+) \| (-?[\d.]+) to (-?[\d.]+) \| (\d+) \|$", re.MULTILINE
)
# Real text and the same bytes each time.
SVG = {"svg.fonttype": "none", "svg.hashsalt": "rlhf-guide"}


def headlines(readme: str) -> list[tuple[str, float, list[dict[str, Any]]]]:
    """The figure's panels: axis, value of no difference, and rows of label, value, low, high, n.

    The rows over seeds are there if the run had that study (`online_seeds`). Raises `GuideError`
    when the README's table lacks another of the metrics.
    """
    found = {name: numbers for name, *numbers in RESULT.findall(readme)}
    needed = [name for *_, names in PANELS for name in names if not name.startswith("seeds_")]
    if missing := [name for name in needed if name not in found]:
        raise GuideError(
            f"README.md has no result {', '.join(missing)}: `rlhf-guide report runs/cpu --readme` "
            "writes the table of a finished run."
        )
    return [
        (axis, null, [_row(label, *found[name]) for name, label in names.items() if name in found])
        for axis, null, names in PANELS
    ]


def _row(label: str, value: str, low: str, high: str, n: str) -> dict[str, Any]:
    return {"label": label, "value": float(value), "low": float(low), "high": float(high), "n": n}


def _told_apart(row: Mapping[str, Any], null: float) -> bool:
    return not row["low"] <= null <= row["high"]


def describe(readme: str) -> str:
    """The figure in words: each value with its interval, and where it shows no difference."""
    panels = []
    for axis, null, rows in headlines(readme):
        told = [
            f"{row['label']} {row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f}"
            f"{'' if _told_apart(row, null) else ', no difference shown'})"
            for row in rows
        ]
        panels.append(f"{axis[0].upper()}{axis[1:]}: {'; '.join(told)}.")
    return " ".join(panels)


def table(readme: str) -> str:
    """The figure's numbers as a Markdown table."""
    lines = ["| | value | 95% interval | prompts |", "| --- | --- | --- | --- |"]
    for axis, _, rows in headlines(readme):
        lines += [
            f"| {axis}: {row['label']} | {row['value']:.3f} "
            f"| {row['low']:.3f} to {row['high']:.3f} | {row['n']} |"
            for row in rows
        ]
    return "\n".join(lines)


def draw_results(path: Path, readme: str) -> None:
    """Write the figure as an SVG; grey marks an interval that shows no difference.

    Its description is `describe(readme)`, by which a test knows whether the file is current.
    """
    import matplotlib
    from matplotlib import pyplot as plt

    from .figures import BLUE, GREY, STYLE, dot_interval

    with matplotlib.rc_context({**STYLE, **SVG}):
        fig, axes = plt.subplots(1, 2, figsize=(9, 2.8))
        for ax, (axis, null, rows) in zip(axes, headlines(readme), strict=True):
            hues = [BLUE if _told_apart(row, null) else GREY for row in rows]
            dot_interval(ax, [{**row, "color": hue} for row, hue in zip(rows, hues, strict=True)])
            ax.axvline(null, color=GREY, linestyle="--")
            ax.set(xlabel=f"{axis}, 95% interval")
        described = {"Date": None, "Description": describe(readme)}
        fig.savefig(path, format="svg", bbox_inches="tight", metadata=described)
        plt.close(fig)
