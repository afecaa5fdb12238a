"""Figures: alternative text travels with the image, and none stays open."""

import matplotlib
import pytest
from matplotlib import pyplot as plt

from rlhf_guide import figures, verify
from rlhf_guide.pipeline import BOXES, draw_pipeline

matplotlib.use("agg")


def test_show_carries_the_alt_text_and_closes_the_figure(monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "display", lambda data, **extra: shown.append((data, extra)))
    fig, _ = plt.subplots()
    figures.show(fig, alt="The line rises to 3")
    (data, extra), *_ = shown
    assert data["text/plain"] == "The line rises to 3"
    assert data["image/png"]
    assert extra["metadata"]["image/png"]["alt"] == "The line rises to 3"
    assert not plt.fignum_exists(fig.number)
    with pytest.raises(ValueError, match="alt text"):
        figures.show(fig, alt=" ")


def test_equal_figures_are_equal_bytes_on_a_light_ground():
    figures.use_style()
    images = [figures.png(plt.subplots()[0]) for _ in range(2)]
    plt.close("all")
    assert images[0] == images[1]
    assert len(images[0]) < 20_000


@pytest.mark.parametrize(
    "rows",
    [
        [
            {"label": "a", "value": 0.5, "low": 0.4, "high": 0.7},
            {"label": "b", "value": None, "low": None, "high": None},
        ],
        {
            "a": {"value": 0.5, "low": 0.4, "high": 0.7},
            "b": {"value": None, "low": None, "high": None},
        },
    ],
)
def test_dot_interval(rows):
    fig, ax = plt.subplots()
    figures.dot_interval(ax, rows)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["a", "b"]
    assert len(ax.containers) == 1  # a row without a value stays empty
    plt.close(fig)


def test_pipeline_shows_every_step():
    fig = draw_pipeline()
    texts = [text.get_text() for text in fig.axes[0].texts]
    assert len(texts) == len(BOXES)
    assert [f"{n:02d}" for n in range(1, 9)] == sorted(text[:2] for text in texts)
    plt.close(fig)


def test_recommended_profile():
    assert verify.recommend("cpu", 20.0).startswith("cpu")
    assert verify.recommend("cpu", 2.0).startswith("smoke")


def test_verify_reports_missing_weights_without_raising(monkeypatch):
    from rlhf_guide import embedded
    from rlhf_guide.errors import WeightsError

    def missing():
        raise WeightsError("not installed: run this")

    monkeypatch.setattr(embedded, "weights_file", missing)
    checks = {check.name: check for check in verify.verify()}
    assert not checks["weights"].ok
    assert "run this" in checks["weights"].found
    assert "NOT  weights" in verify.as_text(list(checks.values()))
    assert "✗" in verify.as_markdown(list(checks.values()))
