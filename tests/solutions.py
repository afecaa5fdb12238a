"""The exercises of the notebooks, as code that can run.

A chapter's `## Exercises` cell holds each exercise with a hint, a check and a typical wrong answer,
and the solutions in a fold. `python tests/solutions.py FOLDER` writes a copy of every notebook with
each wrong answer and each solution appended as cells: the check must refuse the first and pass the
second. `make notebooks` runs these copies.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

import nbformat

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("[0-9]*.ipynb"))
SOLUTIONS = "<details><summary>Solutions</summary>"

REFUSED = """{wrong}
try:
{check}
except AssertionError:
    pass
else:
    raise RuntimeError("the check of exercise {number} passes a wrong answer")"""


class Exercise(NamedTuple):
    """One exercise of a chapter; every field but the number is text, empty where it is missing."""

    number: int
    level: str
    hint: str
    check: str
    wrong: str
    solution: str


def exercises(path: Path) -> list[Exercise]:
    """The exercises of a notebook, in order; none when it has no such section."""
    cells = nbformat.read(path, as_version=4).cells
    texts = [cell.source for cell in cells if cell.source.startswith("## Exercises")]
    if not texts:
        texts = [c.source for c in cells if "\n## Exercises\n" in c.source]
    if not texts:
        return []
    section = texts[0].partition("## Exercises\n")[2].partition("\n## ")[0]
    questions, _, answers = section.partition(SOLUTIONS)
    solved = items(answers)
    return [
        Exercise(
            number,
            first(r"^\*(\w+)\.\*", text),
            first(r"<summary>Hint and check</summary>\s*(.+?)\s*```python", text),
            python(text),
            first(r"<!-- wrong: (.+?) -->", text),
            python(solved.get(number, "")),
        )
        for number, text in items(questions).items()
    ]


def items(text: str) -> dict[int, str]:
    """A Markdown text's numbered list: number to text, its indent taken off."""
    parts = re.split(r"^(\d+)\. ", text, flags=re.MULTILINE)
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return {int(n): re.sub(r"^   ", "", body, flags=re.MULTILINE) for n, body in pairs}


def first(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.DOTALL)
    return found.group(1) if found else ""


def python(text: str) -> str:
    """All Python blocks of a text, joined."""
    return "\n".join(re.findall(r"^```python\n(.*?)\n```", text, re.DOTALL | re.MULTILINE))


def cells_of(exercise: Exercise) -> list[str]:
    """Two cells: the solution and its check; the wrong answer, which the check must refuse."""
    indented = "\n".join("    " + line for line in exercise.check.splitlines())
    refused = REFUSED.format(wrong=exercise.wrong, check=indented, number=exercise.number)
    return [f"{exercise.solution}\n{exercise.check}", refused]


def write_copies(folder: Path) -> None:
    """Every notebook with its exercises' cells appended, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        for exercise in exercises(path):
            for place, source in enumerate(cells_of(exercise)):
                name = f"exercise-{exercise.number}-{place}"
                notebook.cells.append(nbformat.v4.new_code_cell(source, id=name))
        nbformat.write(notebook, folder / path.name)


if __name__ == "__main__":
    write_copies(Path(sys.argv[1]))
