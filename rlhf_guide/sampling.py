"""Sampling with transformers' `generate`: many short answers, quickly, also on a CPU.

Six things make a batch cheap; none changes what is sampled:

* the n answers to a prompt share one pass over the prompt: its cache is computed once and repeated;
* every few tokens the rows that have stopped leave the batch, and their cache with them;
* prompts of similar length are batched (by the caller), so little padding is computed;
* a token is drawn by inverting the cumulative distribution at one uniform number. `generate`'s own
  way needs a random number for each of the 49,152 tokens of the vocabulary;
* a new token's keys and values are written behind the old ones (`_RoomyLayer`), not joined to a
  copy of them;
* on a CPU query heads that share keys and values are multiplied with them together
  (`_grouped_attention`).

The uniform numbers belong to the request (prompt, sample), not to the batch. A text is therefore
reproduced by its seed alone; neighbours and the batch's order matter no more than rounding does.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer
from transformers.generation import TopPLogitsWarper
from transformers.integrations import sdpa_attention

from rlhf_guide.attention import Attention, replace_attention

SEGMENT = 8  # tokens between two looks at which rows have stopped
BLOCK = 256  # tokens of the vocabulary that `draw` sums at once


@dataclass(frozen=True)
class Request:
    """One prompt, and the temperature and seed of each answer that is wanted."""

    prompt_ids: list[int]
    temperatures: tuple[float, ...]
    seeds: tuple[int, ...]


class InverseTransformSampler(LogitsProcessor):
    """Draw each row's token from softmax(logits / T) with that row's T and uniform number.

    u ~ U(0, 1) picks the first token whose cumulative probability exceeds u. All other scores
    become −∞, so that `generate`'s greedy choice takes the token. T = 0 is the most likely token.
    """

    def __init__(
        self,
        temperatures: torch.Tensor,
        uniforms: torch.Tensor,
        prompt_length: int,
        top_p: float = 1.0,
    ):
        """`temperatures` (rows,), `uniforms` (rows, max_new_tokens), all on the model's device."""
        self.temperatures = temperatures.clamp(min=1e-5)[:, None]
        # Rounding must not let u reach the total, where no token is left.
        self.uniforms = uniforms.clamp(max=1 - 1e-6)
        self.prompt_length = prompt_length
        self.top_p = TopPLogitsWarper(top_p) if top_p < 1 else None

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows only."""
        self.temperatures, self.uniforms = self.temperatures[rows], self.uniforms[rows]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (rows, vocabulary) with one finite entry a row; `scores` is overwritten."""
        scores = scores.div_(self.temperatures)
        if self.top_p is not None:
            scores = self.top_p(input_ids, scores)
        step = input_ids.shape[1] - self.prompt_length
        weights = scores.sub_(scores.amax(dim=1, keepdim=True)).exp_()
        token = draw(weights, self.uniforms[:, step : step + 1])
        return scores.fill_(-torch.inf).scatter_(1, token, 0.0)


def draw(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The first index at which the running sum of a row's weights exceeds u times their total.

    `weights` (rows, n) are not negative and need not sum to 1; `uniforms` and the result are
    (rows, 1). Sums over blocks come first, then the running sum within one block: a running sum
    over a whole vocabulary costs more than the draw.
    """
    tail = -weights.shape[1] % BLOCK
    blocks = torch.nn.functional.pad(weights, (0, tail)) if tail else weights
    blocks = blocks.view(len(weights), -1, BLOCK)
    ends = blocks.sum(dim=2).cumsum(dim=1)
    level = uniforms * ends[:, -1:]
    block = torch.searchsorted(ends, level, right=True)
    before = ends.gather(1, (block - 1).clamp(min=0)).where(block > 0, 0.0)
    inside = blocks[torch.arange(len(block), device=block.device), block[:, 0]].cumsum(dim=1)
    # Rounding may leave the level just above the block's own sum: then its last token with weight.
    level = torch.minimum(level - before, inside[:, -1:].nextafter(inside.new_zeros(())))
    return block * BLOCK + torch.searchsorted(inside, level, right=True)


def request_uniforms(seed: int, count: int) -> torch.Tensor:
    """The uniform numbers of one request, made on the CPU so that they are alike everywhere."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def sample_batch(
    model: Any,
    requests: Sequence[Request],
    stop_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    top_p: float = 1.0,
) -> list[list[int]]:
    """New tokens of every answer, request by request, sample by sample.

    A finished answer ends with one of `stop_ids`; one cut by `max_new_tokens` does not.
    """
    with _grouped_attention(model.device):
        return _sample_batch(model, requests, stop_ids, pad_id, max_new_tokens, top_p)


def _sample_batch(
    model: Any,
    requests: Sequence[Request],
    stop_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    top_p: float,
) -> list[list[int]]:
    ids, mask, owner = _padded(requests, pad_id, model.device)
    cache = _prompt_cache(model, ids, mask, owner)
    ids, mask = ids[owner], mask[owner]
    sampler = _sampler(requests, ids, max_new_tokens, top_p)
    rows = torch.arange(len(ids), device=ids.device)
    stops = torch.tensor(list(stop_ids), device=ids.device)
    new: list[list[int]] = [[] for _ in rows]
    for start in range(0, max_new_tokens, SEGMENT):
        length = ids.shape[1]
        ids = _extend(model, ids, mask, cache, sampler, stops, min(SEGMENT, max_new_tokens - start))
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - length), value=1)
        for row, tokens in zip(rows.tolist(), ids[:, length:].tolist(), strict=True):
            new[row] += tokens
        running = (~torch.isin(ids[:, length:], stops).any(dim=1)).nonzero().flatten()
        if len(running) == 0:
            break
        if len(running) < len(ids):
            ids, mask, rows = ids[running], mask[running], rows[running]
            cache.batch_select_indices(running)
            sampler.keep(running)
    return [_until_stop(tokens, set(stop_ids)) for tokens in new]


class _RoomyLayer(DynamicLayer):
    """A growing cache that makes room for many tokens at once.

    transformers' own copies all keys and values for every new token: a third of the time.
    """

    room: tuple[torch.Tensor, torch.Tensor] | None = None  # `keys` and `values` lie in it

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the new tokens' keys and values, (rows, heads, tokens, size); return all."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not start:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        if self.room is None or self.room[0].shape[-2] < end:
            self.room = _with_room(self.keys, end), _with_room(self.values, end)
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, start:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows only."""
        super().batch_select_indices(indices)
        self.room = None


def _with_room(old: torch.Tensor, length: int) -> torch.Tensor:
    """A copy of `old` (rows, heads, tokens, size) with room for `length` tokens and a segment."""
    rows, heads, tokens, size = old.shape
    larger = old.new_empty(rows, heads, length + SEGMENT, size)
    larger[:, :, :tokens] = old
    return larger


@contextmanager
def _grouped_attention(device: torch.device) -> Iterator[None]:
    """Let several query heads share keys and values where they lie, on a CPU.

    transformers 5.19 copies the whole cache once per group of heads and step when there is a mask,
    because CUDA's fast kernels want it so. PyTorch's kernel for CPUs does not, but reads it once a
    head, in products of a single row. One new token sees all that is there, so its heads of a
    group can be the rows of one product: the same numbers, and in bfloat16 a quarter of the time.
    """
    if device.type != "cpu":
        yield
        return

    def grouped(usual: Attention) -> Attention:
        def attend(
            module: Any,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: torch.Tensor | None,
            **options: Any,
        ) -> tuple[torch.Tensor, None]:
            rows, heads, tokens, size = query.shape
            alike = attention_mask is None or attention_mask.shape[1] == 1  # for all heads
            if tokens > 1 or not alike or options.get("position_bias") is not None:
                return usual(module, query, key, value, attention_mask, **options)
            query = query.reshape(rows, key.shape[1], -1, size)
            options["is_causal"] = False
            output = usual(module, query, key, value, attention_mask, **options)[0]
            return output.transpose(1, 2).reshape(rows, 1, heads, -1), None

        return attend

    with (
        replace_attention(grouped),
        mock.patch.object(sdpa_attention, "use_gqa_in_sdpa", _yes),
    ):
        yield


def _yes(*_: object) -> bool:
    """Unlike a Mock it does not remember, and so keep in memory, what it was called with."""
    return True


def _padded(
    requests: Sequence[Request], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompts padded on the left (prompts, length), their mask, and each row's prompt."""
    length = max(len(request.prompt_ids) for request in requests)
    ids = torch.full((len(requests), length), pad_id, device=device)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, length - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
        mask[row, length - len(request.prompt_ids) :] = 1
    counts = torch.tensor([len(request.seeds) for request in requests], device=device)
    owner = torch.repeat_interleave(torch.arange(len(requests), device=device), counts)
    return ids, mask, owner


def _prompt_cache(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, owner: torch.Tensor
) -> DynamicCache:
    """Keys and values of each prompt but its last token, repeated for the prompt's samples."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_RoomyLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    if ids.shape[1] > 1:
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, :-1]
        # The decoder alone: no scores over the vocabulary are needed here.
        model.get_decoder()(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        cache.batch_select_indices(owner)
    return cache


def _sampler(
    requests: Sequence[Request], ids: torch.Tensor, max_new_tokens: int, top_p: float
) -> InverseTransformSampler:
    temperatures = [t for request in requests for t in request.temperatures]
    seeds = [seed for request in requests for seed in request.seeds]
    uniforms = torch.stack([request_uniforms(seed, max_new_tokens) for seed in seeds])
    return InverseTransformSampler(
        torch.tensor(temperatures, device=ids.device),
        uniforms.to(ids.device),
        prompt_length=ids.shape[1],
        top_p=top_p,
    )


def _extend(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    cache: DynamicCache,
    sampler: InverseTransformSampler,
    stops: torch.Tensor,
    count: int,
) -> torch.Tensor:
    """Let `generate` write up to `count` more tokens a row; the cache grows along."""
    stop_ids = stops.tolist()
    config = GenerationConfig(
        max_new_tokens=count,
        do_sample=False,
        use_cache=True,
        eos_token_id=stop_ids,
        # What follows a stop within a segment is cut off, so any stop token pads.
        pad_token_id=stop_ids[0],
    )
    return model.generate(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=cache,
        generation_config=config,
        logits_processor=LogitsProcessorList([sampler]),
    )


def _until_stop(tokens: list[int], stop_ids: set[int]) -> list[int]:
    """Tokens up to the first stop token, which is kept."""
    for index, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[: index + 1]
    return tokens
