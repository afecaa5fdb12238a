"""The losses that DPO can train with: written out, and as TRL's arguments.

The margin of a pair (x, y⁺, y⁻) compares its two log-ratios to the reference π0,

    h = log π(y⁺|x)/π0(y⁺|x) − log π(y⁻|x)/π0(y⁻|x)      in nats,

and for `sigmoid_norm` and `ipo` each log-ratio is first divided by its answer's number of tokens.
So these two need another β than the sum over tokens does.

Two terms can be added. Both are called exploration (paper §3.3), and they pull in opposite
directions:

* `nll_weight` α adds −α · log π(y⁺|x), mean over the chosen tokens. It *raises* chosen answers and
  so holds the policy near what it has seen: in theory pessimism. It is the authors' own option.
* `optimism_weight` α adds +α · log π(y|x), y drawn from the reference (XPO, Xie et al. 2024). It
  *lowers* what the reference would say and so moves the policy to what was not tried. The term has
  no lower bound; TRL's own XPO has α = 1e-5.
"""

from typing import Any

import torch
import torch.nn.functional as F

from rlhf_guide.settings import DPO


def loss_of_margin(margin: torch.Tensor, settings: DPO) -> torch.Tensor:
    """Return each pair's loss at margin h, in the shape of ``margin``; further terms are not in it.

    With β = ``settings.beta`` and ε = ``settings.label_smoothing``:

        sigmoid        −(1 − ε) log σ(βh) − ε log σ(−βh)      Eq. 5 at ε = 0
        sigmoid_norm   −log σ(βh)                             h in nats a token
        ipo            (h − 1/(2β))²                          h in nats a token

    At h = 0 the first two are ln 2 and the last is 1/(4β²). With ε > 0 the first has its minimum at
    the margin log((1 − ε)/ε)/β, the last has it at 1/(2β): both stop pulling a pair apart there.
    """
    if settings.loss == "ipo":
        return (margin - 1 / (2 * settings.beta)) ** 2
    smoothing, scaled = settings.label_smoothing, settings.beta * margin
    return -(1 - smoothing) * F.logsigmoid(scaled) - smoothing * F.logsigmoid(-scaled)


def loss_arguments(settings: DPO) -> dict[str, Any]:
    """Return `loss_type`, `loss_weights` and `label_smoothing` for TRL's `DPOConfig`.

    The smoothed loss is (1 − ε)A + εB with A = −log σ(βh), B = −log σ(−βh). TRL 1.16's "sigmoid" is
    A whatever ε is, and its "robust" is R = [(1 − ε)A − εB] / (1 − 2ε). Their weighted sum
    2(1 − ε)A − (1 − 2ε)R is the smoothed loss.
    """
    smoothing = settings.label_smoothing
    weights = {settings.loss: 1.0}
    if smoothing:
        weights = {"sigmoid": 2 * (1 - smoothing), "robust": 2 * smoothing - 1}
    if settings.nll_weight:
        weights["sft"] = settings.nll_weight
    return {
        "loss_type": list(weights),
        "loss_weights": list(weights.values()),
        "label_smoothing": smoothing,
    }
