"""Invariants of the Bradley–Terry reward model, in float32 on the random tiny Llama."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from rlhf_guide import batching, reward_model
from rlhf_guide.batching import (
    bucketed_order,
    last_hidden_states,
    last_hidden_states_read_once,
    sample_rows,
)
from rlhf_guide.chat import encode_conversation, end_of_turn_id
from rlhf_guide.errors import DataError, WeightsError
from rlhf_guide.models import load_reward_model, load_tokenizer, resolve_model
from rlhf_guide.pair_accuracy import (
    calibration_error_by_chance,
    expected_calibration_error,
    length_baseline,
    reliability,
    score_pairs,
)
from rlhf_guide.profiles import load_profile
from rlhf_guide.reward_model import (
    RewardScorer,
    bradley_terry_loss,
    encode_pairs,
    train_reward_model,
)
from rlhf_guide.token_trees import tree_rows

SETTINGS = replace(load_profile("smoke").reward_model, batch_size=4, per_device_batch_size=4)


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def pair(number: int, chosen: str, rejected: str) -> dict:
    question = f"Question {number}: what do you say to {'x ' * (number % 5)}?"
    return {
        "prompt_id": f"p{number}",
        "section": "chat",
        "chosen": conversation(question, chosen),
        "rejected": conversation(question, rejected),
        "source": "test",
    }


PAIRS = [
    pair(i, f"A good answer {i}." + " yes" * i, f"Bad {i}." + " no" * (i % 3)) for i in range(8)
]
TALKS = [row[side] for row in PAIRS for side in ("chosen", "rejected")]


@pytest.fixture(scope="module")
def base():
    return resolve_model("random-tiny-llama")


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


def random_head(model_path, dtype):
    """A reward model whose head is random instead of zero, the same one at every call."""
    model = load_reward_model(model_path, dtype)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture(scope="module")
def scorer(base, tmp_path_factory):
    """A reward model with a random head, hardly trained, saved and loaded again."""
    folder = tmp_path_factory.mktemp("reward_model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward_model, "new_reward_model", random_head)
        settings = replace(SETTINGS, learning_rate=1e-12, batch_size=8, max_samples=0)
        result = train_reward_model(base, PAIRS, settings, folder, seed=0)
    scorer = RewardScorer(folder, torch.float32)
    scorer.first_step = result["history"][0]
    return scorer


def test_loss_equals_the_hand_value():
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    by_hand = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2
    assert bradley_terry_loss(chosen, rejected).item() == pytest.approx(by_hand, abs=1e-6)


def test_loss_ignores_a_constant_shift():
    chosen, rejected = torch.tensor([1.5, -0.3]), torch.tensor([0.2, 0.4])
    shifted = bradley_terry_loss(chosen + 7, rejected + 7)
    assert shifted.item() == pytest.approx(bradley_terry_loss(chosen, rejected).item(), abs=1e-6)


def test_swapped_pair_gives_the_complement():
    a, b = torch.tensor([0.8]), torch.tensor([-0.5])
    forward, backward = (math.exp(-bradley_terry_loss(*p).item()) for p in ((a, b), (b, a)))
    assert forward + backward == pytest.approx(1, abs=1e-6)


def test_first_logged_loss_is_ln_2(base, tmp_path):
    result = train_reward_model(base, PAIRS, SETTINGS, tmp_path, seed=0)
    assert result["history"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert len(result["history"]) == 2  # 8 pairs in batches of 4
    assert result["metrics"]["pairs"] == 8


@pytest.mark.parametrize("per_device", [8, 2])
def test_trl_logs_our_loss(base, scorer, tmp_path, monkeypatch, per_device):
    monkeypatch.setattr(reward_model, "new_reward_model", random_head)
    settings = replace(
        SETTINGS, learning_rate=1e-12, batch_size=8, per_device_batch_size=per_device, max_samples=0
    )
    logged = train_reward_model(base, PAIRS, settings, tmp_path, seed=0)["history"]
    rewards = torch.from_numpy(scorer.score(TALKS))
    ours = bradley_terry_loss(rewards[::2], rewards[1::2]).item()
    assert len(logged) == 1
    assert logged[0]["loss"] == pytest.approx(ours, abs=1e-5)


def test_trl_logs_our_accuracy(scorer):
    correct = [row["correct"] for row in score_pairs(scorer, PAIRS)]
    assert scorer.first_step["accuracy"] == pytest.approx(np.mean(correct), abs=1e-6)


def test_scores_do_not_depend_on_batch_or_order(scorer):
    together = scorer.score(TALKS, batch_size=len(TALKS))
    alone = scorer.score(TALKS, batch_size=1)
    backwards = scorer.score(TALKS[::-1], batch_size=3)[::-1]
    assert together.dtype == np.float32
    assert together.shape == (len(TALKS),)
    np.testing.assert_allclose(alone, together, atol=1e-5)
    np.testing.assert_allclose(backwards, together, atol=1e-5)


@pytest.mark.parametrize("row_tokens", [1, 100, 4096])
def test_reading_beginnings_once_changes_no_hidden_state(scorer, monkeypatch, row_tokens):
    """Forks at several depths, one sequence alone, equal ones, one that is another's beginning.

    In a row for each, in several rows that cut trees apart, and in one.
    """
    monkeypatch.setattr(batching, "tree_rows", partial(tree_rows, row_tokens=row_tokens))
    read = read_tokens(monkeypatch, scorer)
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(5, 400, (n,), generator=generator).tolist()  # noqa: E731
    trunk, other = draw(30), draw(3)
    limb = trunk + draw(120)
    stems = [trunk] * 4 + [limb] * 5 + [other] * 4 + [[]] * 3
    sequences = [stem + draw(1 + 7 * k % 11) for k, stem in enumerate(stems)]
    sequences += [sequences[0][:20], sequences[5], sequences[5], trunk]
    found = last_hidden_states_read_once(scorer.model, sequences, 0)
    assert (len(read) == 1) == (row_tokens == 4096)
    expected = last_hidden_states(scorer.model, sequences, 0, batch_size=4)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def read_tokens(monkeypatch, scorer):
    """The number of tokens of each forward pass from now on, as a list that grows."""
    read, backbone = [], type(scorer.model.base_model)
    forward = backbone.forward

    def counting(self, input_ids=None, **kwargs):
        read.append(input_ids.numel())
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(backbone, "forward", counting)
    return read


def test_a_beginning_is_read_once(scorer, monkeypatch):
    read = read_tokens(monkeypatch, scorer)
    sequences = [[*range(5, 45), 50 + k] for k in range(8)]
    last_hidden_states_read_once(scorer.model, sequences, 0)
    assert sum(read) == 40 + 8


def test_the_last_feed_forward_part_reads_ends_alone(scorer):
    """What it makes of all other tokens is never read."""
    sequences = [[*range(5, 45), 50 + k] for k in range(8)]
    read, last = [], scorer.model.base_model.layers[-1].mlp
    hook = last.gate_proj.register_forward_hook(lambda _, inputs, __: read.append(inputs[0].shape))
    found = last_hidden_states_read_once(scorer.model, sequences, 0)
    hook.remove()
    assert [tuple(shape[:2]) for shape in read] == [(1, 8)]
    torch.testing.assert_close(
        found, last_hidden_states(scorer.model, sequences, 0), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("case", ["plain", "family", "checkpointing"])
def test_when_the_last_feed_forward_part_is_left_out(scorer, monkeypatch, case):
    backbone = scorer.model.base_model
    if case == "family":  # its feed-forward part may give a tuple
        monkeypatch.setattr(backbone.config, "model_type", "mixtral")
    if case == "checkpointing":  # the backward pass would compute the layer as it is
        monkeypatch.setattr(type(backbone), "is_gradient_checkpointing", True)
    with batching.last_feed_forward_at(backbone, torch.tensor([[False, True]])):
        out = backbone.layers[-1].mlp(torch.ones(1, 2, backbone.config.hidden_size))
    assert out[0, 1].any()
    assert bool(out[0, 0].any()) == (case != "plain")


def test_an_empty_sequence_is_refused(scorer):
    for pool in (last_hidden_states, last_hidden_states_read_once):
        with pytest.raises(ValueError, match="empty sequence"):
            pool(scorer.model, [[5, 6], []], 0)


def test_pairs_of_one_answer_read_it_once(scorer, monkeypatch):
    """Six pairs of four answers to one question hold twelve conversations, of which four differ."""
    answers = [conversation("Why?", f"Because of {name}.") for name in ("me", "you", "us", "them")]
    pairs = [(a, b) for i, a in enumerate(answers) for b in answers[i + 1 :]]
    talks = [talk for pair in pairs for talk in pair]
    expected = scorer.score(answers)
    read = read_tokens(monkeypatch, scorer)
    scores = scorer.score(talks)
    assert sum(read) < len(encode_conversation(scorer.tokenizer, answers[0])) * 2
    found = {talk[-1]["content"]: score for talk, score in zip(talks, scores, strict=True)}
    assert [found[a[-1]["content"]] for a in answers] == pytest.approx(expected.tolist(), abs=1e-5)


def test_scores_do_not_depend_on_padding(scorer, tokenizer):
    ids = [encode_conversation(tokenizer, talk) for talk in TALKS]
    padded = [last_hidden_states(scorer.model, ids, pad, batch_size=16) for pad in (0, 77)]
    torch.testing.assert_close(*padded, atol=1e-5, rtol=1e-5)


def test_scores_equal_those_of_transformers(scorer, tokenizer):
    ids = [encode_conversation(tokenizer, talk) for talk in TALKS]
    batch = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
    with torch.inference_mode():
        theirs = scorer.model(**batch.to(scorer.model.device)).logits[:, 0].cpu().numpy()
    np.testing.assert_allclose(scorer.score(TALKS), theirs, atol=1e-5)


def test_answers_to_one_prompt_get_different_rewards(scorer):
    good, bad = scorer.score([conversation("Hi", "Good day"), conversation("Hi", "Go away")])
    assert abs(good - bad) > 1e-4


def test_truncation_keeps_the_end_of_the_answer(tokenizer):
    row = pair(1, "one two three four five six seven eight nine ten " * 3, "short answer")
    rows, counts = encode_pairs(tokenizer, [row], max_length=16)
    whole = encode_conversation(tokenizer, row["chosen"])
    assert rows[0]["chosen_ids"] == whole[-16:]
    assert rows[0]["chosen_ids"][-1] == end_of_turn_id(tokenizer)
    assert counts["truncated"] == 1
    assert counts["identical_after_truncation"] == 0


def test_empty_answers_are_counted(tokenizer):
    rows, counts = encode_pairs(tokenizer, [pair(1, "good", " "), pair(2, "a", "b")], 64)
    assert (len(rows), counts["pairs"], counts["empty_answer"]) == (2, 2, 1)


def with_scores(row, chosen, rejected):
    return {**row, "chosen_score": chosen, "rejected_score": rejected}


def test_margin_is_the_difference_of_scores_and_never_negative(tokenizer):
    scored = [with_scores(PAIRS[0], 2.0, 0.5), with_scores(PAIRS[1], 0.0, 1.0)]
    rows, _ = encode_pairs(tokenizer, scored, 64, margin=True)
    assert [row["margin"] for row in rows] == [1.5, 0.0]
    with pytest.raises(DataError, match=r"'p2' has no scores.*reward_model_margin=false"):
        encode_pairs(tokenizer, [with_scores(PAIRS[2], None, 1.0)], 64, margin=True)


def test_margin_and_centring_enter_the_loss(base, scorer, tmp_path, monkeypatch):
    """−log σ(r_w − r_l − m) + c · mean (r_w + r_l)², by hand from the scores."""
    monkeypatch.setattr(reward_model, "new_reward_model", random_head)
    options = {"learning_rate": 1e-12, "batch_size": 8, "per_device_batch_size": 8}
    settings = replace(SETTINGS, **options, max_samples=0, margin=True, centring=0.3)
    pairs = [with_scores(row, 1.0, 0.25) for row in PAIRS]
    logged = train_reward_model(base, pairs, settings, tmp_path, seed=0)["history"][0]["loss"]
    chosen, rejected = torch.from_numpy(scorer.score(TALKS)).view(-1, 2).T
    by_hand = bradley_terry_loss(chosen - 0.75, rejected) + 0.3 * ((chosen + rejected) ** 2).mean()
    assert logged == pytest.approx(by_hand.item(), rel=1e-6)


def test_adapters_sit_in_the_last_layers_only(base):
    model = load_reward_model(base, torch.float32)
    chosen = reward_model._adapter(replace(SETTINGS, lora_layers=1), model)
    assert chosen.layers_to_transform == [1]
    everywhere = reward_model._adapter(replace(SETTINGS, lora_layers=0), model)
    assert everywhere.layers_to_transform == [0, 1]
    assert reward_model._adapter(replace(SETTINGS, lora_rank=0), model) is None


def test_scorer_truncates_as_training_does(scorer):
    tail = "and this is the end of the answer, word for word the same"
    scorer.max_length, before = 8, scorer.max_length
    try:
        scores = scorer.score([conversation("A", f"x {tail}"), conversation("B", f"y y {tail}")])
    finally:
        scorer.max_length = before
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


def test_pairs_equal_after_truncation_are_counted_then_refused(tokenizer):
    tail = " the same end of the answer, word for word, for all who read it"
    same = [pair(i, "Yes." + tail, "No." + tail) for i in range(2)]
    fine = [pair(i, f"good {i}", f"bad {i}") for i in range(198)]
    rows, counts = encode_pairs(tokenizer, fine + same, max_length=12)
    assert counts["identical_after_truncation"] == 2
    assert len(rows) == 198
    with pytest.raises(DataError, match=r"3 of 200 .*reward_model_max_length"):
        encode_pairs(tokenizer, [*fine[1:], *same, same[0]], max_length=12)


def test_no_pairs_is_an_error(tokenizer):
    with pytest.raises(DataError, match="no preference pairs"):
        encode_pairs(tokenizer, [], max_length=64)


def test_a_language_model_without_head_is_refused(base):
    with pytest.raises(WeightsError, match="without a reward head"):
        RewardScorer(base)


@pytest.mark.parametrize("rank", [4, 0])
def test_training_learns_an_easy_rule(base, tmp_path, rank):
    settings = replace(SETTINGS, learning_rate=5e-3, epochs=6, lora_rank=rank, max_samples=0)
    pairs = [pair(i, f"yes {i}", f"no {i}") for i in range(12)]
    result = train_reward_model(base, pairs, settings, tmp_path, seed=0)
    heldout = [pair(i, f"yes {i}", f"no {i}") for i in range(20, 30)]
    rows = score_pairs(RewardScorer(tmp_path, torch.float32), heldout)
    assert np.mean([row["correct"] for row in rows]) >= 0.9
    assert result["history"][-1]["loss"] < 0.5


def test_half_precision_weights_start_at_ln_2_and_train(base, tmp_path):
    settings = replace(SETTINGS, learning_rate=5e-3, epochs=3)
    history = train_reward_model(base, PAIRS, settings, tmp_path, 0, torch.bfloat16)["history"]
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert history[-1]["loss"] < history[0]["loss"]


def test_length_baseline_chooses_its_rule_on_the_training_pairs():
    train = [pair(0, "long answer", "no"), pair(1, "a longer one", "no"), pair(2, "s", "long")]
    heldout = [pair(3, "tiny", "rather long"), pair(4, "rather long", "tiny"), pair(5, "ab", "cd")]
    assert length_baseline(train, heldout) == ("longer", [0.0, 1.0, 0.5])
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in train]
    assert length_baseline(swapped, heldout) == ("shorter", [1.0, 0.0, 0.5])


def test_reliability_of_a_known_judge():
    sure = math.log(9)  # σ(log 9) = 0.9
    rows = reliability([sure] * 9 + [-sure] + [0.0] * 10, bins=2)
    assert rows[0] == {"confidence": pytest.approx(0.5), "accuracy": 0.5, "n": 10}
    assert rows[1] == {"confidence": pytest.approx(0.9), "accuracy": pytest.approx(0.9), "n": 10}


def test_calibration_error_of_a_known_judge():
    sure = math.log(9)  # σ(log 9) = 0.9
    calibrated = [sure] * 9 + [-sure]
    assert expected_calibration_error(calibrated, bins=1) == pytest.approx(0)
    assert expected_calibration_error([sure] * 10, bins=1) == pytest.approx(0.1)
    assert expected_calibration_error([-sure] * 30 + [0.0] * 10, bins=1) == pytest.approx(0.675)
    by_chance = calibration_error_by_chance([sure] * 100, bins=1)
    # Mean distance of a share of 100 from its probability: √(2/π · 0.9 · 0.1 / 100).
    assert by_chance == pytest.approx(math.sqrt(2 / math.pi * 0.9 * 0.1 / 100), rel=0.15)
    assert calibration_error_by_chance([sure] * 10_000, bins=1, n_sim=50) < 0.1 * 0.05


def test_rewards_that_are_no_numbers_are_refused():
    class Broken:
        def score(self, conversations, batch_size=32):
            return np.full(len(conversations), np.nan)

    with pytest.raises(DataError, match="16 of 16 rewards are NaN"):
        score_pairs(Broken(), PAIRS)


def test_bucketed_order_is_a_permutation_with_similar_lengths():
    lengths = np.random.default_rng(0).integers(10, 200, size=103).tolist()
    order = bucketed_order(lengths, batch_size=4, seed=3)
    assert sorted(order) == list(range(103))
    assert order == bucketed_order(lengths, batch_size=4, seed=3)
    assert order != bucketed_order(lengths, batch_size=4, seed=4)

    def padded(indices):
        return sum(4 * max(lengths[i] for i in indices[k : k + 4]) for k in range(0, 100, 4))

    assert padded(order) < 0.9 * padded(range(103))


def test_sample_rows_is_spread_seeded_and_ordered():
    rows = list(range(100))
    some = sample_rows(rows, 10, seed=1)
    assert len(some) == 10
    assert some == sorted(some)
    assert max(some) > 50
    assert some == sample_rows(rows, 10, seed=1)
    assert sample_rows(rows, 0, seed=1) == rows
