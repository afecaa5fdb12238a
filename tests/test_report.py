"""The report: one JSON shape, a text table, an HTML page that stands alone, the README block."""

import json
import re
from pathlib import Path

import fake_course
import pytest

from rlhf_guide import report
from rlhf_guide.cli import main
from rlhf_guide.course import run_course
from rlhf_guide.errors import GuideError
from rlhf_guide.files import read_json
from rlhf_guide.profiles import load_profile
from rlhf_guide.studies import RESULTS
from rlhf_guide.workspace import open_run

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the small course with a figure."""
    folder = tmp_path_factory.mktemp("report")
    figure = fake_course.notebook(fake_course.FIGURE)
    notebooks = fake_course.write_course(folder, {"03_reward_model": figure})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        return run_course("smoke", run_dir=folder / "run", notebooks=notebooks, say=lambda _: None)


def test_json_has_the_agreed_shape(finished, capsys):
    assert main(["report", str(finished.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["profile", "seconds", "peak_gib", "stages", "metrics"]
    assert found["profile"] == "smoke"
    assert found["seconds"] > 0
    assert found["peak_gib"] > 0
    assert found["stages"]["sft"].keys() == {"seconds", "peak_gib", "status"}
    assert found["stages"]["sft"]["status"] == "finished"
    assert found["stages"]["evaluation"]["status"] == "missing"
    # numbers without an interval stay in their notebook
    assert found["metrics"] == {"utility_sft": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 100}}


def test_stage_begun_but_not_finished(finished):
    finished.stage("rewards", {})
    assert report.collect(finished)["stages"]["rewards"]["status"] == "unfinished"


def test_text(finished, capsys):
    assert main(["report", str(finished.path)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"utility_sft +0\.500 +0\.400 to 0\.600 +100", text)
    assert re.search(r"02_sft_with_packing +\d+ s +[\d.]+ GiB", text)
    assert "report.html" in text


def test_page_stands_alone_and_its_figures_have_words(finished):
    page = report.write_html(finished).read_text()
    assert 'alt="A flat line at 0.5 &amp; &lt;nothing&gt; else" src="data:image/png;base64,' in page
    assert "<td>utility_sft</td>" in page
    assert not re.search(r"https?://|<script|<link", page)


def test_readme_block(finished, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):  # writing it twice changes nothing
        assert main(["report", str(finished.path), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert "old" not in text
    assert "| utility_sft | 0.500 | 0.400 to 0.600 | 100 |" in text
    assert text.startswith("# Title\n")
    assert text.endswith("\nafter\n")
    readme.write_text("# No markers")
    with pytest.raises(GuideError, match="results:begin"):
        report.write_readme(finished, readme)


def test_the_course_s_seeds_stand_beside_a_run_of_its_settings_only(tmp_path):
    stored = read_json(RESULTS / "online_seeds.json")["metrics"]["online_minus_sft"]
    row = f"| seeds_online_minus_sft | {stored['value']:.3f} | {stored['low']:.3f} to "
    for name, shown in (("cpu", True), ("smoke", False)):
        text = report.as_markdown(open_run(load_profile(name), tmp_path / name))
        assert (row in text) == shown
        assert "seeds_sft" not in text  # differences only: levels are not the run's
    ws = open_run(load_profile("cpu"), tmp_path / "cpu")
    own = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    ws.stage("ablations", {}).finish({"seeds_online_minus_sft": own})
    lines = [x for x in report.as_markdown(ws).splitlines() if "seeds_online_minus_sft" in x]
    assert lines == ["| seeds_online_minus_sft | 0.500 | 0.400 to 0.600 | 9 |"]


def test_no_run_folder(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "is no run folder" in capsys.readouterr().err
