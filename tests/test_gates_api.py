"""The record of what the course uses of TRL and its neighbours, against the installed releases.

After a deliberate change of a version or of a call: `python tests/api/surface.py --record`.
"""

import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "api"))
import releases
import surface

RECORD = surface.read_record()
SOURCE = """
from trl import DPOTrainer as Trainer, SFTConfig
from trl.trainer import utils as tools
import datasets
class Mine(Trainer):
    def compute_ref_log_probs(self): ...
    def my_own(self): ...
datasets.load_from_disk(SFTConfig().output_dir)
mock.patch.object(tools, "_use_triton")
"""


def recorded(**parameters):
    return {"trl.DPOConfig": {"output_dir": "None", "beta": "0.1", **parameters}}


def test_names_are_read_from_imports_attributes_subclasses_and_patches():
    assert surface.names_in(SOURCE) == {
        "trl.DPOTrainer",
        "trl.DPOTrainer.compute_ref_log_probs",
        "trl.SFTConfig",
        "trl.trainer.utils",
        "trl.trainer.utils._use_triton",
        "datasets.load_from_disk",
    }


def test_the_record_holds_every_name_that_the_course_uses_and_no_other():
    assert list(RECORD["names"]) == surface.used_names(), "surface.py --record accepts the change"
    assert all(signature is not None for signature in RECORD["names"].values())


def test_nothing_moved_in_the_installed_releases():
    assert surface.differences(RECORD["names"], surface.installed_surface()) == []


def test_the_record_was_made_with_the_pinned_releases():
    pins = (surface.ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    for library, version in RECORD["versions"].items():
        if library != "vllm":  # pinned by its extra, in an environment of its own
            assert f"{library}=={version}" in pins
            assert metadata.version(library) == version


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({"trl.DPOConfig": None}, "trl.DPOConfig is gone"),
        ({"trl.New": {}}, "trl.New is used but not recorded"),
        ({"trl.DPOConfig": "module"}, "is module"),
        (recorded(beta="0.5"), "parameter beta was 0.1, is 0.5"),
        (recorded(data="required"), "parameter data is new and required"),
        ({"trl.DPOConfig": {"beta": "0.1"}}, "parameter output_dir is gone"),
    ],
)
def test_what_moved_is_named(now, words):
    (moved,) = surface.differences(recorded(), now)
    assert moved.startswith("trl.")
    assert words in moved


def test_a_new_optional_parameter_moves_nothing():
    assert surface.differences(recorded(), recorded(extra="None")) == []


def test_the_oldest_releases_are_read_from_the_ranges():
    bounds = releases.lower_bounds(["numpy>=2.1,<3", *(f"{n}>=1.2.3" for n in releases.LIBRARIES)])
    assert bounds == [f"{name}==1.2.3" for name in releases.LIBRARIES]
    project = tomllib.loads((surface.ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    assert len(releases.lower_bounds(project["dependencies"])) == len(releases.LIBRARIES)
