"""Results as tables: one comparison by several judges, the policies side by side, the paper's.

    judge_rows({"reward model": preferences, ...}, pairs)   # win rate by each judge
    policy_rows(ws.load("evaluation").metrics)              # laid out as the paper's Table 4
    as_markdown(ws.load("evaluation").metrics)              # both, as text

Scores of different judges, prompts or benchmarks are not comparable: the paper's numbers stand in
tables of their own, as a record of what was found there, never beside ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from rlhf_guide.errors import DataError
from rlhf_guide.evaluation import format_cell, table
from rlhf_guide.judges import AnswerPair, judge_win_rate

Row = dict[str, Any]
Preferences = Mapping[str, Sequence[float | None]]

BASELINE = "sft"
# A policy's name, and what it is called in the names of the stored win rates and pass rates.
SHORT = {"sft": "sft", "offline_dpo": "offline", "online_dpo": "online"}
TASK = "task_"  # the stored result of benchmark t for policy p is named task_t_p

ACADEMIC = ("GSM8K", "MMLU", "HumanEval", "TruthfulQA", "ARC", "MBPP")
# Tables 2 and 3: LC AlpacaEval 2 and Arena-Hard in percent, MT-Bench from 1 to 10, then accuracy.
_MAIN = {
    "SFT": (10.2, 7.69, 5.6, 74.2, 64.7, 65.2, 53.4, 61.4, 62.3),
    "offline DPO": (22.5, 8.17, 22.4, 79.8, 64.5, 63.4, 61.8, 65.2, 60.3),
    "iterative DPO": (31.3, 8.46, 29.1, 80.7, 65.3, 64.6, 60.4, 64.3, 60.8),
}
# Table 4: the iterative policy by reward model and length penalty. Length is the mean of its
# Arena-Hard answers.
_ABLATION = {
    ("Ours", None): (31.3, 29.1, 656, 80.7, 65.3, 64.6, 62.2, 64.3, 60.8),
    ("Ours-concise", 0.001): (38.1, 22.1, 382, 78.8, 65.5, 66.5, 60.4, 65.1, 62.4),
    ("UltraRM-13B", None): (20.7, 24.3, 745, 78.9, 64.9, 63.7, 59.9, 63.6, 60.8),
}


def judge_rows(
    preferences: Preferences, pairs: Sequence[AnswerPair], n_boot: int = 2000, seed: int = 0
) -> list[Row]:
    """Return one row a judge: the win rate over the baseline, raw and at equal length.

    ``preferences[judge][i]`` in [0, 1] belongs to ``pairs[i]``; None marks a comparison that the
    judge was not asked about or gave no verdict on. A row holds ``judge``, ``win rate`` and ``at
    equal length`` (intervals that redraw prompts; the second is None where all answers differ from
    the baseline's by one length), ``ties``, ``answers`` (judged ones) and the mean length of both
    sides in characters. Raises DataError where a judge has no verdict at all.
    """
    return [
        {"judge": judge, **_judge_row(judge, values, pairs, n_boot, seed)}
        for judge, values in preferences.items()
    ]


def _judge_row(
    judge: str, values: Sequence[float | None], pairs: Sequence[AnswerPair], n_boot: int, seed: int
) -> Row:
    try:
        found = judge_win_rate(values, pairs, n_boot, seed)
    except DataError as error:
        raise DataError(f"{judge}: {error}") from error
    raw = found["win_rate"]
    return {
        "win rate": {key: raw[key] for key in ("value", "low", "high", "n")},
        "at equal length": found["length_controlled"],
        "ties": raw["ties"],
        "answers": found["judged"],
        "characters": found["characters"],
        "baseline characters": found["baseline_characters"],
    }


def agreement(preferences: Preferences) -> pd.DataFrame:
    """Return the share of comparisons on which two judges say the same: win, tie or loss.

    A square table, judges on both sides; only comparisons that both have judged count. NaN where
    there is none.
    """
    verdicts = pd.DataFrame({judge: _verdicts(values) for judge, values in preferences.items()})
    judges = list(verdicts)
    shares = pd.DataFrame(index=judges, columns=judges, dtype=float)
    for one, other in product(judges, repeat=2):
        both = verdicts[one].notna() & verdicts[other].notna()
        shares.loc[one, other] = (verdicts[one] == verdicts[other])[both].mean()
    return shares


def _verdicts(values: Sequence[float | None]) -> np.ndarray:
    """1, 0 or −1 for win, tie and loss; NaN where there is no verdict."""
    return np.sign(np.array([np.nan if v is None else v - 0.5 for v in values], dtype=float))


def policy_rows(metrics: Mapping[str, Any]) -> list[Row]:
    """Return one row a policy in the layout of the paper's Table 4, from stored metrics.

    ``metrics`` are those of the stage ``evaluation``. Columns: the true utility (the reward on real
    data), the win rate over SFT by it, that win rate at equal length, tokens an answer, the share
    of kept format instructions, then the benchmarks. What was not measured is None. Raises
    DataError when the metrics hold no policy.
    """
    quantity = "utility" if f"utility_{BASELINE}" in metrics else "reward"
    if f"{quantity}_{BASELINE}" not in metrics:
        raise DataError("These metrics hold no policy: run the evaluation notebook (08) first.")
    tasks = [
        name.removeprefix(TASK).removesuffix(f"_{BASELINE}")
        for name in metrics
        if name.startswith(TASK) and name.endswith(f"_{BASELINE}")
    ]
    return [
        {
            "policy": policy,
            "true utility" if quantity == "utility" else "reward": metrics.get(
                f"{quantity}_{policy}"
            ),
            "win rate": metrics.get(f"win_rate_{short}_over_{BASELINE}"),
            "at equal length": metrics.get(f"lc_win_rate_{short}_over_{BASELINE}"),
            "tokens": metrics.get(f"tokens_{policy}"),
            "format kept": metrics.get(f"instruction_pass_rate_{short}"),
            **{task: metrics.get(f"{TASK}{task}_{policy}") for task in tasks},
        }
        for policy, short in SHORT.items()
    ]


def paper_results() -> pd.DataFrame:
    """The paper's chat and academic results of its own policies (Tables 2 and 3)."""
    columns = ["LC AlpacaEval 2", "MT-Bench", "Arena-Hard", *ACADEMIC]
    return pd.DataFrame(_MAIN, index=columns).T.rename_axis("policy")


def paper_ablation() -> pd.DataFrame:
    """The paper's ablation of reward model and length penalty λ (Table 4).

    Its TruthfulQA of the main policy is 62.2, where Table 3 prints 60.4.
    """
    columns = ["LC AlpacaEval 2", "Arena-Hard", "length", *ACADEMIC]
    frame = pd.DataFrame(list(_ABLATION.values()), columns=columns)
    penalties = ["–" if penalty is None else str(penalty) for _, penalty in _ABLATION]
    frame.insert(0, "λ", penalties)
    frame.index = pd.Index([name for name, _ in _ABLATION], name="reward model or policy")
    return frame


def as_frame(rows: Sequence[Row], digits: int = 2) -> pd.DataFrame:
    """Return rows as a data frame of text, intervals as ``value [low, high]``."""
    cells = [{name: format_cell(value, digits) for name, value in row.items()} for row in rows]
    return pd.DataFrame(cells).set_index(next(iter(rows[0])))


def as_markdown(metrics: Mapping[str, Any]) -> str:
    """Return the report: this run's policies, then the paper's, each under its heading."""
    parts = [
        "**This run** (win rates against SFT; 95% intervals over prompts)",
        table(policy_rows(metrics), digits=2),
        "**The paper, Tables 2 and 3** (LLaMA-3-8B, other benchmarks and judges)",
        table(_as_printed(paper_results())),
        "**The paper, Table 4** (iterative DPO by reward model and length penalty)",
        table(_as_printed(paper_ablation())),
    ]
    return "\n\n".join(parts)


def _as_printed(frame: pd.DataFrame) -> list[Row]:
    """Rows with every number as the paper prints it, not rounded to one length."""
    return [
        {name: f"{value:g}" if isinstance(value, float) else value for name, value in row.items()}
        for row in frame.reset_index().to_dict("records")
    ]
