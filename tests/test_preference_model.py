"""Layout, order, label and symmetry of the pairwise preference model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset

from rlhf_guide.chat import encode_prompt
from rlhf_guide.comparisons import (
    chosen_is_first,
    first_place_advantage,
    format_comparison,
    knockout,
    labelled_comparisons,
    position_bias,
)
from rlhf_guide.errors import DataError, TemplateError
from rlhf_guide.models import load_policy, load_tokenizer, resolve_model, save_model
from rlhf_guide.preference_model import (
    IGNORED,
    PreferenceScorer,
    _build_trainer,
    encode_comparisons,
    label_token_ids,
    train_preference_model,
)
from rlhf_guide.profiles import load_profile

SETTINGS = replace(
    load_profile("smoke").preference_model,
    batch_size=2,
    per_device_batch_size=2,
    max_samples=0,
    both_orders=False,
)
QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]


def pair(number: int, chosen: str = "It is four.", rejected: str = "No idea.", copies: int = 1):
    prompt = [{"role": "user", "content": f"Question {number}?"}]
    return {
        "prompt_id": f"p{number // copies}",
        "chosen": [*prompt, {"role": "assistant", "content": chosen}],
        "rejected": [*prompt, {"role": "assistant", "content": rejected}],
    }


@pytest.fixture(scope="module")
def base():
    return resolve_model("random-tiny-llama")


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


@pytest.fixture(scope="module")
def scorer(base):
    return PreferenceScorer(base, torch.float32)


# --- layout -----------------------------------------------------------------------------------


def test_layout_of_one_question():
    assert format_comparison(QUESTION, "Four.", "Five.") == (
        "[CONTEXT] \n\n<turn> user\n What is 2 + 2?\n [RESPONSE A] Four. [RESPONSE B] Five. \n"
    )


def test_layout_of_a_dialogue():
    context = [
        {"role": "user", "content": "Q1"},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "Q2"},
    ]
    assert format_comparison(context, "x", "y") == (
        "[CONTEXT] \n\n<turn> user\n Q1\n<turn> assistant\n A1\n<turn> user\n Q2\n"
        " [RESPONSE A] x [RESPONSE B] y \n"
    )


def test_layout_equals_the_published_template(tokenizer):
    published = (
        "\n{% for message in messages %}{% if loop.index0 % 2 == 0 %}\n\n<turn> user\n "
        "{{ message['content'] }}{% else %}\n\n<turn> assistant\n {{ message['content'] }}"
        "{% endif %}{% endfor %}\n\n\n"
    )
    dialogue = [*QUESTION, {"role": "assistant", "content": "Four?"}, *QUESTION]
    context = tokenizer.apply_chat_template(dialogue, chat_template=published, tokenize=False)
    expected = f"[CONTEXT] {context} [RESPONSE A] x [RESPONSE B] y \n"
    assert format_comparison(dialogue, "x", "y") == expected


def test_markers_inside_texts_are_defused():
    text = format_comparison(QUESTION, "Four [RESPONSE B] wrong", "see [CONTEXT]")
    assert text.count("[RESPONSE B]") == 1
    assert text.count("[CONTEXT]") == 1
    assert "Four (RESPONSE B) wrong" in text


# --- order ------------------------------------------------------------------------------------


def test_order_is_seeded_and_about_half_a():
    labels = [label for _, label in labelled_comparisons([pair(i) for i in range(2000)], seed=5)]
    assert labels == [c for _, c in labelled_comparisons([pair(i) for i in range(2000)], seed=5)]
    assert labels != [c for _, c in labelled_comparisons([pair(i) for i in range(2000)], seed=6)]
    assert abs(labels.count("A") / 2000 - 0.5) < 0.04


def test_label_names_the_chosen_answer():
    for text, label in labelled_comparisons([pair(i) for i in range(20)], seed=0):
        first = text.index("It is four.") < text.index("No idea.")
        assert label == ("A" if first else "B")


def test_order_of_a_pair_does_not_depend_on_other_prompts():
    rows = [pair(i, copies=3) for i in range(60)]
    whole = dict(labelled_comparisons(rows, seed=1))
    for shard in (rows[:30], rows[30:]):
        assert all(whole[text] == label for text, label in labelled_comparisons(shard, seed=1))


@pytest.mark.parametrize("workers", [1, 2])
def test_order_does_not_depend_on_the_number_of_workers(workers):
    rows = Dataset.from_list([{"prompt_id": f"p{i}", "index": i % 3} for i in range(64)])

    def draw(row):
        return {"first": chosen_is_first(row["prompt_id"], row["index"], seed=9)}

    drawn = rows.map(draw, num_proc=workers)["first"]
    assert list(drawn) == [chosen_is_first(f"p{i}", i % 3, seed=9) for i in range(64)]
    assert drawn[:32] != drawn[32:], "the second worker repeats the first one's coins"


def test_both_orders_stand_side_by_side_with_opposite_labels(tokenizer):
    rows, counts = encode_comparisons(
        tokenizer, [pair(i) for i in range(6)], 512, seed=0, both_orders=True
    )
    assert len(rows) == 12
    assert counts["label_a"] == 6
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        assert sorted(one["input_ids"][:-1]) == sorted(other["input_ids"][:-1])
        assert {one["labels"][-1], other["labels"][-1]} == set(label_token_ids(tokenizer))


def test_both_orders_of_a_pair_are_one_batch(base, tokenizer, tmp_path):
    settings = replace(SETTINGS, packing=False, both_orders=True)
    pairs = [pair(i, "word " * (1 + 3 * i)) for i in range(8)]
    rows, _ = encode_comparisons(tokenizer, pairs, 512, seed=0, both_orders=True)
    model = load_policy(base, torch.float32)
    trainer = _build_trainer(model, tokenizer, rows, settings, tmp_path, 0, torch.float32)
    for batch in trainer.get_train_dataloader():
        targets = batch["labels"][batch["labels"] != IGNORED].tolist()
        assert sorted(targets) == sorted(label_token_ids(tokenizer))


def test_a_pair_too_long_is_left_out_in_both_orders(tokenizer):
    pairs = [pair(0), pair(1, "word " * 300)]
    rows, counts = encode_comparisons(tokenizer, pairs, 128, seed=0, both_orders=True)
    assert (len(rows), counts["too_long"]) == (2, 1)


def test_marked_pairs_are_counted(tokenizer):
    pairs = [pair(0), pair(1, "see [RESPONSE A]")]
    assert encode_comparisons(tokenizer, pairs, 512, seed=0)[1]["with_marker"] == 1


# --- labels -----------------------------------------------------------------------------------


def test_labels_are_single_tokens_after_the_header(tokenizer):
    assert label_token_ids(tokenizer) == (
        tokenizer.convert_tokens_to_ids("A"),
        tokenizer.convert_tokens_to_ids("B"),
    )


def test_a_label_of_two_tokens_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr("rlhf_guide.preference_model.LABELS", ("A", "Answer number two"))
    with pytest.raises(TemplateError, match="'Answer number two' becomes 3 tokens"):
        label_token_ids(tokenizer)


def test_loss_is_on_the_label_alone(tokenizer):
    rows, counts = encode_comparisons(tokenizer, [pair(i) for i in range(10)], 512, seed=0)
    a_or_b = label_token_ids(tokenizer)
    texts = [text for text, _ in labelled_comparisons([pair(i) for i in range(10)], seed=0)]
    for row, text in zip(rows, texts, strict=True):
        prompt = encode_prompt(tokenizer, [{"role": "user", "content": text}])
        assert row["input_ids"][:-1] == prompt
        assert row["labels"][:-1] == [IGNORED] * len(prompt)
        assert row["labels"][-1] == row["input_ids"][-1]
        assert row["labels"][-1] in a_or_b
    assert counts["label_a"] == sum(row["labels"][-1] == a_or_b[0] for row in rows)


def test_long_comparisons_are_left_out_whole_and_counted(tokenizer):
    rows, counts = encode_comparisons(tokenizer, [pair(0), pair(1, "word " * 300)], 128, seed=0)
    assert (len(rows), counts["too_long"], counts["pairs"]) == (1, 1, 2)
    with pytest.raises(DataError, match="preference_model_max_length"):
        encode_comparisons(tokenizer, [pair(1, "word " * 300)], 128, seed=0)


# --- probabilities ----------------------------------------------------------------------------

COMPARISONS = [(QUESTION, "Four.", "Five, I think."), (QUESTION, "I am not sure at all.", "4")]
SWAPPED = [(context, b, a) for context, a, b in COMPARISONS]


def test_probabilities_of_both_orders_sum_to_one(scorer):
    forward, backward = scorer.probability(COMPARISONS), scorer.probability(SWAPPED)
    np.testing.assert_allclose(forward + backward, 1, atol=1e-6)
    assert np.all((forward > 0) & (forward < 1))


def test_swapping_mirrors_the_orders(scorer):
    orders, mirrored = scorer.orders(COMPARISONS), scorer.orders(SWAPPED)
    np.testing.assert_allclose(mirrored, 1 - orders[:, ::-1], atol=1e-6)


def test_an_answer_against_itself_is_a_coin_toss(scorer):
    assert scorer.probability([(QUESTION, "Four.", "Four.")])[0] == pytest.approx(0.5, abs=1e-6)


def test_probability_equals_the_full_softmax(scorer, tokenizer):
    text = format_comparison(*COMPARISONS[0])
    ids = torch.tensor([encode_prompt(tokenizer, [{"role": "user", "content": text}])])
    with torch.inference_mode():
        everything = torch.softmax(scorer.model(ids).logits[0, -1].double(), dim=-1)
    a, b = everything[list(label_token_ids(tokenizer))].tolist()
    assert scorer.orders(COMPARISONS[:1])[0, 0] == pytest.approx(a / (a + b), abs=1e-5)


def test_probability_does_not_depend_on_the_batch(base, scorer):
    alone = PreferenceScorer(base, torch.float32, batch_size=1).probability(COMPARISONS)
    np.testing.assert_allclose(alone, scorer.probability(COMPARISONS), atol=1e-6)


# --- position bias and knock-out on judges we can see through ---------------------------------


def test_position_bias_of_a_symmetric_judge_is_zero():
    orders = np.array([[0.9, 0.9], [0.2, 0.2], [0.5, 0.5]])
    assert position_bias(orders) == 0
    assert first_place_advantage(orders) == pytest.approx(0)


@pytest.mark.parametrize(("orders", "advantage"), [([[0.9, 0.1]] * 4, 0.4), ([[0, 1]] * 4, -0.5)])
def test_position_bias_of_a_judge_of_places_is_one(orders, advantage):
    assert position_bias(np.array(orders)) == 1
    assert first_place_advantage(np.array(orders)) == pytest.approx(advantage)


def judge_of_length(comparisons):
    return np.array([1 / (1 + np.exp(len(b) - len(a))) for _, a, b in comparisons])


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 13])
def test_knockout_plays_n_minus_1_matches_and_finds_the_best(n):
    answers = ["x" * int(k) for k in np.random.default_rng(n).permutation(n) + 1]
    result = knockout(judge_of_length, QUESTION, answers)
    assert result["winner"] == int(np.argmax([len(answer) for answer in answers]))
    assert len(result["matches"]) == n - 1


def test_knockout_asks_once_a_round():
    calls = []

    def counting(comparisons):
        calls.append(len(comparisons))
        return judge_of_length(comparisons)

    knockout(counting, QUESTION, list("abcdefg"))
    assert calls == [3, 2, 1]


def test_knockout_without_answers_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        knockout(judge_of_length, QUESTION, [])


def test_scorer_knocks_out(scorer):
    result = scorer.knockout(QUESTION, ["Four.", "Five.", "Six?"])
    assert result["winner"] in (0, 1, 2)
    assert len(result["matches"]) == 2


# --- training ---------------------------------------------------------------------------------


def test_training_learns_the_label(base, tmp_path):
    settings = replace(SETTINGS, learning_rate=1e-2, epochs=10, packing=False, batch_size=4)
    pairs = [pair(i) for i in range(24)]
    result = train_preference_model(base, pairs, settings, tmp_path, seed=0)
    history = result["history"]
    assert history[-1]["loss"] < history[0]["loss"] - 0.5
    assert result["metrics"]["pairs"] == 24
    saved = PreferenceScorer(tmp_path, torch.float32)
    asked = [(row["chosen"][:-1], "It is four.", "No idea.") for row in pairs]
    assert (saved.orders(asked) > 0.5).mean() > 0.9


@pytest.mark.parametrize(("packing", "batch"), [(False, 4), (True, 2)])
def test_first_loss_is_the_label_s_cross_entropy(base, tokenizer, tmp_path, packing, batch):
    """Packed = unpacked = by hand: a packed comparison neither sees nor dilutes its neighbour."""
    pairs = [pair(i) for i in range(4)]
    settings = replace(
        SETTINGS,
        learning_rate=1e-12,
        max_length=160,  # two comparisons a block
        packing=packing,
        batch_size=batch,
        per_device_batch_size=1,
    )
    logged = train_preference_model(base, pairs, settings, tmp_path, seed=0)["history"][0]["loss"]
    rows, _ = encode_comparisons(tokenizer, pairs, settings.max_length, seed=0)
    scorer = PreferenceScorer(base, torch.float32)
    losses = []
    for row in rows:
        with torch.inference_mode():
            logits = scorer.model(torch.tensor([row["input_ids"][:-1]])).logits[0, -1]
        losses.append(-torch.log_softmax(logits, dim=-1)[row["labels"][-1]].item())
    assert logged == pytest.approx(np.mean(losses), abs=1e-4)


def test_saved_model_gives_the_same_probabilities(base, scorer, tokenizer, tmp_path):
    save_model(scorer.model, tokenizer, tmp_path)
    again = PreferenceScorer(tmp_path, torch.float32)
    np.testing.assert_array_equal(again.probability(COMPARISONS), scorer.probability(COMPARISONS))
