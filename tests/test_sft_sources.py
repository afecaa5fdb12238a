"""The nine SFT and six prompt sources: which raw rows survive, which are dropped, and why."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import filters, make_raw_sft, prompts, sft
from data_prep.embedded import load_prompts
from data_prep.raw import raw_files, read_rows
from data_prep.records import trim
from data_prep.schema import DataError, demonstration_problem
from data_prep.source import Tally

SOURCES = {**sft.SOURCES, **prompts.SOURCES}
RAW = Path(make_raw_sft.__file__).parent / "embedded" / "raw"
LEAKING = {"ultrafeedback_prompts", "openorca_prompts"}

TWO_TEXTS = {"broken_utf8": 1, "empty_turn": 2, "wrong_type": 3}
ALPACA = {"broken_utf8": 1, "empty_turn": 2, "wrong_type": 2}
ONE_TEXT = {"broken_utf8": 1, "empty_turn": 1, "wrong_type": 1}

# Rows read, records kept, drops by reason, with the default options.
GOLDEN = {
    "sharegpt": (
        35,
        23,
        {
            "broken_utf8": 1,
            "empty_list": 1,
            "empty_turn": 1,
            "no_answer": 2,
            "role_order": 4,
            "too_short": 2,
            "unknown_role": 2,
            "wrong_type": 3,
        },
    ),
    "evol_instruct": (
        28,
        20,
        {
            "broken_utf8": 1,
            "empty_list": 1,
            "empty_turn": 1,
            "too_short": 1,
            "unknown_role": 1,
            "wrong_type": 3,
        },
    ),
    "slimorca": (
        28,
        20,
        {
            "broken_utf8": 1,
            "empty_turn": 1,
            "no_answer": 1,
            "role_order": 2,
            "too_short": 2,
            "wrong_type": 1,
        },
    ),
    "mathinstruct": (26, 20, TWO_TEXTS),
    "magicoder": (28, 20, {**TWO_TEXTS, "invalid_json": 1, "malformed": 1}),
    "gpt4_llm": (26, 21, ALPACA),
    "orca_math": (26, 20, TWO_TEXTS),
    "gpteacher": (26, 21, ALPACA),
    "ultrainteract_sft": (26, 20, TWO_TEXTS),
    "ultrafeedback_prompts": (26, 23, ONE_TEXT),
    "helpsteer_prompts": (43, 40, ONE_TEXT),
    "openorca_prompts": (25, 21, {**ONE_TEXT, "wrong_type": 2}),
    "ultrainteract_prompts": (
        28,
        21,
        {
            "broken_utf8": 1,
            "empty_list": 1,
            "empty_turn": 1,
            "no_user_turn": 1,
            "role_order": 1,
            "unknown_role": 1,
            "wrong_type": 1,
        },
    ),
    "capybara_prompts": (
        29,
        20,
        {
            "broken_utf8": 1,
            "empty_list": 2,
            "empty_turn": 1,
            "no_answer": 2,
            "role_order": 1,
            "unknown_role": 1,
            "wrong_type": 1,
        },
    ),
    "dibt_prompts": (27, 24, ONE_TEXT),
}


def raw(name):
    return list(read_rows([RAW / f"{name}.jsonl"], Tally()))


def convert(name, rows, **options):
    tally = Tally()
    return list(SOURCES[name].records(iter(rows), tally, **options)), tally


def reasons(name, row, **options):
    records, tally = convert(name, [row], **options)
    return len(records), dict(tally.dropped)


def chat(*turns, key="conversations"):
    return {key: [{"from": speaker, "value": value} for speaker, value in turns]}


def said(messages):
    return [(turn["role"], turn["content"]) for turn in messages]


def assert_standard(name, record):
    """A record of the source's kind that can be stored."""
    assert record["source"] == name
    if SOURCES[name].kind == "sft":
        assert set(record) == {"id", "messages", "source"}
        assert demonstration_problem(record) is None
        assert record["id"] == filters.prompt_id(name, record["messages"])
    else:
        assert set(record) == {"prompt_id", "messages", "source"}
        assert filters.check_prompt(record["messages"]) is record["messages"]
        assert record["prompt_id"] == filters.prompt_id(name, record["messages"])
    json.dumps(record, ensure_ascii=False).encode("utf-8")


@pytest.mark.parametrize("name", GOLDEN)
def test_the_miniature_is_kept_and_dropped_as_planned(name):
    tally = Tally()
    rows = read_rows(raw_files(SOURCES[name], "embedded"), tally)
    records = list(SOURCES[name].records(rows, tally))
    assert (tally.read, tally.kept, dict(tally.dropped)) == GOLDEN[name]
    assert len(records) == tally.kept
    for record in records:
        assert_standard(name, record)


def test_all_sources_are_here():
    assert set(SOURCES) == set(GOLDEN) == set(make_raw_sft.MAKERS)
    assert (len(sft.SOURCES), len(prompts.SOURCES)) == (9, 6)
    assert {source.kind for source in sft.SOURCES.values()} == {"sft"}
    assert {source.kind for source in prompts.SOURCES.values()} == {"prompts"}
    assert {name for name, s in SOURCES.items() if s.non_commercial} == {"gpt4_llm"}


def test_every_reason_is_explained():
    assert {reason for _, _, drops in GOLDEN.values() for reason in drops} <= set(filters.REASONS)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_stored_miniature_is_what_its_script_writes(name):
    stored = (RAW / f"{name}.jsonl").read_text(encoding="ascii").splitlines()
    message = "the embedded prompts changed: run `python -m data_prep.make_raw_sft`"
    assert stored == make_raw_sft.raw_lines(name), message
    assert len(stored) >= 20


def test_only_the_planted_leaks_are_evaluation_prompts():
    def holds(name, prompt):
        stored = (RAW / f"{name}.jsonl").read_text(encoding="ascii").lower()
        return json.dumps(prompt["messages"][0]["content"])[1:-1].lower() in stored

    questions = [*load_prompts("evaluation"), *load_prompts("validation")]
    leaking = {name: [p for p in questions if holds(name, p)] for name in GOLDEN}
    assert {name for name, leaks in leaking.items() if leaks} == LEAKING
    assert len(leaking["ultrafeedback_prompts"]) == 3
    assert len(leaking["openorca_prompts"]) == 1


@pytest.mark.parametrize("name", GOLDEN)
def test_a_missing_column_is_reported_by_name(name):
    for column in SOURCES[name].columns:
        row = {key: value for key, value in raw(name)[0].items() if key != column}
        with pytest.raises(DataError, match=f"no column '{column}'"):
            convert(name, [row])


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([("human", "q")], "too_short"),
        ([("system", "s"), ("human", "q")], "too_short"),
        ([("system", "s"), ("gpt", "a"), ("human", "q")], "role_order"),
        ([("human", "q"), ("human", "q"), ("gpt", "a")], "role_order"),
        ([("human", "q"), ("gpt", "a"), ("gpt", "a")], "role_order"),
        ([("human", "q"), ("system", "s"), ("gpt", "a")], "role_order"),
        ([("system", "s"), ("system", "s"), ("human", "q"), ("gpt", "a")], "role_order"),
        ([("human", "q"), ("gpt", "\t ")], "empty_turn"),
        ([("system", ""), ("human", "q"), ("gpt", "a")], "empty_turn"),
        ([("human", "q"), ("gpt", "a"), ("human", "q")], "no_answer"),
        ([("human", "q"), ("bard", "a")], "unknown_role"),
        ([], "empty_list"),
        ([("human", "q"), ("gpt", None)], "wrong_type"),
        ([(["human"], "q"), ("gpt", "a")], "wrong_type"),
    ],
)
def test_the_role_filter(turns, reason):
    assert reasons("slimorca", chat(*turns)) == (0, {reason: 1})


def test_a_system_turn_is_kept_or_folded():
    row = chat(("system", "Be brief."), ("human", "Why?"), ("gpt", "Because."))
    [kept], _ = convert("slimorca", [row])
    [folded], _ = convert("slimorca", [row], fold=True)
    assert said(kept["messages"])[0] == ("system", "Be brief.")
    assert said(folded["messages"]) == [("user", "Be brief.\n\nWhy?"), ("assistant", "Because.")]


def test_sharegpt_cuts_both_ends_of_a_piece_and_counts_them():
    middle = [("human", "q"), ("gpt", "a")]
    row = chat(("gpt", "before"), *middle, ("human", "after"))
    [record], tally = convert("sharegpt", [row])
    assert said(record["messages"]) == [("user", "q"), ("assistant", "a")]
    assert tally.dropped == {"role_order": 1, "no_answer": 1}
    assert tally.examples["no_answer"] == [[{"role": "user", "content": "after"}]]


def test_trimming_leaves_a_conversation_without_a_core_to_the_filter():
    dropped = []
    messages = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "q"}]
    assert trim(messages, lambda *drop: dropped.append(drop)) == messages
    assert dropped == []
    assert reasons("sharegpt", chat(("gpt", "a"), ("human", "q"))) == (0, {"role_order": 1})


@pytest.mark.parametrize(("name", "answer"), [("gpt4_llm", "output"), ("gpteacher", "response")])
@pytest.mark.parametrize(
    ("given", "question"), [("", "Sum up."), (" \n", "Sum up."), ("A text.", "Sum up.\n\nA text.")]
)
def test_alpaca_joins_instruction_and_input(name, answer, given, question):
    [record], _ = convert(name, [{"instruction": "Sum up.", "input": given, answer: "Short."}])
    assert said(record["messages"]) == [("user", question), ("assistant", "Short.")]


@pytest.mark.parametrize(
    ("name", "question", "answer"),
    [
        ("mathinstruct", "instruction", "output"),
        ("magicoder", "instruction", "response"),
        ("orca_math", "question", "answer"),
        ("ultrainteract_sft", "instruction", "response"),
    ],
)
def test_two_texts_become_two_turns(name, question, answer):
    [record], _ = convert(name, [{question: "q", answer: "a"}])
    assert said(record["messages"]) == [("user", "q"), ("assistant", "a")]


def test_openorca_folds_the_system_prompt():
    rows = [{"system_prompt": s, "question": "Why?"} for s in ("Be brief.", "")]
    records, _ = convert("openorca_prompts", rows)
    folded = [said(record["messages"]) for record in records]
    assert folded == [[("user", "Be brief.\n\nWhy?")], [("user", "Why?")]]


def openorca_rows(count):
    return [{"system_prompt": "", "question": f"Question {i}?"} for i in range(count)]


def test_openorca_draws_the_same_prompts_in_any_order():
    rows = openorca_rows(50)
    drawn, tally = convert("openorca_prompts", rows, limit=20)
    backwards, _ = convert("openorca_prompts", rows[::-1], limit=20)
    assert backwards == drawn[::-1]
    assert (len(drawn), tally.dropped) == (20, {"not_drawn": 30})
    numbers = [int(record["messages"][0]["content"][9:-1]) for record in drawn]
    assert numbers == sorted(numbers)
    another, _ = convert("openorca_prompts", rows, limit=20, seed=1)
    assert another != drawn


def test_openorca_draws_evenly():
    drawn = [
        record["messages"][0]["content"]
        for seed in range(200)
        for record in convert("openorca_prompts", openorca_rows(10), limit=5, seed=seed)[0]
    ]
    assert all(70 <= drawn.count(f"Question {i}?") <= 130 for i in range(10))


def test_ultrainteract_keeps_the_feedback_in_the_prompt():
    turns = [("user", "task"), ("assistant", "step"), ("user", "wrong")]
    [record], _ = convert("ultrainteract_prompts", [chat(*turns, key="trajectory")])
    assert said(record["messages"]) == turns


def test_capybara_takes_the_last_answer_away():
    turns = [{"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"))]
    records, _ = convert("capybara_prompts", [{"chosen": turns}, {"chosen": turns * 2}])
    assert [record["messages"] for record in records] == [turns[:1], [*turns, turns[0]]]


def test_prompts_of_one_text_have_one_name_in_every_run():
    records, _ = convert("helpsteer_prompts", raw("helpsteer_prompts"))
    assert records[0]["prompt_id"] == records[1]["prompt_id"]
    assert len({record["prompt_id"] for record in records}) == 20


TEXT = st.one_of(st.text(max_size=8), st.sampled_from(["", " ", "a\ud800", "q?"]))
SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT)
SPEAKER = st.sampled_from(["human", "gpt", "system", "user", "assistant", "tool", "", "\udfff"])
TURN = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("from", "role"), SPEAKER) | dict.fromkeys(("value", "content"), TEXT),
)
JUNK = st.recursive(
    st.one_of(SCALAR, TURN),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
ROLES = {"from": ["human", "gpt", "user", "assistant", "system"], "role": ["user", "assistant"]}


def chats(role, content):
    """Conversations that are mostly well-formed, so that the fuzz reaches every rule."""
    turn = st.fixed_dictionaries({role: st.sampled_from(ROLES[role]), content: TEXT})
    return st.lists(turn, max_size=5)


FIELD = st.one_of(TEXT, chats("from", "value"), chats("role", "content"), JUNK)


@pytest.mark.parametrize("name", GOLDEN)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_fuzz_random_rows_never_raise_and_are_accounted_for(name, data):
    columns = st.fixed_dictionaries(dict.fromkeys(SOURCES[name].columns, FIELD))
    others = st.one_of(columns, SCALAR, st.lists(TEXT, max_size=2))
    rows = [data.draw(columns), *data.draw(st.lists(others, max_size=4))]
    records, tally = convert(name, rows)
    assert tally.read == len(rows)
    assert tally.kept + tally.dropped.total() >= tally.read
    assert set(tally.dropped) <= set(filters.REASONS)
    for record in records:
        assert_standard(name, record)


@pytest.mark.parametrize("row", [None, 3, [], "text"])
@pytest.mark.parametrize("name", GOLDEN)
def test_something_that_is_no_row_is_dropped(name, row):
    assert reasons(name, row) == (0, {"wrong_type": 1})
