"""Preference pairs in one pass that reads what both answers have in common once.

TRL's trainers lay a batch of B pairs out as 2B padded rows, chosen ones first: every prompt is read
twice, and a short answer waits beside a long one. Here a pair is one row,

    [ common beginning | rest of chosen | rest of rejected ]

in which neither rest sees the other and both carry on from the same position. The hidden states
are then put back where TRL expects them, so its losses do not notice, and no number changes but
for rounding (tests/test_shared_prompts.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from peft import PeftModel

from rlhf_guide.attention import attention_by_products, sees_whole_past
from rlhf_guide.batching import last_feed_forward_at


@contextmanager
def shared_prompts(model: torch.nn.Module, read_at: int | None = None) -> Iterator[None]:
    """Let the model's backbone read each pair of a batch as one row while the context lasts.

    `model` is what TRL trains, out of its distributed wrapper, with adapters or without. Models
    whose layers do not all attend to the whole past are left as they are. `read_at` is the index,
    from the end, of the one token of each sequence whose state is read: -1 is the last. The states
    of all others are then unfinished (see `last_feed_forward_at`).
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    backbone = model.base_model
    whole = backbone.forward

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> Any:
        rows, mask, positions, places = pair_rows(input_ids, attention_mask)
        options["position_ids"] = positions
        unfinished = nullcontext()
        if read_at is not None:
            ends = places.gather(1, attention_mask.sum(1, keepdim=True) + read_at)
            read = torch.zeros_like(rows, dtype=torch.bool)
            read.scatter_(1, torch.cat(ends.chunk(2), dim=1), True)
            unfinished = last_feed_forward_at(backbone, read)
        with attention_by_products(), unfinished:
            output = whole(input_ids=rows, attention_mask=mask, **options)
        hidden = torch.cat([output.last_hidden_state] * 2)  # chosen rows, then rejected ones
        index = places[..., None].expand(-1, -1, hidden.shape[-1])
        output.last_hidden_state = hidden.gather(1, index)
        return output

    fits = sees_whole_past(model)
    with mock.patch.object(backbone, "forward", forward) if fits else nullcontext():
        yield


def pair_rows(
    input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lay B pairs out as B rows of width W, from 2B rows of width L padded on the right.

    Returns the rows' token ids (B, W), which token may attend to which, as booleans
    (B, 1, W, W), the position of each token in its conversation (B, W), and where each token of
    the 2B rows stands in its pair's row (2B, L); padding points to the first token.
    """
    chosen, rejected = input_ids.chunk(2)
    real_chosen, real_rejected = attention_mask.bool().chunk(2)
    same = (chosen == rejected) & real_chosen & real_rejected
    common = same.int().cumprod(1).sum(1, keepdim=True)  # (B, 1), as all below
    length, other = real_chosen.sum(1, keepdim=True), real_rejected.sum(1, keepdim=True)
    used = length + other - common
    at = torch.arange(input_ids.shape[1], device=input_ids.device)
    moved = at + (at >= common) * (length - common)  # the rest of rejected follows chosen
    places = torch.cat([at * real_chosen, moved * real_rejected])

    to = torch.arange(int(used.max()), device=input_ids.device)
    back = (to - (length - common)).clamp(0, at[-1])  # where rejected's rest stood before
    in_rejected = to >= length
    kept = chosen.gather(1, to.clamp(max=at[-1]).expand(len(chosen), -1))
    rows = torch.where(in_rejected, rejected.gather(1, back), kept)
    positions = torch.where(in_rejected, back, to)
    shared = to < common
    same_rest = in_rejected[:, :, None] == in_rejected[:, None, :]
    past = to[:, None] >= to
    mask = past & (shared[:, None, :] | same_rest) & (to < used)[:, None, :]
    mask |= torch.eye(len(to), dtype=torch.bool, device=mask.device)  # padding sees itself
    return rows, mask[:, None], positions, places
