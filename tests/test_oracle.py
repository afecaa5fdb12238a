"""The true utility, term by term, and the simulated annotators."""

import math

import pytest

from rlhf_guide import oracle

PROMPT = {
    "facts": [["yeast"], ["carbon dioxide", "gas"], ["gluten"]],
    "instruction": {"kind": "at_most_words", "n": 8},
}


def test_facts_are_matched_as_words_in_any_case():
    assert oracle.facts_covered(PROMPT["facts"], "YEAST makes gas.") == pytest.approx(2 / 3)
    assert oracle.facts_covered(PROMPT["facts"], "gasoline") == 0
    assert oracle.facts_covered([["$5"]], "It costs $5.") == 1


def test_repetition_counts_repeated_trigrams():
    assert oracle.repetition("a b c d") == 0
    assert oracle.repetition("a b c a b c") == pytest.approx(1 - 3 / 4)
    assert oracle.repetition("no no") == 0


def test_each_term_enters_the_total_with_its_sign():
    good = oracle.utility(PROMPT, "Yeast makes gas and gluten traps it.")
    assert good.total == 2
    too_long = oracle.utility(PROMPT, "Yeast makes gas and then the gluten traps all of it.")
    assert too_long.total == 1
    assert oracle.utility(PROMPT, "Yeast makes gas and gluten", "length").total == 1.5
    rambling = oracle.utility({**PROMPT, "instruction": None}, " ".join(map(str, range(90))))
    assert rambling.rambling == pytest.approx(0.25)
    assert rambling.total == pytest.approx(0 + 1 - 0.25)


def test_an_empty_answer_is_worth_nothing():
    assert oracle.utility(PROMPT, "").total == 0
    assert oracle.utility({**PROMPT, "instruction": None}, " ").total == 0


def test_instruction_kept_is_none_without_an_instruction():
    assert oracle.instruction_kept({**PROMPT, "instruction": None}, "x") is None
    assert oracle.instruction_kept(PROMPT, "x") is True


def test_real_prompts_have_no_oracle():
    with pytest.raises(KeyError):
        oracle.utility({"instruction": None}, "x")


def test_preference_probability_is_bradley_terry():
    """(oracle 2): σ of the utility difference over the temperature; swapping gives 1 − p."""
    p = oracle.preference_probability(1.0, 0.5, temperature=0.25)
    assert p == pytest.approx(1 / (1 + math.exp(-2)))
    assert oracle.preference_probability(0.5, 1.0, temperature=0.25) == pytest.approx(1 - p)


def test_verbosity_bias_favours_the_longer_answer():
    fair = oracle.preference_probability(1, 1, 100, 50)
    biased = oracle.preference_probability(1, 1, 100, 50, verbosity_bias=0.25)
    assert fair == 0.5
    assert biased == pytest.approx(1 / (1 + math.exp(-1)))


def test_annotator_draws_with_the_right_frequency_and_repeats_itself():
    prefer = oracle.annotator(seed=1)
    a, b = {"text": "x", "utility": 0.25}, {"text": "y", "utility": 0.0}
    votes = [prefer(a, b, str(key)) for key in range(4000)]
    assert votes == [prefer(a, b, str(key)) for key in range(4000)]
    expected = 1 / (1 + math.exp(-1))
    assert abs(sum(votes) / 4000 - expected) < 4 * math.sqrt(expected * (1 - expected) / 4000)
    assert votes != [oracle.annotator(seed=2)(a, b, str(key)) for key in range(4000)]
