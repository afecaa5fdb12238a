"""Publishing: outputs go in, nothing else changes, and only those of a true cpu run."""

import shutil
from pathlib import Path

import fake_course
import nbformat
import pytest

from rlhf_guide import publish
from rlhf_guide.course import run_course
from rlhf_guide.errors import GuideError
from rlhf_guide.files import read_json, write_json
from rlhf_guide.notebook import time_table
from rlhf_guide.sources import code_cells, source_hash

ROOT = Path(__file__).resolve().parent.parent
BOX = "from rlhf_guide.notebook import time_box\ntime_box('03_reward_model')"
PATHS = "import os\nprint(os.getcwd() + '/file')\n1 + 1"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A finished cpu run of the small course; tests work on copies."""
    folder = tmp_path_factory.mktemp("publish")
    third = fake_course.notebook(BOX, PATHS, fake_course.FIGURE)
    notebooks = fake_course.write_course(folder, {"03_reward_model": third})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        run_course("cpu", run_dir=folder / "run", notebooks=notebooks, say=lambda _: None)
    return folder


@pytest.fixture
def project(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "project"))


def do(project):
    return publish.publish(project / "run", project / "notebooks", project / "timings.json")


def read(project, stem="03_reward_model"):
    return nbformat.read(project / "notebooks" / f"{stem}.ipynb", as_version=4)


def test_outputs_arrive_and_the_source_stays(project, original):
    assert len(do(project)) == 3
    before, after = read(original), read(project)
    nbformat.validate(after)
    assert [cell.source for cell in before.cells] == [cell.source for cell in after.cells]
    assert source_hash(before) == source_hash(after) == after.metadata.rlhf_guide.source_hash
    assert after.metadata.rlhf_guide.profile == "cpu"
    assert after.metadata.rlhf_guide.versions.torch
    assert after.metadata.rlhf_guide.seconds > 0
    assert after.metadata.keys() == {"kernelspec", "language_info", "rlhf_guide"}
    cells = code_cells(after)
    assert [cell.execution_count for cell in cells] == [1, 2, 3, 4]
    assert cells[2].outputs[-1].data["text/plain"] == "2"
    assert all(set(cell.metadata) <= {"tags", "mystnb"} for cell in after.cells)
    alt = cells[3].metadata.mystnb.image.alt
    assert alt == "A flat line at 0.5 & <nothing> else" == cells[3].outputs[0].data["text/plain"]


def test_machine_paths_are_shortened(project, original):
    executed = project / "run" / "notebooks" / "03_reward_model.ipynb"
    executed.write_text(executed.read_text().replace(str(original), str(project)))
    do(project)
    output = code_cells(read(project))[2].outputs[0].text
    assert output == "notebooks/file\n"


def test_time_boxes_show_this_run(project):
    do(project)
    measured = read_json(project / "timings.json")
    assert measured["cpu"].keys() == {
        "01_preference_data",
        "02_sft_with_packing",
        "03_reward_model",
    }
    box = code_cells(read(project))[1].outputs[0].data["text/markdown"]
    assert box == time_table("03_reward_model", measured)
    assert "| `cpu` | not measured" not in box
    assert "| `paper` | not measured yet" in box


def test_publishing_twice_changes_nothing(project):
    do(project)
    first = {path.name: path.read_bytes() for path in (project / "notebooks").iterdir()}
    do(project)
    assert first == {path.name: path.read_bytes() for path in (project / "notebooks").iterdir()}


def change_record(project, **change):
    path = project / "run" / "notebooks" / "02_sft_with_packing.json"
    write_json(path, read_json(path) | change)


def other_profile(project):
    path = project / "run" / "run.json"
    write_json(path, read_json(path) | {"profile": "smoke"})


def other_source(project):
    path = project / "notebooks" / "02_sft_with_packing.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1].source += "\n2"
    nbformat.write(notebook, path)


def large_output(project):
    path = project / "run" / "notebooks" / "03_reward_model.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1].outputs = [nbformat.v4.new_output("stream", text="x" * 301_000)]
    nbformat.write(notebook, path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (other_profile, "profile smoke, not cpu"),
        (other_source, "code of 02_sft_with_packing.ipynb has changed"),
        (large_output, "03_reward_model.ipynb would be 30"),
        (lambda p: change_record(p, status="failed"), "has not finished"),
        (lambda p: change_record(p, parameters={"seed": 1}), "other numbers"),
        (lambda p: change_record(p, settings_hash="0"), "other numbers"),
    ],
)
def test_refusals_write_nothing(project, damage, words):
    damage(project)
    before = {path.name: path.read_bytes() for path in (project / "notebooks").iterdir()}
    with pytest.raises(GuideError, match=words):
        do(project)
    assert before == {path.name: path.read_bytes() for path in (project / "notebooks").iterdir()}
    assert not (project / "timings.json").exists()
