"""The layers below the first adapter, read once before training instead of in every step.

With adapters on a model's last layers alone, the layers below make the same of a token in every
step and every epoch. So they are read once, over all training sequences, as scoring does it: with
nothing padded, each common beginning once, and no graph kept. What remains to be trained is the
upper layers, fed from a table with one row for each token that was read:

    token id → embedding → 20 frozen layers → 10 adapted layers → head
               state id → table             → 10 adapted layers → head

The ids of a sequence become the rows of its tokens. Equal beginnings have equal rows, so all that
compares ids still works, and no number changes but for rounding (tests/test_frozen_layers.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf_guide.attention import sees_whole_past
from rlhf_guide.models import PLAIN_FAMILIES
from rlhf_guide.token_trees import attention_along, tree_rows
from rlhf_guide.training import world_size


@dataclass(frozen=True)
class FrozenReading:
    """Sequences to train on in the place of token ids, and the seconds that the reading took."""

    sequences: list[list[int]]
    seconds: float


@contextmanager
def frozen_layers_read_once(
    model: PreTrainedModel, adapted: int, sequences: Sequence[list[int]], pad_id: int
) -> Iterator[FrozenReading]:
    """Let the model be its last `adapted` layers while the context lasts; 0 stands for all layers.

    The sequences become rows of the table, whose row `pad_id` belongs to no token: padding stays
    what it was. Adapters go on the layers that are left, as many as `config.num_hidden_layers` says
    meanwhile. Afterwards the model is whole again, its adapters where they belong.

    The sequences stay as they are, and the model too, on a GPU, where reading is cheap; with
    several processes; and for models with dropout or whose layers see less than the whole past or
    get more than embeddings.
    """
    started = perf_counter()
    backbone, config = model.base_model, model.config
    frozen = config.num_hidden_layers - adapted if adapted else 0
    fits = config.model_type in PLAIN_FAMILIES and not config.attention_dropout
    fits = fits and model.device.type == "cpu" and world_size() == 1
    if frozen <= 0 or not fits or not sees_whole_past(model):
        yield FrozenReading(list(sequences), 0.0)
        return
    found, table = _states_after(model, frozen, sequences, pad_id)
    states = torch.nn.Embedding.from_pretrained(table, freeze=True)
    upper = _replaced(backbone, layers=backbone.layers[frozen:], embed_tokens=states)
    with upper, _replaced(config, num_hidden_layers=adapted):
        yield FrozenReading(found, perf_counter() - started)


@torch.no_grad()
def _states_after(
    model: PreTrainedModel, count: int, sequences: Sequence[list[int]], pad_id: int
) -> tuple[list[list[int]], torch.Tensor]:
    """Each sequence as rows of a table (rows, hidden) of the states after `count` layers."""
    backbone = model.base_model
    found: list[list[int]] = [[] for _ in sequences]
    states, read = [], 0
    lower = _replaced(backbone, layers=backbone.layers[:count], norm=torch.nn.Identity())
    with lower:
        for row in tree_rows(sequences):
            with attention_along(row, model.dtype):
                states.append(backbone(**row.inputs(), use_cache=False).last_hidden_state[0])
            for index, path in row.paths.items():
                found[index] = [read + place + (read + place >= pad_id) for place in path]
            read += len(row.tokens)
    table = torch.cat(states)
    blank = table.new_zeros(max(1, pad_id + 1 - len(table)), table.shape[1])
    return found, torch.cat([table[:pad_id], blank, table[pad_id:]])


@contextmanager
def _replaced(target: Any, **parts: Any) -> Iterator[None]:
    """Other values for some attributes, in place: a model's parts keep their order."""
    before = {name: getattr(target, name) for name in parts}
    try:
        for name, part in parts.items():
            setattr(target, name, part)
        yield
    finally:
        for name, part in before.items():
            setattr(target, name, part)
