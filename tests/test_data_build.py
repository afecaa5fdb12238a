"""Building mixtures: access, counting, determinism, resume, statistics, the command line."""

import gzip
import json
import lzma
import shutil
from importlib.resources import files
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import __main__ as command_line
from data_prep import build as building
from data_prep import embedded
from data_prep.build import build, convert, read_records
from data_prep.contamination import EvaluationIndex
from data_prep.course_data import PROMPT_SPLITS, course_data, source_key
from data_prep.filters import REASONS
from data_prep.mixtures import MIXTURES, SOURCES, Part, find_mixture
from data_prep.ngrams import prompt_text
from data_prep.raw import raw_files, read_rows
from data_prep.schema import DataError, demonstration_problem, pair_problem
from data_prep.source import Tally
from data_prep.statistics import chosen_is_longer, length_histogram, source_statistics

RAW = Path(str(files("data_prep") / "embedded" / "raw"))
SHP = SOURCES["shp"]


def shp_row(number, **changes):
    row = {
        "history": f"Question {number}?",
        "human_ref_A": "A long and good answer.",
        "human_ref_B": "No.",
        "score_A": 30,
        "score_B": 3,
        "labels": 1,
    }
    return {**row, **changes}


def write_lines(path, rows, opener=open):
    path.parent.mkdir(parents=True, exist_ok=True)
    with opener(path, "wb") as target:
        target.writelines(json.dumps(row).encode() + b"\n" for row in rows)
    return path


def tree(folder):
    """Every file of a folder with its bytes."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def mix2(tmp_path_factory):
    """The miniature's mix2: its folder and manifest."""
    out = tmp_path_factory.mktemp("mix2")
    return out, build("mix2", "embedded", out, progress=False)


def test_every_file_format_gives_the_same_rows(tmp_path):
    rows = [shp_row(number) for number in range(5)]
    write_lines(tmp_path / "lines" / "shp.jsonl", rows)
    write_lines(tmp_path / "gz" / "shp.jsonl.gz", rows, gzip.open)
    write_lines(tmp_path / "xz" / "shp.jsonl.xz", rows, lzma.open)
    write_lines(tmp_path / "lines_named_json" / "shp.json", rows)
    write_lines(tmp_path / "many" / "shp" / "a" / "0.jsonl", rows[:2])
    write_lines(tmp_path / "many" / "shp" / "b.jsonl", rows[2:])
    for name in ("list", "parquet"):
        (tmp_path / name).mkdir()
    (tmp_path / "list" / "shp.json").write_text(json.dumps(rows, indent=2))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "parquet" / "shp.parquet")
    for folder in sorted(tmp_path.iterdir()):
        found = list(read_rows(raw_files(SHP, str(folder)), Tally()))
        assert found == rows, folder.name


def test_lines_that_cannot_be_read_are_counted_not_lost(tmp_path):
    good = json.dumps(shp_row(1)).encode()
    deep = b"[" * 100_000
    lines = [good, b"{broken", b'{"a": "\xff"}', b"[1, 2]", b"", b'"text"', deep, good]
    (tmp_path / "shp.jsonl").write_bytes(b"\n".join(lines))
    tally = Tally()
    kept = list(SHP.records(read_rows(raw_files(SHP, str(tmp_path)), tally), tally))
    assert len(kept) == 2
    assert tally.dropped == {"invalid_json": 2, "broken_utf8": 1, "malformed": 2}
    assert tally.read == 7  # the blank line is no row


def test_broken_utf8_in_parquet_costs_its_row_only(tmp_path):
    text = pa.array([b"one", b"\xff", b"three"], pa.binary()).cast(pa.string(), safe=False)
    path = tmp_path / "shp.parquet"
    pq.write_table(pa.table({"history": text}), path)
    tally = Tally()
    assert [row["history"] for row in read_rows([path], tally)] == ["one", "three"]
    assert tally.dropped == {"broken_utf8": 1}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("shp.json", b"[{]"),
        ("shp.parquet", b"PAR1 but not really"),
        ("shp.jsonl.gz", b"no gzip"),
        ("shp.jsonl.xz", b"no xz"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        list(read_rows(raw_files(SHP, str(tmp_path)), Tally()))


def test_a_changed_schema_names_the_missing_column(tmp_path):
    row = shp_row(1)
    del row["labels"]
    write_lines(tmp_path / "shp.jsonl", [row])
    with pytest.raises(DataError, match="shp: the raw data has no column 'labels'"):
        build("mix1", str(tmp_path), tmp_path / "out", progress=False)


def test_wrong_requests_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("RLHF_GUIDE_ALLOW_DOWNLOAD", raising=False)
    with pytest.raises(DataError, match="mix1, mix2"):
        find_mixture("mix3")
    with pytest.raises(DataError, match="no folder"):
        build("mix2", str(tmp_path / "nowhere"), tmp_path / "out")
    with pytest.raises(DataError, match=r"hh_rlhf\.jsonl"):
        build("mix2", str(tmp_path), tmp_path / "out")
    with pytest.raises(DataError, match="--allow-download"):
        raw_files(SHP, "hub")


def test_the_hub_s_files_are_chosen_by_the_source_s_pattern(tmp_path, monkeypatch):
    for name in ("askx/train.json", "askx/test.json", "dataset_infos.json"):
        write_lines(tmp_path / name, [shp_row(1)])
    asked = []

    def download(repository, **options):
        asked.append((repository, options["revision"], options["allow_patterns"]))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = raw_files(SHP, "hub", allow_download=True)
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["askx/train.json"]
    assert asked == [(SHP.hub_id, SHP.revision, SHP.files)]
    (tmp_path / "askx" / "train.json").unlink()
    with pytest.raises(DataError, match="layout has changed"):
        raw_files(SHP, "hub", allow_download=True)


def test_mix2_holds_the_ten_sets_of_table_5_and_the_paper_s_counts_add_up():
    names = [part.source for part in MIXTURES["mix2"].parts]
    assert len(set(names)) == 10
    assert sum(SOURCES[name].paper["pairs"] for name in names) == 848_965
    assert len(MIXTURES["sft"].parts) == 9
    assert len(MIXTURES["prompts"].parts) == 6


def test_every_mixture_names_known_sources_and_options():
    for mixture in MIXTURES.values():
        for part in mixture.parts:
            assert SOURCES[part.source].kind == mixture.kind
            assert set(part.options) <= set(SOURCES[part.source].options)


def test_records_are_standard_and_every_row_is_accounted_for(mix2):
    out, manifest = mix2
    assert manifest["records"] > 400
    for name, found in manifest["sources"].items():
        records = list(read_records(out / "data" / f"{name}.parquet"))
        assert len(records) == found["records"]
        assert [pair_problem(record) for record in records] == [None] * len(records)
        assert found["records"] + sum(found["dropped"].values()) >= found["rows_read"] > 0
        assert set(found["dropped"]) <= set(REASONS)


def test_build_writes_counts_examples_and_a_card_with_licences(mix2):
    out, manifest = mix2
    table = (out / "dropped.csv").read_text().splitlines()
    assert "shp,ratio_not_above,2" in table
    report = json.loads((out / "reports" / "shp.json").read_text())
    assert set(report["examples"]) == set(report["dropped"])
    card = (out / "README.md").read_text()
    assert "cc-by-nc-4.0" in card
    assert "Not for commercial use" in card
    for name in manifest["sources"]:
        assert SOURCES[name].licence in card
    assert json.loads((out / "manifest.json").read_text())["non_commercial"] is True


def test_a_mixture_without_non_commercial_parts_carries_no_warning(tmp_path):
    manifest = build("mix1", "embedded", tmp_path, progress=False)
    assert not manifest["non_commercial"]
    assert "Not for commercial use" not in (tmp_path / "README.md").read_text()


def test_output_does_not_depend_on_workers_or_on_the_run(mix2, tmp_path):
    build("mix2", "embedded", tmp_path, workers=2, progress=False)
    assert tree(tmp_path) == tree(mix2[0])


def test_seed_moves_the_random_rules_only(tmp_path):
    first, again, other = (
        convert(Part("ultrafeedback", {"pairs": "best_vs_random"}), "embedded", seed)[0]
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    assert convert("ultrafeedback", "embedded", 0)[0] == convert("ultrafeedback", "embedded", 1)[0]


def test_resume_converts_only_what_is_missing_or_changed(tmp_path, monkeypatch):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_lines(raw / "shp.jsonl", [shp_row(1), shp_row(2)])
    shutil.copy(RAW / "summarize.jsonl", raw)
    converted = []
    original = building.write_records

    def counted(path, records, kind):
        converted.append(path.stem)
        original(path, records, kind)

    monkeypatch.setattr(building, "write_records", counted)
    manifest = build("mix1", str(raw), out, progress=False)
    assert manifest["missing"] == ["hh_rlhf", "ultrafeedback"]
    assert sorted(converted) == ["shp", "summarize"]
    build("mix1", str(raw), out, progress=False)
    assert len(converted) == 2
    write_lines(raw / "shp.jsonl", [shp_row(1)])
    assert build("mix1", str(raw), out, progress=False)["sources"]["shp"]["records"] == 1
    (out / "data" / "summarize.parquet").write_bytes(b"half a file")
    build("mix1", str(raw), out, progress=False)
    assert converted[2:] == ["shp", "summarize"]


def test_a_failing_source_leaves_the_finished_ones(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    shutil.copytree(RAW, raw)
    write_lines(raw / "summarize.jsonl", [{"unknown": 1}])
    with pytest.raises(DataError, match="summarize"):
        build("mix1", str(raw), out, progress=False)
    assert (out / "reports" / "ultrafeedback.json").exists()
    assert not (out / "manifest.json").exists()


def test_a_limit_counts_what_it_leaves_out():
    everything, _ = convert("shp", "embedded")
    some, tally = convert(Part("shp", limit=5), "embedded")
    assert some == everything[:5]
    assert tally.dropped["not_drawn"] == len(everything) - 5
    assert tally.kept == 5


def test_version_1_takes_one_pair_a_prompt():
    parts = {part.source: part for part in MIXTURES["v1"].parts}
    posts = [row["prompt_id"] for row in convert(parts["shp"], "embedded")[0]]
    assert len(posts) == len(set(posts)) < len(convert("shp", "embedded")[0])
    for name in ("ultrafeedback", "helpsteer"):  # one for each group of answers
        records, tally = convert(parts[name], "embedded")
        assert 10 < len(records) <= tally.read
        assert len(records) < len(convert(name, "embedded")[0])
        assert tally.dropped["not_drawn"] > 0


def test_the_authors_set_is_taken_as_it_is(tmp_path):
    turns = {side: [{"role": "user", "content": "Hi"}] for side in ("chosen", "rejected")}
    for side, text in (("chosen", "Hello!"), ("rejected", "Go away.")):
        turns[side] = [*turns[side], {"role": "assistant", "content": text}]
    good = {**turns, "chosen_score": 2, "rejected_score": None}
    same = {**good, "rejected": good["chosen"]}
    write_lines(tmp_path / "preference_700k.jsonl", [good, same, {**good, "chosen": None}])
    records, tally = convert("preference_700k", str(tmp_path))
    assert [(row["chosen_score"], row["rejected_score"]) for row in records] == [(2.0, None)]
    assert tally.dropped == {"identical_answers": 1, "malformed": 1}


def test_statistics_of_a_hand_made_set():
    def pair(name, prompt, chosen, rejected):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "."}]
        chosen, rejected = (
            [*turns[:1], {**turns[1], "content": text}] for text in (chosen, rejected)
        )
        return {"prompt_id": name, "chosen": chosen, "rejected": rejected}

    pairs = [
        pair("p", "one two three", "a b c d", "a b"),
        pair("p", "one two three", "a b", "a b c d e f"),
        pair("q", "one", "a b", "c d"),
    ]
    found = source_statistics(pairs, lambda text: len(text.split()))
    assert found["prompts"] == 2
    assert found["pairs"] == found["sampled"] == 3
    assert found["prompt_tokens"] == pytest.approx(7 / 3)
    assert found["chosen_tokens"] == pytest.approx(8 / 3)
    assert found["rejected_tokens"] == pytest.approx(10 / 3)
    assert found["longer_chosen"] == pytest.approx(0.5)
    assert found["turns"] == {1: 3}
    assert chosen_is_longer(pairs[2]) == 0.5
    assert length_histogram([0, 49, 50, 160], 50) == {0: 2, 50: 1, 100: 0, 150: 1}
    with pytest.raises(DataError, match="no pairs"):
        source_statistics([], len)


def test_sampled_lengths_are_seeded_and_stated():
    pairs, _ = convert("ultrafeedback", "embedded")
    first, again, other = (source_statistics(pairs, len, 50, seed) for seed in (0, 0, 1))
    assert first == again
    assert first["sampled"] == 50
    assert first["chosen_tokens"] != other["chosen_tokens"]
    assert first["longer_chosen"] == other["longer_chosen"]


def test_prompts_are_sliced_without_overlap(tmp_path):
    manifest = build("prompts", "embedded", tmp_path, progress=False)
    slices = {
        split: list(read_records(tmp_path / "slices" / f"{split}.parquet"))
        for split in PROMPT_SPLITS
    }
    assert {split: len(rows) for split, rows in slices.items()} == manifest["slices"]
    names = [row["prompt_id"] for rows in slices.values() for row in rows]
    assert len(names) == len(set(names))
    published = EvaluationIndex(embedded.load_prompts("evaluation"))
    texts = [prompt_text(row["messages"]) for rows in slices.values() for row in rows]
    assert not any(map(published.contaminated, texts))
    assert {"prompt_set,contaminated", "prompt_set,duplicate"} <= {
        line.rpartition(",")[0] for line in (tmp_path / "dropped.csv").read_text().splitlines()
    }


def tables_of(folder, out, max_rows=0):
    return course_data(str(folder), 0, None, None, out, max_rows)


def test_embedded_tables_are_the_miniature_s_own(tmp_path):
    def utility(prompt, text, finish_reason):
        return float(len(text.split()) % 7)

    def prefer(a, b, key):
        return a["utility"] > b["utility"]

    tables = course_data("embedded", 0, utility, prefer, tmp_path).tables
    assert list(tables) == [
        "sft",
        "preference_train",
        "preference_heldout",
        *(f"prompts_{split}" for split in PROMPT_SPLITS),
    ]
    for split in ("preference_train", "preference_heldout"):
        assert tables[split] == embedded.build_pairs(split, utility, prefer)[0]
    assert tables["sft"] == embedded.load_demonstrations()
    assert tables["prompts_evaluation"] == embedded.load_prompts("evaluation")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The tables of a folder of raw files from which two sources were taken away."""
    raw = tmp_path_factory.mktemp("raw")
    shutil.copytree(RAW, raw, dirs_exist_ok=True)
    (raw / "shp.jsonl").unlink()
    (raw / "gpteacher.jsonl").unlink()
    return tables_of(raw, tmp_path_factory.mktemp("out"))


def test_tables_of_a_folder_are_valid_and_missing_sources_reported(real):
    assert real.missing == ["shp", "gpteacher"]
    pairs = real.tables["preference_train"] + real.tables["preference_heldout"]
    assert not any(map(pair_problem, pairs))
    assert not any(map(demonstration_problem, real.tables["sft"]))
    assert {row["source"] for row in pairs} == {p.source for p in MIXTURES["mix2"].parts} - {"shp"}
    assert {"source", "reason", "count"} == set(real.dropped[0])
    assert {row["reason"] for row in real.examples} <= set(REASONS)


def test_no_prompt_of_a_folder_stands_on_two_sides(real):
    def prompts(table, key="messages", last=None):
        return {prompt_text(row[key][:last]) for row in real.tables[table]}

    train, held_out = (prompts(f"preference_{s}", "chosen", -1) for s in ("train", "heldout"))
    assert train.isdisjoint(held_out)
    index = EvaluationIndex(real.tables["prompts_evaluation"])
    others = [prompts(f"prompts_{split}") for split in PROMPT_SPLITS if split != "evaluation"]
    everything = set().union(train, held_out, prompts("sft", last=-1), *others)
    assert not any(map(index.contaminated, everything))


def test_rows_are_drawn_by_hash_and_the_rest_counted(real, tmp_path):
    few = tables_of(RAW, tmp_path, max_rows=20)
    everything = tables_of(RAW, tmp_path)
    assert few.tables["preference_train"] == everything.tables["preference_train"][:20]
    assert few.tables["preference_heldout"] == everything.tables["preference_heldout"]
    left = sum(len(everything.tables[t]) - 20 for t in ("preference_train", "sft"))
    assert {"source": "course", "reason": "not_drawn", "count": left} in few.dropped


def test_a_folder_without_a_needed_kind_is_refused(tmp_path):
    shutil.copy(RAW / "shp.jsonl", tmp_path)
    with pytest.raises(DataError, match="mixture sft"):
        tables_of(tmp_path, tmp_path / "out")


def test_a_stage_remembers_the_files_of_a_folder(tmp_path):
    (tmp_path / "shp.jsonl").write_text("{}")
    before = source_key(str(tmp_path))
    (tmp_path / "shp.jsonl").write_text("{} ")
    assert source_key(str(tmp_path)) != before
    assert source_key("embedded") == {}


def test_command_line_lists_builds_and_explains(tmp_path, capsys):
    assert command_line.main(["sources", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert set(listed["sources"]) == set(SOURCES)
    assert set(listed["mixtures"]) == set(MIXTURES)
    assert listed["sources"]["pku_saferlhf"]["non_commercial"] is True
    line = ["build", "--mixture", "nectar", "--from", "embedded", "--out", str(tmp_path / "out")]
    assert command_line.main(line) == 0
    printed = capsys.readouterr().out
    assert "rows read" in printed
    assert "may not be used commercially" in printed
    assert command_line.main([*line[:3], "--from", "nowhere", "--out", str(tmp_path)]) == 1
    assert "no folder" in capsys.readouterr().err


def test_command_line_prints_table_5_of_what_was_built(mix2, tmp_path, capsys):
    assert command_line.main(["statistics", str(mix2[0])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    assert lines[0].split()[:2] == ["prompts", "prompt_tokens"]
    assert command_line.main(["statistics", str(mix2[0]), "--json"]) == 0
    shp = json.loads(capsys.readouterr().out)["shp"]
    assert sum(shp["histograms"]["chosen"].values()) == shp["sampled"] == shp["pairs"]
    assert command_line.main(["statistics", str(tmp_path)]) == 1
    assert "run build first" in capsys.readouterr().err


def test_push_uploads_the_card_but_not_the_quoted_rows(tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, name, **options):
            calls.append(("create", name, options["repo_type"]))

        def upload_folder(self, **options):
            calls.append(("upload", options["repo_id"], options["ignore_patterns"]))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    line = ["build", "--mixture", "nectar", "--from", "embedded", "--out", str(tmp_path)]
    assert command_line.main([*line, "--push", "me/nectar"]) == 0
    assert calls[0] == ("create", "me/nectar", "dataset")
    assert calls[1][:2] == ("upload", "me/nectar")
    assert "reports/*" in calls[1][2]
