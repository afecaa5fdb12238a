"""Near-duplicates, contamination, and the disjoint slices of the prompt set."""

import subprocess
import sys
from collections import Counter
from itertools import chain
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import prompts
from data_prep.contamination import SHORTEST, EvaluationIndex
from data_prep.dedup import deduplicate, jaccard, missed_share
from data_prep.embedded import SPLITS, load_prompts
from data_prep.filters import prompt_id
from data_prep.ngrams import ngram_hashes, normalise, prompt_text, tokens, words
from data_prep.prompt_set import build_prompt_set
from data_prep.raw import raw_files, read_rows
from data_prep.schema import DataError
from data_prep.source import Tally

LONG = "please write a short story about an old sailor who finds a map of an island in the north"


def prompt(text, source="test"):
    messages = [{"role": "user", "content": text}]
    return {"prompt_id": prompt_id(source, messages), "messages": messages, "source": source}


def random_words(count, seed):
    rng = Random(seed)
    return [f"word{rng.randrange(5000)}" for _ in range(count)]


def test_normalisation_hides_case_white_space_and_unicode_form_only():
    assert normalise("  Caf\u0065\u0301\n IS  Open ") == normalise("CAFÉ is open")
    assert normalise("ＡＢＣ") == "abc"
    assert tokens("2+3?") == ["2", "+", "3", "?"] != tokens("2-3?")
    assert words("Don't stop!") == ["don", "t", "stop"]


def test_ngram_hashes_name_equal_runs_and_only_them():
    units = list("abcabd")
    hashes = [values.tolist() for values in ngram_hashes(units, 3)]
    assert [len(values) for values in hashes] == [6, 5, 4]
    for n, values in enumerate(hashes, 1):
        runs = [tuple(units[i : i + n]) for i in range(len(values))]
        assert len(set(values)) == len(set(runs)) == len(set(zip(runs, values, strict=True)))
    assert [len(values) for values in ngram_hashes(units[:2], 3)] == [2, 1]
    assert list(ngram_hashes([], 3)) == []


def test_exact_copies_go_and_the_first_stays():
    texts = ["What is 2+3?", "What is 2-3?", " what IS\n2+3?", "What is 2+3?"]
    assert deduplicate(texts) == ([0, 1], {2: (0, "duplicate"), 3: (0, "duplicate")})


def test_a_long_text_with_one_word_changed_is_a_near_duplicate():
    changed = LONG.replace("sailor", "fisher")
    texts = [LONG + " and " + LONG[::-1], LONG, f"{LONG}!", changed]
    kept, removed = deduplicate(texts)
    assert jaccard(LONG, f"{LONG}!") > 0.9 > jaccard(LONG, changed)
    assert removed == {2: (1, "near_duplicate")}
    assert kept == [0, 1, 3]
    assert deduplicate(texts, threshold=0.6)[1][3] == (1, "near_duplicate")


def test_a_copy_of_a_near_duplicate_points_to_the_text_that_stays():
    assert deduplicate([LONG, f"{LONG}!", f"{LONG}!"])[1] == {
        1: (0, "near_duplicate"),
        2: (0, "duplicate"),
    }


def test_jaccard_counts_three_token_runs():
    assert jaccard("a b c d", "a b c e") == 1 / 3  # {abc, bcd} and {abc, bce}
    assert jaccard("a b", "A  B") == 1
    assert jaccard("a", "b") == 0


def test_short_different_texts_all_stay():
    texts = [f"word{i}" for i in range(300)]
    assert deduplicate(texts) == (list(range(300)), {})


@pytest.mark.parametrize("texts", [[], [""], ["", " ", "\n"]])
def test_dedup_of_next_to_nothing(texts):
    kept, removed = deduplicate(texts)
    assert kept == [0][: len(texts)]
    assert set(removed) == set(range(1, len(texts)))


@pytest.mark.parametrize("threshold", [0, -1, 1.01, float("nan")])
def test_a_wrong_threshold_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold"):
        deduplicate(["a"], threshold)


def near_pairs(similarity_of_words, count, length=60):
    """Random texts, each followed by itself with a share of its words changed."""
    for i in range(count):
        original = random_words(length, i)
        changed = list(original)
        for place in Random(i).sample(range(length), round(length * (1 - similarity_of_words))):
            changed[place] = f"new{i}"
        yield " ".join(original)
        yield " ".join(changed)


def test_recall_is_what_the_formula_says():
    texts = list(near_pairs(0.96, 300))
    alike = [jaccard(texts[i], texts[i + 1]) for i in range(0, len(texts), 2)]
    expected = sum(1 - missed_share(value) for value in alike if value >= 0.8)
    found = len(deduplicate(texts)[1])
    assert sum(value >= 0.8 for value in alike) > 100
    assert abs(found - expected) < 0.06 * len(alike)


def test_prompts_that_share_a_preamble_all_stay():
    preamble = " ".join(random_words(40, seed=0))
    texts = [f"{preamble} {' '.join(random_words(16, seed=i))}" for i in range(1, 400)]
    assert 0.5 < jaccard(*texts[:2]) < 0.6
    assert deduplicate(texts) == (list(range(len(texts))), {})


def test_more_similar_texts_are_missed_less():
    shares = [missed_share(similarity) for similarity in (0.5, 0.8, 0.9, 1.0)]
    assert shares == sorted(shares, reverse=True)
    assert shares[1] < 0.2
    assert shares[2] < 0.01
    assert shares[3] == 0


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text(alphabet="ab \ud800é", max_size=12), max_size=12))
def test_dedup_accounts_for_every_text_and_never_removes_a_dissimilar_one(texts):
    kept, removed = deduplicate(texts, threshold=0.5)
    assert sorted([*kept, *removed]) == list(range(len(texts)))
    for index, (original, reason) in removed.items():
        assert original in kept
        assert original < index
        if reason == "near_duplicate":
            assert jaccard(texts[index], texts[original]) >= 0.5
    assert deduplicate([texts[index] for index in kept], threshold=0.5)[1] == {}


def test_dedup_does_not_depend_on_the_process():
    code = (
        "from data_prep.dedup import deduplicate\n"
        "import random\n"
        "rng = random.Random(3)\n"
        "print(deduplicate([' '.join(rng.choices('abc', k=6)) for _ in range(400)]))"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(runs) == 1


RUN = random_words(40, seed=1)


@pytest.fixture(scope="module")
def index():
    long = prompt(" ".join(RUN), "evaluation")
    short = prompt("How do I brew green tea?", "evaluation")
    tiny = prompt("Who are you?", "evaluation")
    return EvaluationIndex([long, short, tiny])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (" ".join(RUN), True),
        ("Before. " + ", ".join(RUN[10:23]).upper() + "! After.", True),  # 13 words
        ("Before. " + " ".join(RUN[10:22]) + " after.", False),  # 12 words
        (" ".join(RUN[::-1]), False),
        ("how do i brew   GREEN tea", True),
        ("Dear model: how do I brew green tea, please?", True),
        ("How do I brew black tea?", False),
        ("green tea? How do I brew it?", False),
        ("who are you", True),
        ("I ask who are you and why?", False),  # too short to be more than chance
        ("", False),
    ],
)
def test_contamination_is_a_common_run_of_words(index, text, found):
    assert (index.contaminated(text) is not None) == found


def test_the_leaked_prompt_is_named():
    leaks = [prompt(" ".join(random_words(20, seed=i))) for i in range(5)]
    index = EvaluationIndex(leaks)
    for leak in leaks:
        assert index.contaminated("Now: " + prompt_text(leak["messages"])) == leak["prompt_id"]


@pytest.mark.parametrize(("n", "found"), [(8, True), (9, False)])
def test_n_is_the_length_of_the_run(n, found):
    index = EvaluationIndex([prompt(" ".join(RUN))], n)
    assert (index.contaminated("x " + " ".join(RUN[3:11]) + " y") is not None) == found


def test_equal_hashes_of_different_words_are_no_leak(monkeypatch):
    monkeypatch.setattr("data_prep.ngrams.crc32", lambda word: 1)
    index = EvaluationIndex([prompt(" ".join(RUN))])
    assert index.contaminated(" ".join(random_words(40, seed=2))) is None
    assert index.contaminated(" ".join(RUN))


def test_a_run_too_short_to_mean_anything_is_refused():
    with pytest.raises(DataError, match="at least 5"):
        EvaluationIndex([], n=SHORTEST - 1)


def test_an_evaluation_without_words_matches_nothing():
    index = EvaluationIndex([prompt("?!")])
    assert index.contaminated("?!") is None


def test_no_split_of_the_miniature_leaks_into_the_evaluation():
    # Format instructions of up to eleven words end many prompts, so 13 words may agree by chance.
    index = EvaluationIndex(load_prompts("evaluation"), n=16)
    for split in SPLITS:
        leaks = [index.contaminated(prompt_text(p["messages"])) for p in load_prompts(split)]
        assert all(leaks) if split == "evaluation" else not any(leaks)


def build(records, evaluation=(), **options):
    dropped = []
    slices = build_prompt_set(
        records, evaluation, lambda *drop: dropped.append(drop), **{"validation": 2, **options}
    )
    return slices, dropped


@pytest.fixture(scope="module")
def many():
    return [prompt(" ".join(random_words(20, seed=i))) for i in range(101)]


def ids(slices):
    return [[p["prompt_id"] for p in slices[name]] for name in slices]


def test_slices_are_disjoint_hold_everything_and_are_equally_large(many):
    slices, dropped = build(many, validation=10)
    assert list(slices) == ["online_1", "online_2", "online_3", "validation"]
    assert [len(slices[name]) for name in slices] == [31, 30, 30, 10]
    assert sorted(chain(*ids(slices))) == sorted(p["prompt_id"] for p in many)
    assert dropped == []
    assert list(build(many, iterations=1)[0]) == ["online_1", "validation"]


def test_slices_depend_on_the_seed_and_not_on_the_order(many):
    slices, _ = build(many)
    assert ids(build(many[::-1])[0]) == ids(slices)
    assert ids(build(many, seed=1)[0]) != ids(slices)


def test_a_slice_is_not_in_the_order_of_the_sources():
    records = [prompt(" ".join(random_words(20, seed=i)), source="ab"[i >= 60]) for i in range(120)]
    slices, _ = build(records)
    for name in ("online_1", "online_2", "online_3"):
        counted = Counter(p["source"] for p in slices[name][:20])
        assert min(counted["a"], counted["b"]) >= 3


def test_every_drop_is_counted_with_its_record(many):
    assistant = {"role": "assistant", "content": "An answer."}
    bad = [
        {**prompt("a question"), "messages": [*prompt("a question")["messages"], assistant]},
        {**prompt("x"), "messages": [assistant]},
        {**prompt("x"), "messages": []},
        prompt("  "),
        prompt(prompt_text(many[0]["messages"]).upper(), "other"),
        prompt(prompt_text(many[1]["messages"]) + " end"),
        prompt("Tell me: how do I brew green tea?"),
    ]
    leak = prompt("How do I brew green tea?", "evaluation")
    _, dropped = build([*many, *bad], [leak])
    reasons = [
        "no_user_turn",
        "role_order",
        "empty_list",
        "empty_turn",
        "duplicate",
        "near_duplicate",
        "contaminated",
    ]
    assert [reason for reason, _ in dropped] == reasons
    assert [what["messages"] for _, what in dropped] == [record["messages"] for record in bad]
    repeats = [what["repeats"] for _, what in dropped[-3:]]
    assert repeats == [many[0]["prompt_id"], many[1]["prompt_id"], leak["prompt_id"]]


def test_too_few_prompts_are_refused(many):
    with pytest.raises(DataError, match="4 prompts are left"):
        build(many[:4])
    assert [len(part) for part in ids(build(many[:5])[0])] == [1, 1, 1, 2]


def test_the_miniature_loses_its_copies_and_its_planted_leaks():
    records = [
        record
        for source in prompts.SOURCES.values()
        for record in source.records(read_rows(raw_files(source, "embedded"), Tally()), Tally())
    ]
    evaluation = load_prompts("evaluation")
    slices, dropped = build(records, evaluation, validation=10)
    assert Counter((what["source"], reason) for reason, what in dropped) == {
        ("helpsteer_prompts", "duplicate"): 20,
        ("ultrainteract_prompts", "duplicate"): 1,
        ("dibt_prompts", "duplicate"): 2,
        ("dibt_prompts", "near_duplicate"): 1,
        ("ultrafeedback_prompts", "contaminated"): 3,
        ("openorca_prompts", "contaminated"): 1,
    }
    assert sum(map(len, slices.values())) == len(records) - len(dropped) == 121
    leaked = [what["repeats"] for reason, what in dropped if reason == "contaminated"]
    assert set(leaked) == {p["prompt_id"] for p in evaluation[:4]}
