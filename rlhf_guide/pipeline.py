"""The course's pipeline as one figure: what each notebook makes, and what it needs."""

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from .figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE

WIDTH, HEIGHT = 2.3, 0.8

# name: (x, y) of the centre, text, colour
BOXES = {
    "data": ((1.2, 2.0), "01 data\nanswers and pairs", GREY),
    "sft": ((4.0, 3.2), "02 SFT\nreference policy", BLUE),
    "reward": ((4.0, 2.0), "03 reward model", ORANGE),
    "pairwise": ((4.0, 0.8), "04 preference model", ORANGE),
    "measure": ((6.8, 0.8), "05 what rewards\nmeasure", PURPLE),
    "offline": ((6.8, 3.2), "06 offline DPO\nstored pairs", BLUE),
    "online": ((6.8, 2.0), "07 online DPO\n3 × sample, rank, train", BLUE),
    "evaluation": ((9.6, 2.0), "08 evaluation\nheld-out prompts", GREEN),
}
ARROWS = (
    ("data", "sft"),
    ("data", "reward"),
    ("data", "pairwise"),
    ("sft", "offline"),
    ("sft", "online"),
    ("reward", "online"),
    ("reward", "measure"),
    ("pairwise", "measure"),
    ("offline", "evaluation"),
    ("online", "evaluation"),
)


def draw_pipeline() -> Figure:
    """Eight boxes with the notebooks' numbers and an arrow for every main input."""
    fig, ax = plt.subplots(figsize=(8.0, 2.65), layout="constrained")
    for start, end in ARROWS:
        _arrow(ax, BOXES[start][0], BOXES[end][0])
    _loop(ax, *BOXES["online"][0])
    for (x, y), text, color in BOXES.values():
        _box(ax, x, y, text, color)
    ax.set(xlim=(-0.05, 10.85), ylim=(0.2, 3.8), aspect="equal")
    ax.axis("off")
    return fig


def _box(ax: Axes, x: float, y: float, text: str, color: str) -> None:
    corner = (x - WIDTH / 2, y - HEIGHT / 2)
    style = "round,pad=0.02,rounding_size=0.12"
    ax.add_patch(
        FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle=style, fc="white", ec=color, lw=2, zorder=2)
    )
    ax.text(x, y, text, ha="center", va="center", fontsize=8.5, color=BLACK, zorder=3)


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """From the right edge of one box to the left edge of the next."""
    tail, head = (start[0] + WIDTH / 2, start[1]), (end[0] - WIDTH / 2, end[1])
    ax.add_patch(FancyArrowPatch(tail, head, arrowstyle="-|>", mutation_scale=11, color=GREY))


def _loop(ax: Axes, x: float, y: float) -> None:
    """The arrow from the online box back to itself."""
    top = y + HEIGHT / 2
    ax.add_patch(
        FancyArrowPatch(
            (x + 0.7, top),
            (x - 0.7, top),
            connectionstyle="arc3,rad=0.45",
            arrowstyle="-|>",
            mutation_scale=11,
            color=BLUE,
        )
    )
