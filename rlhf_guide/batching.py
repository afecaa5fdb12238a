"""Batches for the reward and the preference model: one forward pass in, one vector out.

Both read a whole sequence and need the hidden state of its last real token only. Sequences are
sorted by length before they are batched (little padding), padded on the right, and the position is
taken from the true length, so a score does not depend on its neighbours in the batch, nor on which
token is used for padding. What sequences begin with in common need be read only once (see
`token_trees`).
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf_guide.shared_prompts import sees_whole_past
from rlhf_guide.token_trees import Tree, as_batch, token_trees

WORTH_SHARING = 0.95  # of the tokens left to read; the mask costs more than a smaller gain
BATCH_TOKENS = 8192  # in a batch of trees, whose masks grow with the square of their tokens


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
        hidden = _hidden_states(model, input_ids, mask.long())
        pooled[rows] = hidden[torch.arange(len(batch)), lengths - 1].float().cpu()
    return pooled


@torch.inference_mode()
def last_hidden_states_read_once(
    model: PreTrainedModel, sequences: Sequence[list[int]], pad_id: int, batch_size: int = 32
) -> torch.Tensor:
    """`last_hidden_states` of sequences that start alike, with each beginning read once.

    Rounding aside, the result is the same; equal sequences are one. `batch_size` counts sequences,
    as there. On the CPU only, where reading costs most. Where little is shared, or the model's
    layers do not see the whole past, every sequence is read whole.
    """
    if model.device.type != "cpu" or not sees_whole_past(model):
        return last_hidden_states(model, sequences, pad_id, batch_size)
    _refuse_empty(sequences)
    trees = token_trees(sequences, row_sequences=batch_size)
    if sum(len(tree.tokens) for tree in trees) >= WORTH_SHARING * sum(map(len, sequences)):
        return last_hidden_states(model, sequences, pad_id, batch_size)
    pooled = _nothing_yet(model, len(sequences))
    for batch in _batches_of_trees(trees, batch_size):
        input_ids, mask, positions = as_batch(batch, pad_id)
        hidden = _hidden_states(model, input_ids, mask, position_ids=positions)
        for tree, states in zip(batch, hidden, strict=True):
            pooled[list(tree.ends)] = states[list(tree.ends.values())].float()
    return pooled


def _batches_of_trees(trees: Sequence[Tree], batch_size: int) -> Iterator[list[Tree]]:
    """Trees of similar size, with at most `batch_size` sequences and some thousand tokens."""
    batch: list[Tree] = []
    for tree in sorted(trees, key=lambda tree: len(tree.tokens)):
        sequences = sum(len(other.ends) for other in (*batch, tree))
        tokens = (len(batch) + 1) * len(tree.tokens)
        if batch and (sequences > batch_size or tokens > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(tree)
    if batch:
        yield batch


def _refuse_empty(sequences: Sequence[list[int]]) -> None:
    if any(len(ids) == 0 for ids in sequences):
        raise ValueError("cannot pool an empty sequence: it has no last token")


def _nothing_yet(model: PreTrainedModel, count: int) -> torch.Tensor:
    return torch.zeros(count, model.config.get_text_config().hidden_size)


def _hidden_states(
    model: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor, **more: torch.Tensor
) -> torch.Tensor:
    """After the final norm, (rows, tokens, hidden), of the backbone alone."""
    inputs = {"input_ids": input_ids, "attention_mask": mask, **more}
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    return model.base_model(**inputs, use_cache=False).last_hidden_state


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
