"""Gates over the notebooks as files: fast, no kernel. What a reader must never meet."""

import json
import re
from pathlib import Path

import pytest

from rlhf_guide.parameters import FLAT_FIELDS
from rlhf_guide.sources import (
    RUN_PARAMETERS,
    code_cells,
    notebook_parameters,
    read_notebook,
    source_hash,
    tagged,
)

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))

LONGEST_CELL = 25
LARGEST_KB = 300

# Signs of a warning, a traceback or this machine in a saved output.
UNWANTED_OUTPUT = re.compile(
    r"Warning\b|warnings\.warn|Traceback \(most recent|deprecated"
    r"|/home/|/root/|/tmp/|/work/|site-packages|https?://(?:localhost|127\.)"
)
UNWANTED_SOURCE = re.compile(
    r"^\s*[!%]|pip install|notebook_login|login\(|tqdm\.auto|tqdm\.notebook|\bTODO\b|\bFIXME\b",
    re.MULTILINE,
)

pytestmark = pytest.mark.skipif(not NOTEBOOKS, reason="no notebooks here")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return read_notebook(path)


def output_text(output):
    """All text of an output, images left out."""
    texts = [output.get("text", ""), "\n".join(output.get("traceback", []))]
    data = output.get("data", {})
    texts += [str(value) for media, value in data.items() if media.startswith("text/")]
    return "\n".join(texts)


def test_name_and_kernel(path, notebook):
    assert re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.nbformat == 4


def test_begins_with_a_title(notebook):
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")


def test_one_parameters_cell_and_only_the_time_box_stands_before_it(notebook):
    cells = code_cells(notebook)
    places = [place for place, cell in enumerate(cells) if tagged(cell, "parameters")]
    assert len(places) == 1
    assert all("time_box(" in cell.source for cell in cells[: places[0]])


def test_every_parameter_is_a_setting(notebook):
    names = notebook_parameters(notebook)
    assert set(RUN_PARAMETERS) <= set(names)
    unknown = set(names) - set(RUN_PARAMETERS) - set(FLAT_FIELDS)
    assert not unknown, f"no profile has {unknown}"
    assert len(names) == len(set(names))


def test_parameters_are_all_used(notebook):
    cells = [cell for cell in code_cells(notebook) if not tagged(cell, "parameters")]
    code = "\n".join(cell.source for cell in cells)
    unused = [name for name in notebook_parameters(notebook) if not re.search(rf"\b{name}\b", code)]
    assert not unused, f"set but never used: {unused}"


def test_no_injected_cell(notebook):
    assert not any(tagged(cell, "injected-parameters") for cell in notebook.cells)


def test_cells_are_short_and_none_is_empty(notebook):
    for cell in notebook.cells:
        assert cell.source.strip(), "an empty cell"
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= LONGEST_CELL, cell.source.splitlines()[0]


def test_no_installation_login_or_unfinished_work_in_the_source(notebook):
    for cell in notebook.cells:
        text = cell.source if cell.cell_type == "code" else re.sub(r"`[^`]*`", "", cell.source)
        if cell.cell_type == "code":
            assert not UNWANTED_SOURCE.search(text), cell.source
        else:
            assert "TODO" not in text


def test_checks_what_it_claims(notebook):
    assert any("assert " in cell.source for cell in code_cells(notebook))


def test_outputs_are_clean(path, notebook):
    assert "widgets" not in notebook.metadata
    for cell in code_cells(notebook):
        for output in cell.outputs:
            assert output.output_type != "error", cell.source
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
            unwanted = UNWANTED_OUTPUT.search(output_text(output))
            assert not unwanted, f"{unwanted[0]!r} in the output of:\n{cell.source}"


def test_figures_have_alternative_text(notebook):
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                alt = output.metadata.get("image/png", {}).get("alt", "")
                assert len(alt) > 20, cell.source


def test_stored_outputs_are_current(notebook):
    has_outputs = any(cell.outputs for cell in code_cells(notebook))
    stamp = notebook.metadata.get("rlhf_guide")
    if has_outputs:
        assert stamp, "outputs that `rlhf-guide publish` did not write: clear them"
        assert stamp["profile"] == "cpu"
        assert stamp["source_hash"] == source_hash(notebook), "stale: run and publish again"


def test_file_is_small_and_ends_with_a_newline(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) <= LARGEST_KB * 1000
    assert text.endswith("\n")
    json.loads(text)
