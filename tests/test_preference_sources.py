"""The twelve preference sources: which raw rows survive, which are dropped, and why."""

import json
import subprocess
import sys
from functools import cache
from math import comb
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import filters, make_raw_preference, pairing
from data_prep.embedded import load_prompts
from data_prep.preference import SOURCES
from data_prep.schema import DataError, pair_problem
from data_prep.source import Rejected, Tally
from data_prep.transcript import read_transcript

RAW = Path(make_raw_preference.__file__).parent / "embedded" / "raw"

# Rows read, records kept, drops by reason, with the default options.
GOLDEN = {
    "hh_rlhf": (
        53,
        40,
        {
            "trailing_marker": 2,
            "no_markers": 2,
            "empty_turn": 1,
            "length_mismatch": 1,
            "odd_length": 2,
            "role_order": 1,
            "history_mismatch": 1,
            "identical_answers": 1,
            "wrong_type": 1,
            "broken_utf8": 1,
        },
    ),
    "shp": (
        62,
        46,
        {
            "over_cap": 2,
            "ratio_not_above": 2,
            "tie": 1,
            "nonpositive_score": 2,
            "label_contradicts_scores": 1,
            "malformed": 1,
            "missing_rating": 2,
            "identical_answers": 1,
            "empty_turn": 2,
            "wrong_type": 1,
            "broken_utf8": 1,
        },
    ),
    "helpsteer": (
        55,
        49,
        {
            "tie": 6,
            "missing_rating": 2,
            "identical_answers": 1,
            "empty_turn": 2,
            "too_few_answers": 1,
            "wrong_type": 2,
            "broken_utf8": 1,
        },
    ),
    "pku_saferlhf": (
        48,
        40,
        {
            "label_contradicts_scores": 1,
            "malformed": 1,
            "missing_rating": 1,
            "identical_answers": 1,
            "empty_turn": 1,
            "wrong_type": 2,
            "broken_utf8": 1,
        },
    ),
    "ultrafeedback": (
        50,
        240,
        {
            "tie": 20,
            "missing_rating": 4,
            "too_few_answers": 1,
            "identical_answers": 1,
            "empty_turn": 2,
            "empty_list": 1,
            "wrong_type": 2,
            "broken_utf8": 1,
        },
    ),
    "ultrainteract": (
        51,
        41,
        {
            "no_user_turn": 1,
            "role_order": 1,
            "empty_turn": 2,
            "unknown_role": 1,
            "empty_list": 1,
            "identical_answers": 1,
            "wrong_type": 2,
            "broken_utf8": 1,
        },
    ),
    "codeultrafeedback": (
        48,
        227,
        {
            "tie": 26,
            "missing_rating": 1,
            "answer_unmatched": 5,
            "too_few_answers": 1,
            "empty_list": 1,
            "wrong_type": 1,
            "empty_turn": 1,
        },
    ),
    "argilla_math": (
        49,
        41,
        {
            "tie": 1,
            "label_contradicts_scores": 1,
            "missing_rating": 2,
            "identical_answers": 1,
            "empty_turn": 1,
            "wrong_type": 1,
            "broken_utf8": 1,
        },
    ),
    "orca": (
        54,
        41,
        {
            "status_tie": 1,
            "tie": 1,
            "missing_rating": 2,
            "empty_list": 1,
            "length_mismatch": 1,
            "label_contradicts_scores": 2,
            "malformed": 1,
            "identical_answers": 1,
            "empty_turn": 1,
            "wrong_type": 1,
            "broken_utf8": 1,
        },
    ),
    "capybara": (
        54,
        41,
        {
            "tie": 1,
            "label_contradicts_scores": 1,
            "missing_rating": 1,
            "history_mismatch": 1,
            "length_mismatch": 1,
            "odd_length": 1,
            "role_order": 1,
            "unknown_role": 1,
            "identical_answers": 1,
            "empty_turn": 1,
            "empty_list": 1,
            "wrong_type": 1,
            "broken_utf8": 1,
        },
    ),
    "summarize": (
        51,
        41,
        {
            "malformed": 1,
            "missing_rating": 1,
            "length_mismatch": 1,
            "empty_list": 1,
            "identical_answers": 1,
            "empty_turn": 2,
            "wrong_type": 2,
            "broken_utf8": 1,
        },
    ),
    "nectar": (
        51,
        42,
        {
            "not_drawn": 107,
            "tie": 18,
            "missing_rating": 2,
            "empty_turn": 2,
            "identical_answers": 1,
            "broken_utf8": 1,
            "too_few_answers": 1,
            "empty_list": 1,
            "wrong_type": 2,
            "no_user_turn": 1,
            "no_markers": 1,
            "role_order": 1,
        },
    ),
}


@cache
def raw(name):
    """The stored rows of one source, without the lines that are no rows."""
    rows = []
    for line in (RAW / f"{name}.jsonl").read_text(encoding="ascii").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows += [row] if isinstance(row, dict) else []
    return rows


def convert(name, rows, **options):
    tally = Tally()
    return list(SOURCES[name].records(iter(rows), tally, **options)), tally


def changed(name, **fields):
    """The first clean row of a source with other fields."""
    return {**raw(name)[0], **fields}


def reasons(name, row, **options):
    records, tally = convert(name, [row], **options)
    return len(records), dict(tally.dropped)


def answers(record):
    return record["chosen"][-1]["content"], record["rejected"][-1]["content"]


@pytest.mark.parametrize("name", GOLDEN)
def test_the_miniature_is_kept_and_dropped_as_planned(name):
    records, tally = convert(name, raw(name))
    assert (tally.read, tally.kept, dict(tally.dropped)) == GOLDEN[name]
    assert len(records) == tally.kept
    for record in records:
        assert pair_problem(record) is None
        assert record["source"] == name
        assert record["prompt_id"] == filters.prompt_id(name, record["chosen"][:-1])
        if record["chosen_score"] is not None:
            assert record["chosen_score"] > record["rejected_score"]


def test_all_sources_are_here_with_the_counts_of_table_5():
    assert set(SOURCES) == set(GOLDEN) == set(make_raw_preference.MAKERS)
    counted = {name: source.paper["pairs"] for name, source in SOURCES.items() if source.paper}
    assert set(SOURCES) - set(counted) == {"summarize", "nectar"}
    assert sum(counted.values()) == 848_965
    assert {n for n, s in SOURCES.items() if s.non_commercial} == {"pku_saferlhf", "nectar"}


def test_every_reason_is_explained():
    used = {reason for _, _, dropped in GOLDEN.values() for reason in dropped}
    assert used <= set(filters.REASONS)
    assert all(sentence.endswith(".") for sentence in filters.REASONS.values())


@pytest.mark.parametrize("name", GOLDEN)
def test_the_stored_miniature_is_what_its_script_writes(name):
    stored = (RAW / f"{name}.jsonl").read_text(encoding="ascii").splitlines()
    message = "the prompts or samples changed: run `python -m data_prep.make_raw_preference`"
    assert stored == make_raw_preference.raw_lines(name), message
    assert len(stored) >= 40


def test_the_miniature_holds_no_evaluation_prompt():
    stored = "\n".join((RAW / f"{name}.jsonl").read_text(encoding="ascii") for name in GOLDEN)
    for split in ("evaluation", "validation"):
        for prompt in load_prompts(split):
            assert json.dumps(prompt["messages"][0]["content"])[1:-1] not in stored


@pytest.mark.parametrize("name", GOLDEN)
def test_a_missing_column_is_reported_by_name(name):
    for column in SOURCES[name].columns:
        row = {key: value for key, value in raw(name)[0].items() if key != column}
        with pytest.raises(DataError, match=f"no column '{column}'"):
            convert(name, [row])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("shp", {"ration": 3}),
        ("helpsteer", {"key": "verbosity"}),
        ("helpsteer", {"pairs": "some"}),
        ("pku_saferlhf", {"prefer": "safest"}),
        ("ultrafeedback", {"key": "best"}),
        ("nectar", {"rule": "all"}),
    ],
)
def test_a_wrong_option_is_refused(name, options):
    with pytest.raises(DataError, match=str(next(iter(options.values()))) + "|ration"):
        convert(name, raw(name), **options)


def test_hh_splits_transcripts_into_turns():
    row = {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Who?\n\nAssistant: A human: you.",
        "rejected": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Who?\n\nAssistant: Go away. ",
    }
    [record], _ = convert("hh_rlhf", [row])
    assert [turn["role"] for turn in record["chosen"]] == ["user", "assistant"] * 2
    assert [turn["content"] for turn in record["chosen"]] == [
        "Hi",
        "Hello!",
        "Who?",
        "A human: you.",
    ]
    assert answers(record) == ("A human: you.", "Go away.")
    assert record["chosen_score"] is record["rejected_score"] is None


def test_a_marker_without_a_blank_line_is_text():
    turns = read_transcript(
        "\n\nHuman: Say\nHuman: hi\n\nAssistant: Human: hi\n\nHuman:no, a label"
    )
    said = ["Say\nHuman: hi", "Human: hi\n\nHuman:no, a label"]
    assert [turn["content"] for turn in turns] == said


@pytest.mark.parametrize(("score", "kept"), [(8, 0), (9, 1), ("9", 1), (8.0001, 1)])
def test_shp_wants_a_ratio_strictly_above_two(score, kept):
    row = changed("shp", score_A=score, score_B=4, labels=1)
    assert reasons("shp", row)[0] == kept


@pytest.mark.parametrize(("label", "a", "b", "winner"), [(1, 9, 2, "A"), (0, 2, 9, "B")])
def test_shp_label_one_means_a(label, a, b, winner):
    row = changed("shp", score_A=a, score_B=b, labels=label)
    [record], _ = convert("shp", [row])
    assert answers(record)[0] == row[f"human_ref_{winner}"]
    assert (record["chosen_score"], record["rejected_score"]) == (9, 2)
    reversed_label = {**row, "labels": 1 - label}
    assert reasons("shp", reversed_label) == (0, {"label_contradicts_scores": 1})


def test_shp_keeps_the_first_pairs_of_a_post():
    rows = [changed("shp", score_A=50 + i, score_B=3, labels=1) for i in range(7)]
    records, tally = convert("shp", rows)
    assert [record["chosen_score"] for record in records] == [50, 51, 52, 53, 54]
    assert tally.dropped == {"over_cap": 2}
    assert len(convert("shp", rows, cap=1)[0]) == 1
    assert len(convert("shp", rows, ratio=17.5)[0]) == 4  # 53/3 and above


def helpsteer_row(prompt, response, helpful, correct, verbose=0):
    aspects = {"helpfulness": helpful, "correctness": correct, "verbosity": verbose}
    return {"prompt": prompt, "response": response, "coherence": 0, "complexity": 0, **aspects}


def test_helpsteer_groups_by_prompt_and_ranks_by_its_key():
    rows = [
        helpsteer_row("p", "a", 4, 2),
        helpsteer_row("q", "c", 1, 1),
        helpsteer_row("p", "b", 1, 4, verbose=4),
        helpsteer_row("q", "d", 0, 3),
    ]
    records, _ = convert("helpsteer", rows)
    assert [answers(record) for record in records] == [("a", "b"), ("d", "c")]
    assert (records[0]["chosen_score"], records[0]["rejected_score"]) == (3.0, 2.5)
    records, _ = convert("helpsteer", rows, key="mean_of_five")
    assert [answers(record) for record in records] == [("b", "a"), ("d", "c")]


def test_pku_safer_and_better_disagree_where_the_helpful_answer_is_unsafe():
    row = changed("pku_saferlhf", is_response_0_safe=True, is_response_1_safe=False)
    row |= {"safer_response_id": 0, "better_response_id": 1}
    [safer], _ = convert("pku_saferlhf", [row])
    [better], _ = convert("pku_saferlhf", [row], prefer="better")
    assert answers(safer) == answers(better)[::-1] == (row["response_0"], row["response_1"])
    row["safer_response_id"] = 1
    assert reasons("pku_saferlhf", row) == (0, {"label_contradicts_scores": 1})


def completion(response, *ratings, overall=5.0):
    aspects = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    annotations = {a: {"Rating": r} for a, r in zip(aspects, ratings, strict=True)}
    return {"response": response, "overall_score": overall, "annotations": annotations}


def test_ultrafeedback_ranks_by_the_mean_aspect_and_not_by_the_overall_score():
    best = completion("best", "5", "5", "5", "4", overall=1.0)  # 10 written as 1
    worse = completion("worse", "3", 3, " 2 ", "3", overall=6.0)
    unrated = completion("unrated", "5", "5", "5", "N/A", overall=4.0)
    row = {"instruction": "q", "completions": [worse, unrated, best]}
    [record], tally = convert("ultrafeedback", [row])
    assert answers(record) == ("best", "worse")
    assert (record["chosen_score"], record["rejected_score"]) == (4.75, 2.75)
    assert tally.dropped == {"missing_rating": 1}
    by_overall, _ = convert("ultrafeedback", [row], key="overall", pairs="best_vs_last")
    assert [answers(record) for record in by_overall] == [("worse", "best")]
    assert reasons("ultrafeedback", row, min_margin=2.5)[1]["small_margin"] == 1


def test_ultrafeedback_best_vs_random_is_seeded_and_one_pair_a_prompt():
    runs = [
        convert("ultrafeedback", raw("ultrafeedback"), pairs="best_vs_random", seed=seed)[0]
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]
    prompts = [record["prompt_id"] for record in runs[0][:40]]
    assert len(set(prompts)) == len(prompts)


def test_codeultrafeedback_matches_ratings_by_model():
    row = {
        "instruction": "q",
        "responses": [{"model": "m", "response": "low"}, {"model": "n", "response": "high"}],
        "annotations": [{"model": "n", "rating": "5"}, {"model": "m", "rating": "1"}],
    }
    [record], _ = convert("codeultrafeedback", [row])
    assert answers(record) == ("high", "low")


def test_orca_follows_the_order_of_the_generations():
    row = changed("orca", rating=[4.0, 9.0], chosen_score=9.0)
    assert reasons("orca", row) == (0, {"label_contradicts_scores": 1})
    row["generations"] = row["generations"][::-1]
    assert reasons("orca", row) == (1, {})


def test_orca_folds_the_system_prompt_and_knows_the_stricter_recipe():
    [record], _ = convert("orca", [changed("orca", system="Be brief.", input="Why?")])
    assert record["chosen"][0] == {"role": "user", "content": "Be brief.\n\nWhy?"}
    records, tally = convert("orca", raw("orca"), min_chosen_score=8, drop_gsm8k=True)
    assert min(record["chosen_score"] for record in records) == 8
    assert (tally.dropped["low_score"], tally.dropped["in_gsm8k_train"]) == (20, 2)


def test_summarize_prefers_the_chosen_summary():
    row = {
        "info": {"post": "Long story.", "title": "Title"},
        "summaries": [{"text": " zero"}, {"text": " one"}],
        "choice": 1,
    }
    [record], _ = convert("summarize", [row])
    assert answers(record) == ("one", "zero")
    assert record["chosen"][0]["content"].endswith("\n\nTitle\n\nLong story.")


def test_nectar_prefers_the_lowest_rank():
    ranked = [{"answer": a, "rank": r} for a, r in (("c", 3.0), ("a", 1.0), ("d", 7.0))]
    row = {"prompt": "\n\nHuman: q\n\nAssistant: ", "answers": ranked}
    [record], tally = convert("nectar", [row], rule="best_vs_last")
    assert answers(record) == ("a", "d")
    assert (record["chosen_score"], record["rejected_score"]) == (-1.0, -7.0)
    assert tally.dropped == {"not_drawn": 1}


def test_prompt_ids_are_stable_across_processes():
    messages = [{"role": "user", "content": "Grüße?"}]
    expected = "shp-22afbbc15704d3d6"
    assert filters.prompt_id("shp", messages) == expected
    assert filters.prompt_id("shp", [{"content": "Grüße?", "role": "user"}]) == expected
    code = "from data_prep.pairing import seeded; print(seeded(0, 'shp-1').random())"
    drawn = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    }
    assert drawn == {f"{pairing.seeded(0, 'shp-1').random()}\n"}


def test_fold_system():
    system, user = {"role": "system", "content": "S "}, {"role": "user", "content": "U"}
    answer = {"role": "assistant", "content": "A"}
    folded = [{"role": "user", "content": "S\n\nU"}, answer]
    assert filters.fold_system([system, user, answer]) == folded
    assert filters.fold_system([{**system, "content": ""}, user]) == [user]
    assert filters.fold_system([user, answer]) == [user, answer]
    assert filters.fold_system([system, answer]) == [system, answer]


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        (lambda: filters.check_length("abc", maximum=2), "too_long"),
        (lambda: filters.check_length("abc", minimum=4), "too_short"),
        (lambda: filters.check_english("Привет, world"), "not_english"),
        (lambda: filters.check_english("这是中文"), "not_english"),
        (lambda: filters.check_prompt([]), "empty_list"),
    ],
)
def test_limits_turn_away(check, reason):
    with pytest.raises(Rejected, match=reason):
        check()


@pytest.mark.parametrize("text", ["Café, naïve", "1 + 1 = 2 √", "∑ ∞", "plain"])
def test_accents_and_formulas_are_no_foreign_script(text):
    assert filters.check_english(text) == filters.check_length(text, maximum=11) == text


SCORED = st.lists(st.integers(0, 4), min_size=2, max_size=7).map(
    lambda scores: [(f"answer {i}", float(score)) for i, score in enumerate(scores)]
)


@given(SCORED)
def test_all_pairs_are_all_but_ties(scored):
    pairs, dropped = pairing.all_pairs(scored)
    ties = sum(comb(n, 2) for n in (([s for _, s in scored]).count(s) for s in range(5)))
    assert [reason for reason, _ in dropped] == ["tie"] * ties
    assert len(pairs) == comb(len(scored), 2) - ties
    assert all(chosen[1] > rejected[1] for chosen, rejected in pairs)


@given(SCORED, st.floats(0, 5), st.floats(0, 5))
def test_a_larger_margin_keeps_a_subset(scored, one, other):
    small, large = sorted((one, other))
    some, _ = pairing.all_pairs(scored, min_margin=large)
    assert set(some) <= set(pairing.all_pairs(scored, min_margin=small)[0])
    assert all(chosen[1] - rejected[1] >= large for chosen, rejected in some)


def test_a_margin_of_exactly_the_minimum_is_enough():
    scored = [("a", 2.0), ("b", 1.0), ("c", 0.5)]
    pairs, dropped = pairing.all_pairs(scored, min_margin=1.0)
    assert [(chosen[0], rejected[0]) for chosen, rejected in pairs] == [("a", "b"), ("a", "c")]
    assert [reason for reason, _ in dropped] == ["small_margin"]


@given(SCORED, st.integers(0, 9))
def test_one_pair_rules_take_the_best_and_count_every_other_answer(scored, seed):
    top = max(score for _, score in scored)
    random_pair, last_pair = (
        pairing.best_vs_random(scored, pairing.seeded(seed)),
        pairing.best_vs_last(scored),
    )
    for pairs, dropped in (random_pair, last_pair):
        assert len(pairs) + len(dropped) == len(scored) - 1
        assert len(pairs) == (len({score for _, score in scored}) > 1)
        assert all(chosen[1] == top > rejected[1] for chosen, rejected in pairs)
    if last_pair[0]:
        assert last_pair[0][0][1][1] == min(score for _, score in scored)


def test_best_vs_random_reaches_every_worse_answer():
    scored = [("best", 3.0), ("a", 1.0), ("b", 2.0), ("c", 0.0)]
    losers = {pairing.best_vs_random(scored, pairing.seeded(i))[0][0][1][0] for i in range(50)}
    assert losers == {"a", "b", "c"}


@pytest.mark.parametrize("value", ["nan", float("inf"), 10**400, "N/A", "", None])
def test_a_number_that_is_none_is_a_missing_rating(value):
    row = changed("argilla_math", chosen_rating=value)
    assert reasons("argilla_math", row) == (0, {"missing_rating": 1})


def test_ratings_whose_mean_overflows_are_malformed():
    row = {"instruction": "q", "completions": [completion("a", *[1e308] * 4)]}
    assert reasons("ultrafeedback", row)[1] == {"malformed": 1, "too_few_answers": 1}


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**400), 10**400) | st.integers(-2, 10),
    st.floats(),
    st.text(st.characters(), max_size=8),  # with lone surrogates
    st.sampled_from(["", " ", "N/A", "nan", "4", "system", "\n\nHuman: a\n\nAssistant:", "user"]),
    st.lists(st.integers() | st.none(), max_size=3),
    st.dictionaries(st.text(max_size=4), st.none() | st.text(max_size=3), max_size=2),
)


@st.composite
def spoiled_rows(draw, name):
    """Stored rows, each with up to three values, at any depth, replaced by junk."""
    rows = draw(st.lists(st.sampled_from(raw(name)), min_size=1, max_size=4))
    rows = json.loads(json.dumps(rows))
    for row in rows:
        for _ in range(draw(st.integers(0, 3))):
            spoil(row, draw)
    return rows


def spoil(value, draw):
    """Replace a value inside a nested structure, found by a random walk, by junk."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw(st.sampled_from(keys))
        if isinstance(value[key], dict | list) and value[key] and draw(st.integers(0, 3)):
            value = value[key]
        else:
            value[key] = draw(JUNK)
            return


# The fewest records and drops that n rows may give: a HelpSteer row is one answer of a pair.
ROWS_A_RECORD = {"helpsteer": 2}


def assert_sound(name, rows, **options):
    records, tally = convert(name, rows, **options)
    assert tally.read == len(rows)
    assert set(tally.dropped) <= set(filters.REASONS)
    accounted = (tally.kept + tally.dropped.total()) * ROWS_A_RECORD.get(name, 1)
    assert accounted >= tally.read
    for record in records:
        assert pair_problem(record) is None
        json.dumps(record, allow_nan=False, ensure_ascii=False).encode("utf-8")
        if record["chosen_score"] is not None:
            assert record["chosen_score"] > record["rejected_score"]


@pytest.mark.parametrize("name", GOLDEN)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_fuzz_spoiled_rows_never_raise_and_are_accounted_for(name, data):
    assert_sound(name, data.draw(spoiled_rows(name)))


@pytest.mark.parametrize("name", GOLDEN)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_fuzz_junk_rows_never_raise_and_are_accounted_for(name, data):
    columns = st.fixed_dictionaries(dict.fromkeys(SOURCES[name].columns, JUNK))
    assert_sound(name, data.draw(st.lists(columns, min_size=1, max_size=4)))


@pytest.mark.parametrize("row", [None, 3, [], "text"])
@pytest.mark.parametrize("name", GOLDEN)
def test_something_that_is_no_row_is_dropped(name, row):
    assert reasons(name, row) == (0, {"wrong_type": 1})
