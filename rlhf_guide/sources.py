"""The notebooks as files: which there are, what parameters they take, a hash of their code."""

import ast
import hashlib
import re
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from .errors import GuideError, ParameterError

# Parameters that every notebook takes; the others are those of `profiles` that it uses.
RUN_PARAMETERS = ("profile", "run_dir", "seed")


def notebooks_dir(folder: Path | str | None = None) -> Path:
    """The folder of the notebooks: as given, `./notebooks`, this folder, or beside the package."""
    beside = Path(__file__).resolve().parent.parent / "notebooks"
    here = Path.cwd()
    candidates = [Path(folder)] if folder else [here / "notebooks", here, beside]
    for candidate in candidates:
        if any(candidate.glob("[0-9][0-9]_*.ipynb")):
            return candidate.resolve()
    raise GuideError(
        f"no notebooks in {candidates[0]}; run the command in the project's folder, or name the "
        "notebooks' folder with --notebooks."
    )


def list_notebooks(folder: Path) -> list[Path]:
    """The numbered notebooks of a folder in course order."""
    return sorted(folder.glob("[0-9][0-9]_*.ipynb"))


def select(notebooks: list[Path], only: str | None) -> list[Path]:
    """The notebooks named by `02-05`, `02,04` or `2-3,7`; all of them for None.

    Raises `ParameterError` for anything that is not a list of existing numbers.
    """
    if not only:
        return notebooks
    numbers = {int(path.name[:2]) for path in notebooks}
    wanted: set[int] = set()
    for part in only.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not match or not {first, last} <= numbers or last < first:
            known = ", ".join(f"{number:02d}" for number in sorted(numbers))
            raise ParameterError(
                f"--only {only}: {part.strip()!r} is no notebook or range such as 02-05; "
                f"there are {known}."
            )
        wanted |= set(range(first, last + 1))
    return [path for path in notebooks if int(path.name[:2]) in wanted]


def read_notebook(path: Path) -> NotebookNode:
    """A notebook in format 4; raises `GuideError` when the file is damaged."""
    try:
        return nbformat.read(path, as_version=4)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, UnicodeDecodeError) as error:
        raise GuideError(f"{path.name} is not a readable notebook: {error}") from error


def tagged(cell: NotebookNode, tag: str) -> bool:
    """Whether a cell carries a tag."""
    return tag in cell.metadata.get("tags", [])


def notebook_parameters(notebook: NotebookNode) -> list[str]:
    """The names assigned in the cell tagged `parameters`, in order; none without such a cell."""
    for cell in notebook.cells:
        if cell.cell_type == "code" and tagged(cell, "parameters"):
            assignments = [node for node in ast.parse(cell.source).body if _is_assignment(node)]
            return [_target(node) for node in assignments]
    return []


def _is_assignment(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign | ast.AnnAssign)


def _target(node: ast.stmt) -> str:
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
    return ast.unparse(target)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The notebook's code cells without the cell that papermill injects."""
    return [
        cell
        for cell in notebook.cells
        if cell.cell_type == "code" and not tagged(cell, "injected-parameters")
    ]


def source_hash(notebook: NotebookNode) -> str:
    """sha256 over the code cells' sources: outputs are current while it stays the same.

    Text cells do not count, for they change no output; neither does the injected cell.
    """
    digest = hashlib.sha256()
    for cell in code_cells(notebook):
        digest.update(cell.source.rstrip().encode() + b"\0")
    return digest.hexdigest()
