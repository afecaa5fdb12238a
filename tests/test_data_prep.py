"""The embedded miniature: prompts, instructions, corruptions and balanced preference pairs."""

import json
from collections import Counter

import pytest

from data_prep import embedded, instructions, schema
from rlhf_guide import oracle


def all_prompts():
    return [prompt for split in embedded.SPLITS for prompt in embedded.load_prompts(split)]


def pairs(split, verbosity_bias=0.0, **kwargs):
    return embedded.build_pairs(
        split,
        lambda prompt, text, finish: oracle.utility(prompt, text, finish).total,
        oracle.annotator(verbosity_bias=verbosity_bias),
        **kwargs,
    )


def test_splits_are_disjoint_and_as_large_as_promised():
    ids = [prompt["prompt_id"] for prompt in all_prompts()]
    assert len(ids) == len(set(ids)) >= 400
    questions = [prompt["messages"][0]["content"] for prompt in all_prompts()]
    assert len(set(questions)) == len(questions)
    for split, per_section in embedded.SPLITS.items():
        sections = Counter(prompt["section"] for prompt in embedded.load_prompts(split))
        prompts = per_section * embedded.VARIANTS.get(split, 1)
        assert sections == dict.fromkeys(embedded.SECTIONS, prompts)


def test_variants_ask_one_question_of_one_split_for_different_formats():
    splits, kinds = {}, {}
    for split in embedded.SPLITS:
        for prompt in embedded.load_prompts(split):
            question = prompt["prompt_id"].rsplit("-", prompt["prompt_id"].count("-") - 1)[0]
            splits.setdefault(question, set()).add(split)
            kind = (prompt["instruction"] or {"kind": None})["kind"]
            assert kind not in kinds.setdefault(question, set())
            kinds[question].add(kind)
    assert len(splits) == 480
    assert all(len(found) == 1 for found in splits.values())


def test_most_prompts_carry_one_of_at_least_ten_kinds_of_instruction():
    kinds = Counter(p["instruction"]["kind"] for p in all_prompts() if p["instruction"])
    assert len(kinds) >= 10
    assert sum(kinds.values()) >= len(all_prompts()) / 2
    assert min(kinds.values()) >= 0.8 * max(kinds.values())


def test_every_reference_is_right_short_and_keeps_its_instruction():
    for prompt in all_prompts():
        truth = oracle.utility(prompt, prompt["reference"])
        assert truth.facts == truth.instruction == 1, prompt["prompt_id"]
        assert truth.repetition < 0.25
        assert len(prompt["reference"].split()) <= 60


def test_no_question_gives_all_its_facts_away():
    for prompt in all_prompts():
        assert oracle.facts_covered(prompt["facts"], prompt["messages"][0]["content"]) < 1


@pytest.mark.parametrize(
    ("instruction", "good", "bad"),
    [
        ({"kind": "at_most_words", "n": 3}, "one two three", "one two three four"),
        ({"kind": "at_least_words", "n": 3}, "one two three", "one two"),
        ({"kind": "one_sentence"}, "It is 3.5 metres long.", "It is. It was."),
        ({"kind": "n_sentences", "n": 2}, "Yes. It is 3.5 m.", "Yes."),
        ({"kind": "bullet_points", "n": 2}, "- a\n- b", "- a\n- b\n- c"),
        ({"kind": "bullet_points", "n": 2}, "- a\n\n- b", "Here:\n- a\n- b"),
        ({"kind": "numbered_list", "n": 2}, "1. a\n2. b", "1. a\n3. b"),
        ({"kind": "json_keys"}, '{"answer": "a", "reason": "b"}', '{"answer": "a"}'),
        ({"kind": "json_keys"}, '{"answer": "a", "reason": "b"}', 'Sure: {"answer": 1}'),
        ({"kind": "starts_with", "text": "Answer:"}, "Answer: yes", "The Answer: yes"),
        ({"kind": "ends_with", "text": "That is all."}, "Yes. That is all.", "That is all. Yes."),
        ({"kind": "no_commas"}, "a and b", "a, b"),
    ],
)
def test_each_check_tells_a_kept_instruction_from_a_broken_one(instruction, good, bad):
    assert instructions.kept(instruction, good)
    assert not instructions.kept(instruction, bad)
    assert not instructions.kept(instruction, "  \n")


def test_every_kind_is_worded_rendered_and_checked():
    assert set(instructions.WORDINGS) == set(instructions.CHECKS) == set(instructions.RENDERERS)
    for kind in instructions.KINDS:
        for values in instructions.PARAMETERS.get(kind, ({},)):
            assert "{" not in instructions.describe({"kind": kind, **values})


def test_corruptions_are_worse_than_the_reference_and_of_the_kind_they_claim():
    for prompt in all_prompts():
        spoiled = {c["kind"]: c for c in embedded.corruptions(prompt)}
        best = oracle.utility(prompt, prompt["reference"]).total
        wrong_format = spoiled["corruption:wrong_format"]["text"]
        if prompt["instruction"]:
            assert not instructions.kept(prompt["instruction"], wrong_format)
            assert oracle.utility(prompt, wrong_format).total < best
        assert oracle.repetition(spoiled["corruption:repetition"]["text"]) > 0.5
        assert spoiled["corruption:truncated"]["finish_reason"] == "length"


@pytest.mark.parametrize("split", ["preference_train", "preference_heldout"])
def test_length_does_not_give_the_better_answer_away(split):
    rows, counts = pairs(split)
    longer = [len(r["chosen"][-1]["content"]) > len(r["rejected"][-1]["content"]) for r in rows]
    assert 0.45 <= sum(longer) / len(longer) <= 0.55
    assert counts["kept"] == len(rows)
    assert sum(counts.values()) - counts["candidate_pairs"] == counts["candidate_pairs"]


def test_pairs_are_in_the_standard_format_and_reproducible():
    rows, _ = pairs("preference_heldout")
    assert rows == pairs("preference_heldout")[0]
    assert [schema.pair_problem(row) for row in rows] == [None] * len(rows)
    assert all(abs(row["chosen_score"] - row["rejected_score"]) >= 0.1 for row in rows)
    samples = sum("sample:" in row["chosen_kind"] + row["rejected_kind"] for row in rows)
    assert samples > len(rows) / 3  # real model samples, not corruptions alone


def test_annotator_is_noisy_in_the_measure_of_its_temperature():
    rows, _ = pairs("preference_train")
    agree = [row["chosen_score"] > row["rejected_score"] for row in rows]
    assert 0.8 < sum(agree) / len(agree) < 0.95


def test_stored_samples_are_of_this_deal():
    ids = {
        prompt["prompt_id"]
        for split in ("preference_train", "preference_heldout")
        for prompt in embedded.load_prompts(split)
    }
    assert set(embedded._samples()) == ids


def test_unknown_split_is_refused_by_name():
    with pytest.raises(schema.DataError, match="preference_heldout"):
        embedded.load_prompts("test")


USER, GOOD, BAD = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "assistant", "content": "Go away."},
)


@pytest.mark.parametrize(
    ("chosen", "rejected", "problem"),
    [
        ([USER, GOOD], [USER, BAD], None),
        ("Hi", [USER, BAD], "malformed"),
        ([], [], "malformed"),
        ([{"role": "user", "content": None}], [USER], "malformed"),
        ([USER, GOOD, USER, GOOD], [USER, BAD], "length_mismatch"),
        ([USER], [USER], "odd_length"),
        ([GOOD, USER], [BAD, USER], "role_order"),
        ([USER, {"role": "assistant", "content": " "}], [USER, BAD], "empty_turn"),
        ([{**USER, "content": "Hey"}, GOOD], [USER, BAD], "history_mismatch"),
        ([USER, GOOD], [USER, GOOD], "identical_answers"),
    ],
)
def test_pair_validator_names_the_broken_rule(chosen, rejected, problem):
    assert schema.pair_problem({"chosen": chosen, "rejected": rejected}) == problem


SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([USER, GOOD], None),
        ([SYSTEM, USER, GOOD], None),
        (None, "malformed"),
        ([SYSTEM, USER], "too_short"),
        ([GOOD, USER], "role_order"),
        ([USER, {"role": "assistant", "content": ""}], "empty_turn"),
        ([USER, GOOD, USER], "no_answer"),
    ],
)
def test_demonstration_validator_names_the_broken_rule(messages, problem):
    assert schema.demonstration_problem({"messages": messages}) == problem


def test_demonstrations_pass_their_own_filter():
    rows = embedded.load_demonstrations()
    assert len(rows) > 0
    assert all(schema.demonstration_problem(row) is None for row in rows)
    assert json.loads(json.dumps(rows)) == rows
