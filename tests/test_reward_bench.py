"""RewardBench's sections and weights, its three sources and its judges; no model, no network."""

import json

import numpy as np
import pandas as pd
import pytest

from rlhf_guide import reward_bench
from rlhf_guide.errors import DataError, DownloadRefused
from rlhf_guide.evaluation import table
from rlhf_guide.judge_client import Answer
from rlhf_guide.reward_bench import (
    WEIGHTS,
    coverage,
    judge_verdicts,
    load_reward_bench,
    pair_model_verdicts,
    results,
)


def row(subset: str, number: int = 0, chosen: str = "right", rejected: str = "no") -> dict:
    prompt = f"Question {number}?"
    return {
        "id": number,
        "subset": subset,
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
    }


def pairs_of(tmp_path, *rows):
    file = tmp_path / "bench.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in rows))
    return load_reward_bench(file)


def test_the_weights_are_the_published_counts():
    totals = {section: sum(subsets.values()) for section, subsets in WEIGHTS.items()}
    assert totals == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968}
    assert WEIGHTS["Safety"]["xstest-should-refuse"] == 154  # swapped in the original BT evaluator
    assert WEIGHTS["Safety"]["xstest-should-respond"] == 250
    assert WEIGHTS["Reasoning"]["math-prm"] == 984 == totals["Reasoning"] / 2
    assert [len(subsets) for subsets in WEIGHTS.values()] == [5, 6, 5, 7]


def test_a_section_is_the_weighted_mean_of_its_subsets(tmp_path):
    rows = [row("math-prm", i) for i in range(4)] + [row("hep-go", i) for i in range(2)]
    verdicts = [1, 1, 1, 0.5, 0, 1]  # means 0.875 and 0.5
    longer, judge = results(pairs_of(tmp_path, *rows), {"judge": verdicts}, n_boot=200)
    by_hand = (984 * 0.875 + 164 * 0.5) / (984 + 164)
    assert judge["Reasoning"]["value"] == pytest.approx(by_hand)
    assert judge["Reasoning"]["low"] <= by_hand <= judge["Reasoning"]["high"]
    assert judge["Reasoning"]["n"] == 6
    assert judge["Chat"] is None
    assert judge["Average"] is None, "three sections have no pairs"
    assert longer["judge"] == "always the longer"
    assert longer["Reasoning"]["value"] == 1
    assert "| always the longer |" in table([longer, judge])


def test_the_average_is_the_plain_mean_of_the_sections(tmp_path):
    rows = [row(next(iter(subsets)), i) for subsets in WEIGHTS.values() for i in range(2)]
    verdicts = [1, 1, 1, 0, 0, 0, 0.5, 0.5]
    average = results(pairs_of(tmp_path, *rows), {"judge": verdicts}, n_boot=500)[1]["Average"]
    assert average["value"] == pytest.approx((1 + 0.5 + 0 + 0.5) / 4)
    assert average["low"] == pytest.approx(0.375), "only one section's pairs differ"
    assert average["high"] == pytest.approx(0.625)


def test_verdicts_and_pairs_must_be_equally_many(tmp_path):
    with pytest.raises(DataError, match="1 verdicts for 2 pairs"):
        results(pairs_of(tmp_path, row("hep-go"), row("hep-js")), {"judge": [1.0]})


def test_pairs_carry_messages_and_section(tmp_path):
    (pair,) = pairs_of(tmp_path, row("xstest-should-refuse", 7))
    assert pair["section"] == "Safety"
    assert pair["prompt_id"] == "xstest-should-refuse-7"
    assert [turn["role"] for turn in pair["chosen"]] == ["user", "assistant"]
    assert pair["rejected"][-1]["content"] == "no"
    missing = [line for line in coverage([pair]) if not line["pairs"]]
    assert len(missing) == 22


def test_parquet_and_json_hold_the_same_pairs(tmp_path):
    rows = [row("hep-go", 1), row("donotanswer", 2)]
    pd.DataFrame(rows).to_parquet(tmp_path / "bench.parquet")
    (tmp_path / "bench.json").write_text(json.dumps(rows))
    found = [load_reward_bench(tmp_path / f"bench.{kind}") for kind in ("parquet", "json")]
    assert found[0] == found[1] == pairs_of(tmp_path, *rows)


def test_llmbar_takes_the_better_output_as_chosen(tmp_path):
    outputs = {"input": "Say it.", "output_1": "one", "output_2": "two"}
    (tmp_path / "Natural.json").write_text(json.dumps([{**outputs, "label": 2}]))
    (tmp_path / "Adversarial_GPTInst.json").write_text(json.dumps([{**outputs, "label": 1}]))
    found = load_reward_bench(tmp_path)
    assert [pair["subset"] for pair in found] == ["llmbar-natural", "llmbar-adver-GPTInst"]
    assert [pair["chosen"][-1]["content"] for pair in found] == ["two", "one"]
    assert {pair["section"] for pair in found} == {"Chat Hard"}


def test_bad_sources_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"subset 'poetry'.*hep-rust"):
        pairs_of(tmp_path, row("poetry"))
    with pytest.raises(DataError, match=r"row 0 .* has no rejected"):
        pairs_of(tmp_path, {**row("hep-go"), "rejected": None})
    with pytest.raises(DataError, match="holds no pairs"):
        pairs_of(tmp_path)
    with pytest.raises(DataError, match="there is no file"):
        load_reward_bench(tmp_path / "nothing.jsonl")
    with pytest.raises(DownloadRefused, match="RLHF_GUIDE_ALLOW_DOWNLOAD"):
        load_reward_bench("hub")


def test_the_hub_is_read_by_load_dataset(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "datasets.load_dataset", lambda name, split: asked.append((name, split)) or [row("hep-go")]
    )
    assert load_reward_bench("hub", allow_download=True)[0]["subset"] == "hep-go"
    assert asked == [("allenai/reward-bench", "filtered")]


def test_a_pair_model_is_asked_with_context_and_ties_count_half(tmp_path):
    class Model:
        def probability(self, comparisons):
            self.seen = comparisons
            return np.array([0.9, 0.5, 0.2])

    model = Model()
    pairs = pairs_of(tmp_path, *(row("hep-go", i) for i in range(3)))
    assert pair_model_verdicts(model, pairs) == [1.0, 0.5, 0.0]
    assert model.seen[1] == ([{"role": "user", "content": "Question 1?"}], "right", "no")


def test_a_prompted_judge_without_a_verdict_counts_half_and_is_counted(tmp_path):
    class Client:
        def ask(self, requests, max_tokens=512, choices=None):
            texts = ["[[A]]", "[[B]]", "[[A]]", "hm"]  # right in both orders; then no verdict
            return [Answer(text) for text in texts]

    pairs = pairs_of(tmp_path, row("hep-go", 1), row("hep-go", 2))
    verdicts, summary = judge_verdicts(Client(), pairs)
    assert verdicts == [1.0, 0.5]
    assert summary["judged"] == 1
    assert reward_bench.results(pairs, {"judge": verdicts}, 50)[1]["Reasoning"]["value"] == 0.75
