"""Sampling with vLLM in a process of its own, so that the GPU's memory is free again afterwards.

The parent writes one request file and reads the answers from a results file while the child writes
them, one line a batch. Token ids go in and token ids come out: vLLM never sees the template.

    python -m rlhf_guide.vllm_backend requests.json     (what the parent runs)
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_guide.errors import GuideError

# On a CPU vLLM would claim nine tenths of the memory, and compile for minutes before it starts. A
# prompt that does not fit into a step would be read in parts, and 0.32 then dies of requests with
# seeds of their own ("CPU Generator does not use offset"): it waits for the next step instead.
CPU_OPTIONS = {
    "kv_cache_memory_bytes": 2 * 2**30,
    "enforce_eager": True,
    "enable_chunked_prefill": False,
}
STEP_TOKENS = 4096  # that a step on a CPU reads; more where the longest request needs it

INSTALL = (
    "vLLM is not installed: `pip install 'rlhf-guide[vllm]'` on a GPU, use the environment that "
    "`make vllm` makes on a CPU, or set generation_backend to transformers."
)


def sample_with_vllm(
    model_path: str | Path,
    adapter: str | Path | None,
    tokenizer: Any,
    requests: Sequence[Any],
    batches: Sequence[Sequence[int]],
    settings: Any,
    dtype: Any,
) -> Iterator[list[list[list[int]]]]:
    """New tokens, batch by batch, as `generation` expects them.

    Raises GuideError when vLLM is missing, or fails (with the last lines of what it said).
    """
    if not batches:
        return
    if importlib.util.find_spec("vllm") is None:
        raise GuideError(INSTALL)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        job = _job(model_path, adapter, tokenizer, requests, batches, settings, dtype, folder)
        (folder / "requests.json").write_text(json.dumps(job), encoding="utf-8")
        yield from _results(folder, len(batches))


def _job(
    model_path: str | Path,
    adapter: str | Path | None,
    tokenizer: Any,
    requests: Sequence[Any],
    batches: Sequence[Sequence[int]],
    settings: Any,
    dtype: Any,
    folder: Path,
) -> dict[str, Any]:
    """Everything the child needs, as JSON; an adapter is merged into a temporary model first."""
    from rlhf_guide.chat import stop_token_ids
    from rlhf_guide.models import choose_device, load_policy, save_model

    if adapter is not None:
        merged = load_policy(model_path, dtype, adapter)
        model_path = save_model(merged, tokenizer, folder / "merged")
        del merged
    fields = ("prompt_ids", "temperatures", "seeds")
    device, resolved, _ = choose_device(dtype)
    longest = max(len(requests[i].prompt_ids) for batch in batches for i in batch)
    length = longest + settings.max_new_tokens
    return {
        "model": str(model_path),
        "dtype": str(resolved).removeprefix("torch."),
        "max_model_len": length,
        "options": engine_options(device.type, length),
        "max_new_tokens": settings.max_new_tokens,
        "top_p": settings.top_p,
        "stop_ids": sorted({*stop_token_ids(tokenizer), tokenizer.pad_token_id}),
        "batches": [
            [{field: getattr(requests[i], field) for field in fields} for i in batch]
            for batch in batches
        ],
    }


def engine_options(device: str, length: int) -> dict[str, Any]:
    """What vLLM's engine needs besides model and data type, for requests of up to `length` tokens.

    `length` counts prompt and answer.
    """
    if device != "cpu":
        return {}
    return {**CPU_OPTIONS, "max_num_batched_tokens": max(STEP_TOKENS, length)}


def _results(folder: Path, count: int) -> Iterator[list[list[list[int]]]]:
    """Start the child and yield each batch as soon as its line is complete."""
    package = str(Path(__file__).resolve().parent.parent)
    paths = [package, os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    command = [sys.executable, "-m", "rlhf_guide.vllm_backend", str(folder / "requests.json")]
    log = folder / "log.txt"
    results = folder / "results.jsonl"
    results.touch()
    with log.open("w") as sink, results.open(encoding="utf-8") as source:
        child = subprocess.Popen(
            command, env=environment, stdout=sink, stderr=sink, start_new_session=True
        )
        try:
            for _ in range(count):
                yield json.loads(_next_line(source, child, log))
        finally:
            # vLLM's engine and workers are processes of their own: the whole group must go.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _next_line(source: Any, child: subprocess.Popen, log: Path) -> str:
    """The next whole line of the results; GuideError when the child ended without it."""
    line = ""
    while not line.endswith("\n"):
        ended = child.poll() is not None  # asked before reading: the last line may just be there
        part = source.readline()
        line += part
        if not part and ended:
            said = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise GuideError(
                f"vLLM ended with code {child.returncode} before all answers were drawn; finished "
                f"prompts are kept. Its last words:\n{said}"
            )
        if not part:
            time.sleep(0.2)
    return line


def _serve(path: Path) -> None:
    """The child: load the model once, answer batch by batch."""
    from vllm import LLM

    job = json.loads(path.read_text(encoding="utf-8"))
    llm = LLM(
        model=job["model"],
        dtype=job["dtype"],
        max_model_len=job["max_model_len"],
        enable_prefix_caching=True,
        **job["options"],
    )
    with (path.parent / "results.jsonl").open("a", encoding="utf-8") as sink:
        for batch in job["batches"]:
            answers = draw_answers(llm, batch, job["max_new_tokens"], job["top_p"], job["stop_ids"])
            sink.write(json.dumps(answers) + "\n")
            sink.flush()


def draw_answers(
    engine: Any,
    requests: Sequence[Mapping[str, Any]],
    max_new_tokens: int,
    top_p: float,
    stop_ids: Sequence[int],
) -> list[list[list[int]]]:
    """New tokens of every answer, request by request; a request has the fields of `Request`."""
    from vllm import SamplingParams

    wanted = [
        (
            {"prompt_token_ids": request["prompt_ids"]},
            SamplingParams(
                temperature=temperature,
                top_p=top_p,
                max_tokens=max_new_tokens,
                seed=seed,
                stop_token_ids=list(stop_ids),
                detokenize=False,
            ),
        )
        for request in requests
        for temperature, seed in zip(request["temperatures"], request["seeds"], strict=True)
    ]
    prompts, parameters = zip(*wanted, strict=True)
    outputs = engine.generate(list(prompts), list(parameters), use_tqdm=False)
    tokens = iter([answer_tokens(output.outputs[0], stop_ids) for output in outputs])
    return [[next(tokens) for _ in request["seeds"]] for request in requests]


def answer_tokens(completion: Any, stop_ids: Sequence[int]) -> list[int]:
    """New tokens, ending with a stop token if the model stopped (vLLM may leave it out)."""
    tokens = list(completion.token_ids)
    if completion.finish_reason == "stop" and (not tokens or tokens[-1] not in stop_ids):
        tokens.append(stop_ids[0])
    return tokens


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
