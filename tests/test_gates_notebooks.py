"""More gates over the notebooks as files: what their code, their prose and their links promise."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_guide.parameters import FLAT_FIELDS
from rlhf_guide.profiles import PROFILES
from rlhf_guide.sources import code_cells, notebook_parameters, read_notebook, tagged

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Folders of the checkout that prose may name; other paths lie in the reader's run folder.
FOLDERS = ("notebooks", "rlhf_guide", "data_prep", "tests", "book")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return read_notebook(request.param)


def prose(notebook):
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def code(notebook):
    return "\n".join(cell.source for cell in code_cells(notebook))


def test_no_cell_uses_a_name_that_is_not_defined_before_it():
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821,F823"]
    done = subprocess.run([*command, *NOTEBOOKS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_stored_outputs_come_from_one_run_from_top_to_bottom(notebook):
    cells = code_cells(notebook)
    counts = [cell.execution_count for cell in cells]
    if any(cell.outputs for cell in cells):
        assert counts == list(range(1, len(cells) + 1))
    else:
        assert not any(counts)


def test_seed_and_run_folder_reach_start(notebook):
    calls = [node for node in ast.walk(ast.parse(code(notebook))) if isinstance(node, ast.Call)]
    (start,) = [call for call in calls if getattr(call.func, "id", "") == "start"]
    assert [ast.unparse(given) for given in start.args] == ["profile", "run_dir"]
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in start.keywords}
    taken = set(notebook_parameters(notebook)) - {"profile", "run_dir"}
    assert given == {name: name for name in taken}


def test_defaults_leave_the_profile_s_values(notebook):
    (cell,) = [cell for cell in code_cells(notebook) if tagged(cell, "parameters")]
    values = {ast.unparse(node.targets[0]): node.value for node in ast.parse(cell.source).body}
    assert all(ast.literal_eval(value) in (None, "") for value in values.values())


def test_code_draws_no_unseeded_random_numbers(notebook):
    unseeded = r"default_rng\(\)|np\.random\.(?!default_rng)[a-z]\w*\("
    assert not re.search(unseeded, code(notebook))


def test_relative_links_lead_to_files_and_others_are_well_formed(notebook):
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)]*)\)", prose(notebook)):
        name = target.partition("#")[0]
        if re.match(r"[a-z]+:", target):
            assert re.fullmatch(r"https://[\w.-]+\.[a-z]{2,}(/\S*)?", target), target
        elif name:
            assert (ROOT / "notebooks" / name).exists(), target


def test_modules_functions_and_paths_in_the_prose_exist(notebook):
    text = re.sub(r"```.*?```", "", prose(notebook), flags=re.DOTALL)
    for name in re.findall(r"`((?:rlhf_guide|data_prep)(?:\.\w+)+)(?:\(\))?`", text):
        assert defined(name), name
    for path in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def test_notebooks_and_profiles_in_the_prose_exist(notebook):
    numbers = {path.stem[:2] for path in NOTEBOOKS}
    named = re.findall(r"\bnotebooks? (\d\d)\b", prose(notebook), re.IGNORECASE)
    assert set(named) <= numbers
    profiles = re.findall(r"`(\w+)` profile\b|\bprofile `(\w+)`", prose(notebook))
    assert {first or second for first, second in profiles} <= set(PROFILES)


def test_parameters_that_the_prose_sets_exist(notebook):
    written = re.findall(r"(?:--set|-p) (\w+)[= ]", prose(notebook))
    assert set(written) <= {*FLAT_FIELDS, "profile", "run_dir"}


def defined(name):
    """Whether a dotted name is a module here, or is defined in one. Reads sources only."""
    module, _, attribute = name.rpartition(".")
    here = ROOT / name.replace(".", "/")
    if here.is_dir() or here.with_suffix(".py").exists():
        return True
    source = (ROOT / module.replace(".", "/")).with_suffix(".py")
    pattern = rf"^\s*(def |class |){attribute}\b( = |\(|:)"
    return source.exists() and bool(re.search(pattern, source.read_text(), re.MULTILINE))
