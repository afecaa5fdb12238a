"""The gallery's cases that train nothing, on the embedded miniature; resuming."""

import pytest

from data_prep.embedded import load_prompts
from rlhf_guide import detectors, gallery
from rlhf_guide.models import resolve_model
from rlhf_guide.profiles import load_profile
from rlhf_guide.sources import list_notebooks, notebooks_dir
from rlhf_guide.workspace import open_run, write_jsonl


def demonstration(prompt):
    answer = {"role": "assistant", "content": prompt["reference"]}
    return {"id": prompt["prompt_id"], "messages": [*prompt["messages"], answer]}


def pair(prompt, chosen, rejected, scores):
    sides = (("chosen", chosen), ("rejected", rejected))
    messages = {s: [*prompt["messages"], {"role": "assistant", "content": t}] for s, t in sides}
    ends = dict(zip(("chosen_score", "rejected_score"), scores, strict=True))
    return {"prompt_id": prompt["prompt_id"], **messages, **ends}


def pairs_of(prompt):
    long, short = " ".join(prompt["points"]), prompt["short"]
    yield pair(prompt, prompt["reference"], "No idea.", (2.0, 0.0))
    yield pair(prompt, short, f"Well, {long} {long}", (1.5, 0.5))


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    ws = open_run(load_profile("smoke"), tmp_path_factory.mktemp("gallery"))
    data = ws.stage("data", {})
    training = load_prompts("preference_train")[:12]
    rows = [row for prompt in training for row in pairs_of(prompt)]
    write_jsonl(data.dir / "preference_train.jsonl", rows)
    write_jsonl(data.dir / "sft.jsonl", [demonstration(prompt) for prompt in training])
    write_jsonl(data.dir / "prompts_evaluation.jsonl", load_prompts("evaluation")[:11])
    data.finish()
    sft = ws.stage("sft", {}, ["data"])
    (sft.dir / "model").symlink_to(resolve_model("random-tiny-llama"))
    sft.finish(files=[])
    return gallery.open_stage(ws)


UNTRAINED = (
    "doubled BOS",
    "truncated pairs",
    "contaminated packing",
    "β too small",
    "moving reference",
    "length hack",
    "noisy reward model",
    "stale data",
    "leaked evaluation prompts",
)


@pytest.mark.parametrize("name", UNTRAINED)
def test_only_the_broken_variant_is_found(stage, name):
    case = gallery.run_case(stage, name)
    assert not case["findings"]["healthy"]["fired"], case["findings"]["healthy"]
    assert case["findings"]["broken"]["fired"], case["findings"]["broken"]
    assert case["healthy"] != case["broken"]


@pytest.mark.parametrize("name", ["β too small", "moving reference", "stale data"])
@pytest.mark.parametrize("seed", [1, 4])
def test_thresholds_hold_on_other_seeds_than_the_chapter_s(stage, name, seed, tmp_path):
    make = gallery.CASES[name][0]
    findings = make(open_run(load_profile("smoke", seed=seed), tmp_path))["findings"]
    assert not findings["healthy"]["fired"], findings["healthy"]
    assert findings["broken"]["fired"], findings["broken"]


def test_a_finished_case_is_read_not_run_again(stage, monkeypatch):
    first = gallery.run_case(stage, "stale data")
    monkeypatch.setattr(gallery, "_run", None)
    assert gallery.run_case(stage, "stale data") == first
    assert gallery.index_row("stale data", first)["chapter"] == "07_online_dpo"


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
