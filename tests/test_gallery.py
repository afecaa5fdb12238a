"""The gallery's cases fire on the broken run only, on other seeds than the chapter's."""

import pytest

from data_prep.embedded import load_demonstrations, load_prompts
from rlhf_guide import detectors, gallery
from rlhf_guide.gallery_case import described, draw, told
from rlhf_guide.gallery_training import PAIRS, trusted_pairs
from rlhf_guide.models import resolve_model
from rlhf_guide.oracle import utility
from rlhf_guide.profiles import load_profile
from rlhf_guide.reward_model import MAX_IDENTICAL_SHARE
from rlhf_guide.sources import list_notebooks, notebooks_dir
from rlhf_guide.workspace import Workspace, open_run, write_jsonl

SEEDS = (1, 2)
UNTRAINED = (
    "doubled BOS",
    "contaminated packing",
    "truncated pairs",
    "β too small",
    "moving reference",
    "stale data",
    "leaked evaluation prompts",
)
TRAINED = ("swapped labels", "noisy reward model", "length hack", "learning rate too high")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run whose data stage is the miniature and whose π0 is the random model."""
    ws = open_run(load_profile("smoke"), tmp_path_factory.mktemp("gallery") / "run")
    data = ws.stage("data", {})
    write_jsonl(data.dir / "sft.jsonl", load_demonstrations())
    write_jsonl(data.dir / "prompts_evaluation.jsonl", load_prompts("evaluation"))
    data.finish()
    sft = ws.stage("sft", {}, ["data"])
    (sft.dir / "model").symlink_to(resolve_model("random-tiny-llama"))
    sft.finish(files=[])
    return ws.path


def check(folder, name, seed):
    case = gallery.run_case(Workspace(folder, load_profile("smoke", seed=seed)), name)
    assert not case.healthy.fired, case.healthy
    assert case.broken.fired, case.broken
    for panel in case.panels:
        assert len(panel.healthy) == len(panel.broken) > 1
    return case


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", UNTRAINED)
def test_only_the_broken_twin_is_found(folder, name, seed):
    check(folder, name, seed)


@pytest.mark.trains
@pytest.mark.parametrize("name", TRAINED)
def test_only_the_broken_run_is_found(folder, name):
    check(folder, name, SEEDS[0])


def test_a_case_is_drawn_and_told(folder):
    case = check(folder, "moving reference", SEEDS[0])
    lines = [line for ax in draw(case).axes for line in ax.get_lines()]
    assert len(lines) == 2 * len(case.panels) + 1, "two curves each, and one limit"
    assert told(case).startswith("moving reference: healthy 0.")
    assert "(passes), broken 1." in told(case)
    assert "(fires), limit 1." in told(case)
    assert described(case).endswith(told(case))
    assert described(case).count("the last value is") == len(case.panels)


@pytest.mark.parametrize("seed", SEEDS)
def test_trusted_pairs_are_in_their_true_order_and_balanced_in_length(seed):
    prompts = {prompt["prompt_id"]: prompt for prompt in load_prompts("preference_train")}
    pairs = trusted_pairs(seed)
    assert len({pair["prompt_id"] for pair in pairs}) == PAIRS
    shorter = 0
    for pair in pairs:
        prompt = prompts[pair["prompt_id"]]
        better, worse = (pair[side][-1]["content"] for side in ("chosen", "rejected"))
        assert utility(prompt, better).total > utility(prompt, worse, "length").total
        shorter += len(better.split()) < len(worse.split())
    assert shorter == PAIRS / 2


def test_pairs_count_as_truncated_where_training_is_refused():
    finding = detectors.truncated_pairs([[1]], [[2]])
    assert finding.limit == MAX_IDENTICAL_SHARE


def test_every_case_names_a_chapter_that_exists():
    chapters = {path.stem for path in list_notebooks(notebooks_dir())}
    assert {chapter for _, chapter in gallery.CASES.values()} <= chapters


def test_the_index_in_the_book_names_every_case_its_detector_and_its_chapter():
    lines = (notebooks_dir().parent / "book/failure_index.md").read_text().splitlines()
    rows = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("| ")}
    assert set(rows) - {"failure", "---"} == set(gallery.CASES)
    for name, (make, chapter) in gallery.CASES.items():
        assert callable(getattr(detectors, make.__name__))
        assert f"`{make.__name__}`" in rows[name]
        assert f"{chapter}.ipynb" in rows[name]
