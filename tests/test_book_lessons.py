"""Every chapter is a lesson: the same skeleton, with a prediction to write before the results."""

import re
from pathlib import Path

import pytest
from solutions import exercises

from rlhf_guide.sources import code_cells, read_notebook

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))
# What every chapter has, in this order.
SKELETON = (
    r"\*\*You will be able to\*\*",
    r"\*\*Prerequisites:\*\*",
    r"^time_box\(",
    r"^settings, ws = start\(",
    r"\*\*Predict first",
    r"^#+ .*[Cc]hecks?$",
    r"^assert ",
    r"^## What broke for others$",
    r"^## Exercises$",
    r"^## Summary$",
    r"^\*\*Next:\*\*",
)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_chapter_has_the_whole_skeleton_in_order(path):
    text = "\n".join(cell.source for cell in read_notebook(path).cells)
    place = 0
    for part in SKELETON:
        found = re.compile(part, re.MULTILINE).search(text, place)
        assert found, f"no {part} where it belongs"
        place = found.end()


def test_the_chapters_in_figures(capsys):
    """Prints cells, longest code cell, figures, exercises and size of every chapter."""
    rows = [("chapter", "cells", "longest", "figures", "exercises", "kB")]
    for path in NOTEBOOKS:
        notebook = read_notebook(path)
        outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
        figures = sum("image/png" in output.get("data", {}) for output in outputs)
        longest = max(len(cell.source.splitlines()) for cell in code_cells(notebook))
        kilobytes = path.stat().st_size // 1000
        rows.append(
            (path.stem, len(notebook.cells), longest, figures, len(exercises(path)), kilobytes)
        )
    with capsys.disabled():
        print()
        for name, *figures in rows:
            print(f"{name:24}", *(f"{figure:>10}" for figure in figures))
    assert all(row[4] >= 3 for row in rows[1:])
