"""Batches for the reward and the preference model: one forward pass in, one vector out.

Both read a whole sequence and need the hidden state of its last real token only. Sequences are
sorted by length before they are batched (little padding), padded on the right, and the position is
taken from the true length, so a score does not depend on its neighbours in the batch, nor on which
token is used for padding.
"""

import random
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel


@torch.inference_mode()
def last_hidden_states(
    model: PreTrainedModel, sequences: Sequence[list[int]], pad_id: int, batch_size: int = 32
) -> torch.Tensor:
    """Hidden state of the last token of each sequence, after the final norm.

    Returns float32 on the CPU, shape (len(sequences), hidden), in the order of the input. The
    backbone alone runs: no vocabulary-sized logits are built. Raises ValueError for an empty
    sequence.
    """
    if any(len(ids) == 0 for ids in sequences):
        raise ValueError("cannot pool an empty sequence: it has no last token")
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    pooled = torch.zeros(len(sequences), model.config.get_text_config().hidden_size)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        pooled[rows] = _pool_batch(model, [sequences[row] for row in rows], pad_id)
    return pooled


def _pool_batch(
    model: PreTrainedModel,
    batch: list[list[int]],
    pad_id: int,
    cache: DynamicCache | None = None,
    past_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Last hidden states of a batch, which continues what is in the cache, if there is one."""
    lengths = torch.tensor([len(ids) for ids in batch])
    input_ids = torch.full((len(batch), int(lengths.max())), pad_id)
    for row, ids in enumerate(batch):
        input_ids[row, : len(ids)] = torch.tensor(ids)
    places = torch.arange(input_ids.shape[1])
    mask = (places < lengths[:, None]).long()
    past = {}
    if cache is not None:
        positions = past_mask.sum(dim=1, keepdim=True) + places
        past = {"past_key_values": cache, "position_ids": positions.to(model.device)}
        mask = torch.cat([past_mask, mask], dim=1)
    output = model.base_model(
        input_ids=input_ids.to(model.device),
        attention_mask=mask.to(model.device),
        use_cache=cache is not None,
        **past,
    )
    last = output.last_hidden_state[torch.arange(len(batch)), lengths - 1]
    return last.float().cpu()


@torch.inference_mode()
def last_hidden_states_by_prompt(
    model: PreTrainedModel,
    sequences: Sequence[list[int]],
    prompts: Sequence[Hashable],
    pad_id: int,
    batch_size: int = 32,
) -> torch.Tensor:
    """`last_hidden_states` of sequences that share beginnings, each of which is read once.

    `prompts` names the prompt of each sequence; what the sequences of a prompt have in common is
    its beginning. The keys and values of all beginnings are kept, so memory grows with the number
    of prompts: for a few dozen short ones, and on the CPU only, since a GPU has no memory to spare
    for them. Rounding aside, the result is the same.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(index)
    if len(groups) == len(sequences) or model.device.type != "cpu":
        return last_hidden_states(model, sequences, pad_id, batch_size)
    shared, owner = [], [0] * len(sequences)
    for number, rows in enumerate(groups.values()):
        shared.append(_beginning([sequences[row] for row in rows]))
        for row in rows:
            owner[row] = number
    layers, mask = _read_beginnings(model, shared, pad_id, batch_size)
    tails = [ids[len(shared[at]) :] for ids, at in zip(sequences, owner, strict=True)]
    order = sorted(range(len(tails)), key=lambda index: len(tails[index]))
    pooled = torch.zeros(len(tails), model.config.get_text_config().hidden_size)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        at = torch.tensor([owner[row] for row in rows])
        width = int(mask[at].sum(dim=1).max())  # beginnings are padded on the left
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(layers):
            past = keys.shape[2] - width
            cache.update(keys[at, :, past:], values[at, :, past:], layer)
        past_mask = mask[at, mask.shape[1] - width :]
        pooled[rows] = _pool_batch(model, [tails[row] for row in rows], pad_id, cache, past_mask)
    return pooled


def _beginning(sequences: Sequence[list[int]]) -> list[int]:
    """The tokens that all sequences start with, leaving at least one of each to read."""
    shortest = min(len(ids) for ids in sequences) - 1
    first = sequences[0]
    for place in range(shortest):
        if any(ids[place] != first[place] for ids in sequences):
            return first[:place]
    return first[:shortest]


def _read_beginnings(
    model: PreTrainedModel, shared: Sequence[list[int]], pad_id: int, batch_size: int
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """Each layer's keys and values (beginnings, heads, length, size), padded left, and the mask."""
    length = max(1, *(len(ids) for ids in shared))
    mask = torch.zeros(len(shared), length, dtype=torch.long)
    ids = torch.full((len(shared), length), pad_id)
    for row, tokens in enumerate(shared):
        if tokens:
            mask[row, -len(tokens) :] = 1
            ids[row, -len(tokens) :] = torch.tensor(tokens)
    order = sorted(range(len(shared)), key=lambda index: len(shared[index]))
    layers: list[tuple[torch.Tensor, torch.Tensor]] = []
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = max(1, len(shared[rows[-1]]))
        part = mask[rows, length - width :]
        cache = DynamicCache()
        model.base_model(
            input_ids=ids[rows, length - width :].to(model.device),
            attention_mask=part.to(model.device),
            position_ids=(part.cumsum(dim=1) - 1).clamp(min=0).to(model.device),
            past_key_values=cache,
            use_cache=True,
        )
        if not layers:
            layers = [
                tuple(x.new_zeros(len(shared), x.shape[1], length, x.shape[3]) for x in pair)
                for pair in ((layer.keys, layer.values) for layer in cache.layers)
            ]
        for (keys, values), layer in zip(layers, cache.layers, strict=True):
            keys[rows, :, length - width :] = layer.keys
            values[rows, :, length - width :] = layer.values
    return layers, mask


def bucketed_order(lengths: Sequence[int], batch_size: int, seed: int, pool: int = 8) -> list[int]:
    """Order in which consecutive batches hold sequences of similar length, batches shuffled.

    Random pools of `pool * batch_size` items are sorted by length and cut into batches, and the
    batches are shuffled: padding falls, while neither the order of the steps nor the company of an
    example follows its length strictly. An incomplete batch stays last.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    full = len(lengths) // batch_size * batch_size
    shuffled, rest = shuffled[:full], shuffled[full:]
    batches = []
    for start in range(0, full, pool * batch_size):
        part = sorted(shuffled[start : start + pool * batch_size], key=lambda i: lengths[i])
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    mixed = torch.randperm(len(batches), generator=generator).tolist()
    return [index for batch in mixed for index in batches[batch]] + rest


def sample_rows(rows: Sequence[Any], max_samples: int, seed: int) -> list[Any]:
    """`max_samples` rows drawn without replacement, in their first order; all of them for 0.

    Files are sorted by section, so their first rows would be all of one kind.
    """
    if not 0 < max_samples < len(rows):
        return list(rows)
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), max_samples))]
