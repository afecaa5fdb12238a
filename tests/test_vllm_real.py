"""vLLM itself on the real weights: as a judge's server and as the sampling backend.

Skipped without vLLM, which lives in an environment of its own: `make vllm`.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace

import pytest

from data_prep.embedded import load_prompts
from rlhf_guide import generation, vllm_backend
from rlhf_guide.errors import GuideError
from rlhf_guide.judge_client import JudgeClient
from rlhf_guide.judges import as_conversations, judge_win_rate, paired_answers, pairwise
from rlhf_guide.judges import single_grade as grade_all
from rlhf_guide.models import resolve_model
from rlhf_guide.profiles import load_profile

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.model,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed in this environment",
    ),
]

START_SECONDS = 900  # two slow cores
PROMPTS = load_prompts("evaluation")[:12]
SETTINGS = replace(load_profile("cpu").generation, max_new_tokens=24, batch_size=12)
TEMPERATURES = [0.0, 1.0, 0.7]


@pytest.fixture(scope="module")
def weights():
    return resolve_model("smollm2-135m-instruct")


# --- the sampling backend --------------------------------------------------------------------


def generate(weights, path, backend, prompts=PROMPTS[:6], dtype="float32", **options):
    settings = replace(SETTINGS, backend=backend, **options)
    return generation.generate(
        weights, prompts, settings, TEMPERATURES, 1, path, dtype, progress=False
    )


@pytest.fixture(scope="module")
def sampled(weights, tmp_path_factory):
    """The same request answered by both backends: {backend: (file, rows)}."""
    folder, found = tmp_path_factory.mktemp("answers"), {}
    for backend in ("vllm", "transformers"):
        path = folder / f"{backend}.jsonl"
        found[backend] = path, generate(weights, path, backend)
    return found


def test_rows_have_the_same_form_from_both_backends(sampled):
    (path, rows), (_, expected) = sampled["vllm"], sampled["transformers"]
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    for row, other in zip(rows, expected, strict=True):
        assert {k: v for k, v in row.items() if k != "responses"} == {
            k: v for k, v in other.items() if k != "responses"
        }
        for answer, twin in zip(row["responses"], other["responses"], strict=True):
            assert set(answer) == set(twin)
            assert (answer["seed"], answer["temperature"]) == (twin["seed"], twin["temperature"])


def test_finish_reasons_tell_the_truth(sampled):
    answers = [answer for row in sampled["vllm"][1] for answer in row["responses"]]
    assert {answer["finish_reason"] for answer in answers} == {"stop", "length"}
    for answer in answers:
        limit = SETTINGS.max_new_tokens
        assert answer["n_tokens"] == limit if answer["finish_reason"] == "length" else True
        assert answer["n_tokens"] <= limit
        assert "<|im_end|>" not in answer["text"]


def test_greedy_answers_are_those_of_transformers(sampled):
    """Same tokens in, same weights: at temperature 0 two libraries must write the same text."""
    pairs = [
        (row["responses"][0], twin["responses"][0])
        for row, twin in zip(sampled["vllm"][1], sampled["transformers"][1], strict=True)
    ]
    assert [a["text"] for a, _ in pairs] == [b["text"] for _, b in pairs]
    assert [a["finish_reason"] for a, _ in pairs] == [b["finish_reason"] for _, b in pairs]


def test_prompts_that_do_not_fit_into_one_step_wait(weights, sampled, tmp_path, monkeypatch):
    """Read in parts, requests with seeds kill vLLM 0.32 on a CPU."""
    monkeypatch.setattr(vllm_backend, "STEP_TOKENS", 1)  # so: what one request needs
    rows = generate(weights, tmp_path / "waiting.jsonl", "vllm")
    for row, before in zip(rows, sampled["vllm"][1], strict=True):
        assert row["responses"][0] == before["responses"][0]


def group_is_gone(leader):
    for _ in range(100):
        try:
            os.killpg(leader, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_a_killed_run_goes_on_and_leaves_no_process(weights, sampled, tmp_path, monkeypatch):
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1]
    )
    path, rows = tmp_path / "cut.jsonl", sampled["vllm"][1]
    kept = json.loads(json.dumps(rows[2]))
    kept["responses"][1]["text"] = "kept, not drawn again"
    path.write_text(json.dumps(kept) + "\n" + json.dumps(rows[0])[:40])
    resumed = generate(weights, path, "vllm")
    assert resumed[2] == kept
    assert [row["prompt_id"] for row in resumed] == [row["prompt_id"] for row in rows]
    assert group_is_gone(started[0].pid)
    drawn = [(a, b) for a, b in zip(resumed, rows, strict=True) if a != kept]
    for row, before in drawn:
        assert [r["seed"] for r in row["responses"]] == [r["seed"] for r in before["responses"]]
        assert row["responses"][0] == before["responses"][0]


def test_a_finished_file_needs_no_vllm(weights, sampled, monkeypatch):
    monkeypatch.setattr("rlhf_guide.vllm_backend._results", None)
    path, rows = sampled["vllm"]
    assert generate(weights, path, "vllm") == rows


def test_what_does_not_fit_is_refused_with_vllm_s_own_words(weights, tmp_path):
    with pytest.raises(GuideError, match="max_model_len"):
        generate(weights, tmp_path / "a.jsonl", "vllm", PROMPTS[:1], max_new_tokens=9000)


# --- the server ------------------------------------------------------------------------------


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_healthy(process, port, log):
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
                if reply.status == 200:
                    return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(1)
    raise AssertionError(f"not healthy after {START_SECONDS} s:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def judge_url(weights, tmp_path_factory):
    """The address of a vLLM server; its processes form a group of their own, ended afterwards."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log.txt"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(weights), "--served-model-name", "judge", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
    command += ["--max-model-len", "2048", "--kv-cache-memory-bytes", str(2**30)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as sink:
        process = subprocess.Popen(
            command, env=environment, stdout=sink, stderr=sink, start_new_session=True
        )
    try:
        wait_until_healthy(process, port, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def pairs():
    """References against their one-sentence versions: real questions, answers of two lengths."""

    def rows(field):
        return [
            {
                "prompt_id": prompt["prompt_id"],
                "messages": prompt["messages"],
                "responses": [{"text": prompt[field]}],
            }
            for prompt in PROMPTS
        ]

    return paired_answers(rows("reference"), rows("short"))


def client_of(url, folder):
    return JudgeClient(url, "judge", folder, concurrency=4, timeout=300.0)


def test_every_comparison_has_a_verdict_or_a_counted_failure(judge_url, pairs, tmp_path):
    rows, summary = pairwise(client_of(judge_url, tmp_path), pairs, max_tokens=16)
    assert len(rows) == summary["n"] == len(pairs)
    failed = [reason for row in rows for reason in row["failures"] if reason]
    for row in rows:
        for verdict, failure in zip(row["verdicts"], row["failures"], strict=True):
            assert (verdict is None) == (failure is not None)
    assert sum(summary["failures"].values()) == len(failed)
    # The server itself works: what fails is at most the small model's discipline.
    assert set(summary["failures"]) <= {"no verdict", "empty"}


def test_held_to_a_verdict_the_small_judge_always_gives_one(judge_url, pairs, tmp_path):
    rows, summary = pairwise(client_of(judge_url, tmp_path), pairs, verdict_only=True)
    assert (summary["judged"], summary["failures"]) == (len(pairs), {})
    assert 0 <= summary["position_bias"] <= 1
    assert summary["consistent"] + summary["position_bias"] <= 1
    found = judge_win_rate([row["preference"] for row in rows], pairs, n_boot=100)
    assert found["left_out"] == 0
    assert found["win_rate"]["n"] == len(pairs)
    grades, overall = grade_all(
        client_of(judge_url, tmp_path),
        as_conversations(
            [
                {
                    "prompt_id": pair.prompt_id,
                    "messages": pair.context,
                    "responses": [{"text": pair.answer}],
                }
                for pair in pairs
            ]
        ),
        verdict_only=True,
    )
    assert overall["graded"] == len(pairs)
    assert all(1 <= row["grade"] <= 10 for row in grades)


def test_a_second_run_reads_the_cache(judge_url, pairs, tmp_path, monkeypatch):
    first = pairwise(client_of(judge_url, tmp_path), pairs[:3], verdict_only=True)
    again = client_of(judge_url, tmp_path)
    monkeypatch.setattr(again, "_complete", None)
    assert pairwise(again, pairs[:3], verdict_only=True) == first


def test_a_request_beyond_the_context_is_a_counted_failure(judge_url, tmp_path):
    requests = [[{"role": "user", "content": text}] for text in ("word " * 3000, "Say rain.")]
    too_long, fine = client_of(judge_url, tmp_path).ask(requests, max_tokens=8, progress=False)
    assert too_long.failure == "http 400"
    assert fine.text


def test_a_wrong_model_name_names_the_served_one(judge_url, tmp_path):
    client = JudgeClient(judge_url, "someone-else", tmp_path)
    with pytest.raises(GuideError, match="It serves: judge"):
        client.ask([[{"role": "user", "content": "Say rain."}]], progress=False)
