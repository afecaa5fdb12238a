"""What a training run leaves to look at: a table and a plot always, a tracker on request.

The profile's parameter `tracking` names the tracker: `none` (the default), `trackio`,
`tensorboard` or `wandb`. None of them is a dependency of the course, and wandb sends its numbers
over the network unless WANDB_MODE=offline is set.
"""

import csv
import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import ParameterError
from .files import write_text

# The module that the Hugging Face trainer writes to.
MODULES = {"trackio": "trackio", "tensorboard": "tensorboard", "wandb": "wandb"}


def report_to(tracker: str) -> str:
    """The trainers' argument `report_to`.

    Raises ParameterError for a tracker that is not installed, before any weights are loaded.
    """
    module = MODULES.get(tracker)
    if module and importlib.util.find_spec(module) is None:
        raise ParameterError(
            f"tracking={tracker}, which is not installed: `pip install {tracker}`, or set "
            "tracking=none; each trained stage keeps history.csv and history.png in any case."
        )
    return tracker


def write_history(
    folder: Path, history: Sequence[Mapping[str, float]], title: str
) -> tuple[Path, Path]:
    """Write `history.csv` (one row a step, columns by name) and `history.png` (its loss)."""
    table, plot = folder / "history.csv", folder / "history.png"
    names = {name for row in history for name in row}
    first = [name for name in ("step", "epoch", "loss") if name in names]
    columns = [*first, *sorted(names.difference(first))]  # not as the trainer happened to log them
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_text(table, text.getvalue())
    _loss_plot(history, title).savefig(plot)
    return table, plot


def _loss_plot(history: Sequence[Mapping[str, float]], title: str):
    # Not pyplot: a notebook would show the figure, and a headless job would look for a screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["step"] for row in history], [row["loss"] for row in history], linewidth=1.2)
    axes.set(xlabel="optimiser step", ylabel="loss", title=title)
    return figure
