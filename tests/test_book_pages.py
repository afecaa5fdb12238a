"""The generated parts of the book and the README, on a README made here."""

from pathlib import Path

import pytest

from rlhf_guide import book_pages, headlines
from rlhf_guide.errors import GuideError
from rlhf_guide.files import write_json
from rlhf_guide.profiles import load_profile

ROOT = Path(__file__).resolve().parent.parent
README = "\n".join(
    f"| {name} | {value} | {low} to {high} | 104 |"
    for name, value, low, high in [
        ("utility_gain_offline_over_sft", -0.034, -0.070, 0.000),
        ("utility_gain_over_sft", 0.080, 0.028, 0.132),
        ("utility_gain_over_offline", 0.114, 0.057, 0.173),
        ("win_rate_offline_over_sft", 0.473, 0.447, 0.498),
        ("lc_win_rate_offline_over_sft", 0.486, 0.460, 0.512),
        ("win_rate_online_over_sft", 0.540, 0.510, 0.571),
        ("lc_win_rate_online_over_sft", 0.514, 0.486, 0.542),
    ]
)


def test_the_figure_s_words_say_which_intervals_show_no_difference():
    """An end at the value of no difference shows none; a win rate is held against one half."""
    words = headlines.describe(README)
    assert "offline DPO − SFT -0.034 (-0.070 to 0.000, no difference shown)" in words
    assert "online DPO − SFT 0.080 (0.028 to 0.132);" in words
    assert "offline DPO 0.473 (0.447 to 0.498);" in words
    assert "online DPO, at equal length 0.514 (0.486 to 0.542, no difference shown)" in words
    assert words.count("no difference shown") == 3


def test_the_table_has_a_row_a_result_and_the_seeds_where_they_were_studied():
    rows = headlines.table(README).splitlines()[2:]
    assert len(rows) == 7
    studied = README + "\n| seeds_online_minus_sft | 0.050 | 0.010 to 0.090 | 104 |"
    assert "online DPO − SFT, over seeds | 0.050 |" in headlines.table(studied)
    assert (
        "| gain in true utility, points: online DPO − SFT | 0.080 | 0.028 to 0.132 | 104 |" in rows
    )


def test_a_missing_result_is_named():
    without = README.replace("| win_rate_online_over_sft", "| another")
    with pytest.raises(GuideError, match=r"no result win_rate_online_over_sft: .*report"):
        headlines.describe(without)


def test_the_drawn_figure_carries_its_words(tmp_path):
    headlines.draw_results(tmp_path / "results.svg", README)
    assert headlines.describe(README) in (tmp_path / "results.svg").read_text(encoding="utf-8")


def test_the_stored_figure_shows_the_readme_s_results():
    drawn = (ROOT / "book" / "_static" / "results.svg").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert headlines.describe(readme) in drawn, "python -m rlhf_guide.book_pages"


def test_the_settings_are_the_profile_s():
    usual = book_pages.hyper_parameters(load_profile("paper"))
    assert "| SFT | `sft` | Meta-Llama-3-8B | 1 | 2e-5 | cosine | 3% | 32 blocks |" in usual
    assert "| offline DPO | `dpo` | SFT policy | 1 | 5e-7 | cosine | 3% | 128 pairs |" in usual
    assert "2 pairs a device and, on eight devices, 8 accumulated" in usual
    assert "| 64 pairs |" in book_pages.hyper_parameters(load_profile("paper", dpo_batch_size=64))


def test_a_block_is_replaced_and_the_rest_stays():
    page = "before\n<!-- x:begin -->\nold\n<!-- x:end -->\nafter\n"
    once = book_pages.with_block(page, "x", "new")
    assert once == "before\n<!-- x:begin -->\n\nnew\n\n<!-- x:end -->\nafter\n"
    assert book_pages.with_block(once, "x", "new") == once
    with pytest.raises(GuideError, match="y:begin"):
        book_pages.with_block(page, "y", "new")


def test_measurements_are_shown_with_failures_and_what_they_ran_on(tmp_path):
    shared = {"date": "2026-01-02", "cores": 2, "versions": {"torch": "9.9"}}
    tests = [{"test": "a", "outcome": "passed"}, {"test": "b", "outcome": "failure"}]
    result = {"all_rows": 850000, "ratio": 1.23456, "model": "small", "missing": None}
    write_json(tmp_path / "slow_x.json", {**shared, "result": "failed", "tests": tests})
    write_json(tmp_path / "bench.json", {**shared, "result": result})
    assert book_pages.measurements(tmp_path).splitlines()[2:] == [
        "| bench | all rows 850,000, ratio 1.23 | 2026-01-02 | – | 9.9 | – | – |",
        "| slow x | 1 of 2 tests passed | 2026-01-02 | – | 9.9 | – | – |",
    ]
