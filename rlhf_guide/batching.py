"""Batches for the reward and the preference model: one forward pass in, one vector out.

Both read a whole sequence and need the hidden state of its last real token only. Sequences are
sorted by length before they are batched (little padding), padded on the right, and the position is
taken from the true length, so a score does not depend on its neighbours in the batch, nor on which
token is used for padding. On a CPU nothing is padded, and what sequences begin with in common is
read once (see `token_trees`).
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from transformers import PreTrainedModel

from rlhf_guide.attention import sees_whole_past
from rlhf_guide.models import PLAIN_FAMILIES
from rlhf_guide.token_trees import attention_along, tree_rows


@torch.inference_mode()
def last_hidden_states(
    model: PreTrainedModel, sequences: Sequence[list[int]], pad_id: int, batch_size: int = 32
) -> torch.Tensor:
    """Hidden state of the last token of each sequence, after the final norm.

    Returns float32 on the CPU, shape (len(sequences), hidden), in the order of the input. The
    backbone alone runs: no vocabulary-sized logits are built. Raises ValueError for an empty
    sequence.
    """
    _refuse_empty(sequences)
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    pooled = _nothing_yet(model, len(sequences))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = [sequences[row] for row in rows]
        lengths = torch.tensor([len(ids) for ids in batch])
        input_ids = torch.full((len(batch), int(lengths.max())), pad_id)
        for row, ids in enumerate(batch):
            input_ids[row, : len(ids)] = torch.tensor(ids)
        mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
        hidden = _hidden_states(model, input_ids=input_ids, attention_mask=mask.long())
        pooled[rows] = hidden[torch.arange(len(batch)), lengths - 1].float().cpu()
    return pooled


@torch.inference_mode()
def last_hidden_states_read_once(
    model: PreTrainedModel, sequences: Sequence[list[int]], pad_id: int, batch_size: int = 32
) -> torch.Tensor:
    """`last_hidden_states` of sequences that start alike, with each beginning read once.

    Rounding aside, the result is the same; equal sequences are one. On the CPU only, where reading
    costs most and a row of some thousand tokens is as fast as any batch. Elsewhere, or where the
    model's layers do not see the whole past, every sequence is read whole, `batch_size` at a time.
    """
    if model.device.type != "cpu" or not sees_whole_past(model):
        return last_hidden_states(model, sequences, pad_id, batch_size)
    _refuse_empty(sequences)
    pooled = _nothing_yet(model, len(sequences))
    for row in tree_rows(sequences):
        ends = row.ends()
        read = torch.zeros(1, len(row.tokens), dtype=torch.bool)
        read[0, list(ends.values())] = True
        with attention_along(row, model.dtype), last_feed_forward_at(model.base_model, read):
            hidden = _hidden_states(model, **row.inputs())[0]
        pooled[list(ends)] = hidden[list(ends.values())].float()
    return pooled


@contextmanager
def last_feed_forward_at(backbone: PreTrainedModel, read: torch.Tensor) -> Iterator[None]:
    """Leave out the last layer's feed-forward part, a function of one token, where nobody reads it.

    `read`, of shape (rows, tokens), is true for the tokens whose states are read. That part is
    three quarters of a layer's products. All is computed in families whose feed-forward part may
    be something else, and with gradient checkpointing, which computes the layer again, after the
    context, in the backward pass.
    """
    if backbone.config.model_type not in PLAIN_FAMILIES or backbone.is_gradient_checkpointing:
        yield
        return
    last = backbone.layers[-1].mlp
    whole = last.forward

    def where_read(hidden: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden).index_put((read,), whole(hidden[read][None])[0])

    with mock.patch.object(last, "forward", where_read):
        yield


def _refuse_empty(sequences: Sequence[list[int]]) -> None:
    if any(len(ids) == 0 for ids in sequences):
        raise ValueError("cannot pool an empty sequence: it has no last token")


def _nothing_yet(model: PreTrainedModel, count: int) -> torch.Tensor:
    return torch.zeros(count, model.config.get_text_config().hidden_size)


def _hidden_states(model: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    """After the final norm, (rows, tokens, hidden), of the backbone alone."""
    moved = {name: value.to(model.device) for name, value in inputs.items()}
    return model.base_model(**moved, use_cache=False).last_hidden_state


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
