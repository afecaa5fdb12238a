"""Answers from a policy: n samples a prompt at mixed temperatures (paper §3.3, Algorithm 2 line 4).

    rows = generate(folder, prompts, settings.generation, [1.0] * 4 + [0.7] * 4, seed, "out.jsonl")

Every request (prompt, sample) has its own seed, stored with the answer. Rows are written as their
batch finishes, so a killed run goes on where it stopped; at the end they are in the prompts' order.
Two backends stand behind the one function: transformers, and vLLM in a process of its own.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from rlhf_guide.chat import encode_prompt, stop_token_ids
from rlhf_guide.errors import DataError, GuideError, ParameterError
from rlhf_guide.files import append_jsonl, write_jsonl
from rlhf_guide.models import load_policy, load_tokenizer
from rlhf_guide.sampling import Request, sample_batch
from rlhf_guide.settings import Generation
from rlhf_guide.vllm_backend import sample_with_vllm

Row = dict[str, Any]
Batches = list[list[int]]


def generate(
    model_path: str | Path,
    prompts: Sequence[Row],
    settings: Generation,
    temperatures: Sequence[float],
    seed: int,
    out_path: str | Path,
    dtype: str | torch.dtype = "auto",
    adapter: str | Path | None = None,
    progress: bool = True,
) -> list[Row]:
    """One answer per entry of `temperatures` for each prompt, in the prompts' order.

    A row is the prompt's fields plus `responses` (`text` without the stop token, `finish_reason`
    "stop" or "length", `temperature`, `n_tokens`, `seed`) and `model`. Rows that `out_path` holds
    already, from the same prompts, temperatures, seed and model, are kept. The same call gives
    the same rows again. `settings.batch_size` counts answers; it is a matter of memory, time and
    rounding alone. Raises ParameterError, DataError for repeated prompts and for one too long for
    the model, and GuideError when memory runs out; finished rows are in the file then.
    """
    name = policy_name(model_path, adapter)
    check_prompts(prompts, temperatures)
    tokenizer = load_tokenizer(model_path)
    requests = [new_request(tokenizer, prompt, temperatures, seed) for prompt in prompts]
    done = _kept_rows(Path(out_path), prompts, requests, name)
    write_jsonl(out_path, [done[p["prompt_id"]] for p in prompts if p["prompt_id"] in done])
    batches = plan_batches(requests, settings.batch_size)
    # A batch that was cut in the middle is drawn again whole: its rows then come out as before.
    todo = [batch for batch in batches if any(prompts[i]["prompt_id"] not in done for i in batch)]
    total = len(prompts) * len(temperatures)
    bar = tqdm(total=total, desc="answers", disable=not progress, file=sys.stdout)
    bar.update((len(prompts) - sum(map(len, todo))) * len(temperatures))
    sample = sample_with_vllm if settings.backend == "vllm" else _sample_with_transformers
    outputs = sample(model_path, adapter, tokenizer, requests, todo, settings, dtype)
    for batch, answers in zip(todo, _plain_memory_errors(outputs, settings), strict=True):
        fresh = [
            {**prompts[i], "responses": as_responses(tokenizer, requests[i], tokens), "model": name}
            for i, tokens in zip(batch, answers, strict=True)
        ]
        fresh = [row for row in fresh if row["prompt_id"] not in done]
        append_jsonl(out_path, fresh)
        done.update({row["prompt_id"]: row for row in fresh})
        bar.update(len(batch) * len(temperatures))
    bar.close()
    rows = [done[prompt["prompt_id"]] for prompt in prompts]
    write_jsonl(out_path, rows)
    return rows


def _plain_memory_errors(outputs: Iterator[Any], settings: Generation) -> Iterator[Any]:
    """The same outputs; a lack of memory says which number to lower."""
    try:
        yield from outputs
    except (MemoryError, RuntimeError) as error:  # PyTorch's own error is a RuntimeError
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and (
            "can't allocate memory" not in str(error)  # its words on a CPU
        ):
            raise
        raise GuideError(
            f"out of memory while sampling {settings.batch_size} answers at once, up to "
            f"{settings.max_new_tokens} tokens each: lower generation_batch_size and run again. "
            "Finished prompts are kept."
        ) from error


def answer_config(settings: Generation) -> dict[str, Any]:
    """What answers depend on beyond rounding, for a stage's config: all but the batch size.

    So a run that was out of memory goes on with smaller batches and keeps its finished prompts.
    """
    return {name: value for name, value in asdict(settings).items() if name != "batch_size"}


def request_seed(seed: int, prompt_id: str, sample: int) -> int:
    """A seed for one answer, from the run's seed, the prompt and the sample's number."""
    digest = hashlib.sha256(f"{seed}/{prompt_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:4]) >> 1  # vLLM wants a signed integer


def policy_name(model_path: str | Path, adapter: str | Path | None) -> str:
    """A name for the rows: the policy's place in its run folder, whatever that folder is called.

    Outside a run folder it is the last two folders, never a whole path.
    """
    path = Path(adapter or model_path)
    run = next((folder for folder in path.parents if (folder / "run.json").exists()), None)
    parts = path.relative_to(run).parts if run else path.parts[-2:]
    return "/".join(part for part in parts if part != "/")


def check_prompts(prompts: Sequence[Row], temperatures: Sequence[float]) -> None:
    """Raise ParameterError for impossible temperatures, DataError for a prompt given twice."""
    if not temperatures or min(temperatures) < 0:
        raise ParameterError(
            f"temperatures are {list(temperatures)}: give at least one, none below 0."
        )
    ids = [prompt["prompt_id"] for prompt in prompts]
    if len(set(ids)) < len(ids):
        repeated = next(i for i in ids if ids.count(i) > 1)
        raise DataError(f"prompt_id {repeated!r} stands twice among the prompts: make ids unique.")


def new_request(tokenizer: Any, prompt: Row, temperatures: Sequence[float], seed: int) -> Request:
    """A prompt's tokens with the temperature and the seed of each of its answers."""
    seeds = [request_seed(seed, prompt["prompt_id"], k) for k in range(len(temperatures))]
    ids = encode_prompt(tokenizer, prompt["messages"])
    return Request(ids, tuple(float(t) for t in temperatures), tuple(seeds))


def plan_batches(requests: Sequence[Request], batch_size: int) -> Batches:
    """Indices of requests in batches of like length, longest first, so memory peaks early."""
    order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt_ids), i))
    per_batch = max(1, batch_size // len(requests[0].seeds)) if requests else 1
    return [order[start : start + per_batch] for start in range(0, len(order), per_batch)]


def _kept_rows(
    path: Path, prompts: Sequence[Row], requests: Sequence[Request], name: str
) -> dict[str, Row]:
    """Finished rows of an earlier, killed call, without half lines and rows of other calls."""
    if not path.exists():
        return {}
    wanted = {
        prompt["prompt_id"]: (prompt, request)
        for prompt, request in zip(prompts, requests, strict=True)
    }
    kept = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            prompt, request = wanted[row["prompt_id"]]
            same = row["messages"] == prompt["messages"] and row["model"] == name
            same &= tuple(r["seed"] for r in row["responses"]) == request.seeds
            same &= tuple(r["temperature"] for r in row["responses"]) == request.temperatures
        except (ValueError, KeyError, TypeError):
            continue
        if same:
            kept[row["prompt_id"]] = {**prompt, "responses": row["responses"], "model": name}
    return kept


def as_responses(tokenizer: Any, request: Request, answers: Sequence[list[int]]) -> list[Row]:
    """Response records of one prompt's answers, given as new tokens."""
    stops = {*stop_token_ids(tokenizer), tokenizer.pad_token_id}
    rows = []
    for tokens, temperature, seed in zip(answers, request.temperatures, request.seeds, strict=True):
        finished = bool(tokens) and tokens[-1] in stops
        body = tokens[:-1] if finished else tokens
        rows.append(
            {
                "text": tokenizer.decode(body, skip_special_tokens=True),
                "finish_reason": "stop" if finished else "length",
                "temperature": temperature,
                "n_tokens": len(body),
                "seed": seed,
            }
        )
    return rows


def _sample_with_transformers(
    model_path: str | Path,
    adapter: str | Path | None,
    tokenizer: Any,
    requests: Sequence[Request],
    batches: Batches,
    settings: Generation,
    dtype: str | torch.dtype,
) -> Iterator[list[list[list[int]]]]:
    """New tokens, batch by batch: for each request of a batch its answers' token lists."""
    if not batches:
        return
    model = load_policy(model_path, dtype, adapter)
    # A model's own sampling defaults (top-k, repetition penalty) must not slip in.
    stops = stop_token_ids(tokenizer, model)
    model.generation_config = GenerationConfig()
    check_lengths(model, requests, settings.max_new_tokens)
    # A document's end, which base models write, ends an answer as well.
    stops = sorted({*stops, tokenizer.pad_token_id})
    for batch in batches:
        chosen = [requests[index] for index in batch]
        flat = sample_batch(
            model, chosen, stops, tokenizer.pad_token_id, settings.max_new_tokens, settings.top_p
        )
        count = len(chosen[0].seeds)
        yield [flat[start : start + count] for start in range(0, len(flat), count)]


def check_lengths(model: Any, requests: Sequence[Request], max_new_tokens: int) -> None:
    """Refuse prompts that leave no room for the answer, before any time is spent."""
    room = getattr(model.config, "max_position_embeddings", None)
    longest = max(len(request.prompt_ids) for request in requests)
    if room is not None and longest + max_new_tokens > room:
        raise DataError(
            f"the longest prompt has {longest} tokens; with generation_max_new_tokens = "
            f"{max_new_tokens} it exceeds the model's {room} positions: shorten the prompts or "
            "lower the number."
        )
