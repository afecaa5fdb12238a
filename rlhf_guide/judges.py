"""Judges of answers: what a language model is asked, how its verdict is read, what follows from it.

Two protocols (paper, Table 3 and appendix B.2), with prompts of our own:

* `pairwise`, as in AlpacaEval 2 and Arena-Hard: which of two answers is better, in both orders;
* `single_grade`, as in MT-Bench: a grade from 1 to 10 for each of a policy's turns.

    pairs = paired_answers(online_rows, sft_rows)
    verdicts, summary = pairwise(client, pairs)
    judge_win_rate([row["preference"] for row in verdicts], pairs)

Any judge ends in the same place, an array of preferences in [0, 1]: the true utility and a reward
through `preferences_from_scores`, the pair model through `PreferenceScorer.probability` of
`[pair.comparison for pair in pairs]`. Published scores come from other prompts and other judge
models, so numbers from here compare policies with one another, never with a leaderboard.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_guide.comparisons import Comparison, first_place_advantage, position_bias
from rlhf_guide.errors import DataError
from rlhf_guide.evaluation import bootstrap_mean
from rlhf_guide.length_control import length_controlled_win_rate

if TYPE_CHECKING:  # the other judges need no client
    from rlhf_guide.judge_client import Answer, JudgeClient

Row = dict[str, Any]
Request = list[dict[str, str]]

NO_VERDICT = "no verdict"  # the judge wrote something that the parser cannot read

PAIRWISE = """\
Two assistants answered the last message of the conversation below. Decide which answer serves the \
user better.

Weigh, in this order: are its statements true, does it do what was asked (a requested format and \
length included), and is it clear. Which answer stands first means nothing, and neither does mere \
length.

{conversation}

{answer_a}

{answer_b}

Give your reason in one or two sentences. Then end with your verdict on a line of its own: [[A]] \
if answer A is better, [[B]] if answer B is better, [[tie]] if you would not mind which one you \
got."""

GRADE = """\
Grade how well an assistant's answer serves the user. What was said before it is the context; only \
the answer itself is graded.

Weigh whether its statements are true, whether it does what was asked (a requested format and \
length included), and whether it is clear. Mere length earns nothing.

{conversation}

{answer}

Give your reason in one or two sentences. Then end with a whole number from 1 (useless) to 10 \
(nothing to improve) in double square brackets, on a line of its own."""

TAGS = ("conversation", "answer", "answer_a", "answer_b")
BRACKETS = re.compile(r"\[\[\s*([^\[\]]+?)\s*\]\]")
VERDICTS = {"a": "A", "b": "B", "tie": "tie"}
SHARES = ("consistent", "ties", "position_bias", "first_place_advantage")
GRADES = range(1, 11)
POINTS = {"answer": 1.0, "tie": 0.5, "baseline": 0.0}


@dataclass(frozen=True)
class AnswerPair:
    """A policy's answer and the baseline's to one context; `sample` counts a prompt's answers."""

    prompt_id: str
    sample: int
    context: Request
    answer: str
    baseline: str

    @property
    def comparison(self) -> Comparison:
        """(context, answer, baseline), as `PreferenceScorer` takes it."""
        return self.context, self.answer, self.baseline


def paired_answers(generations: Sequence[Row], baseline: Sequence[Row]) -> list[AnswerPair]:
    """Pair two policies' generated rows answer by answer, in the rows' order.

    Sample k of a prompt meets sample k of the baseline. Raises DataError where the two lists
    differ in prompts, conversations or number of answers.
    """
    if len(generations) != len(baseline):
        raise DataError(
            f"{len(generations)} prompts against {len(baseline)}: pair answers to the same prompts."
        )
    pairs = []
    for row, other in zip(generations, baseline, strict=True):
        name, mine, theirs = row["prompt_id"], row["responses"], other["responses"]
        if name != other["prompt_id"] or row["messages"] != other["messages"]:
            raise DataError(
                f"prompt {name!r} meets {other['prompt_id']!r} or another conversation: both "
                "policies must answer the same prompts in the same order."
            )
        if len(mine) != len(theirs):
            raise DataError(
                f"prompt {name!r} has {len(mine)} answers against {len(theirs)}: draw equally many."
            )
        pairs += [
            AnswerPair(name, sample, row["messages"], a["text"], b["text"])
            for sample, (a, b) in enumerate(zip(mine, theirs, strict=True))
        ]
    return pairs


def preferences_from_scores(
    a: Sequence[float], b: Sequence[float], tolerance: float = 1e-9
) -> np.ndarray:
    """Preferences of a judge that scores each answer: 1 where a is higher, 0 where b is, else ½.

    Scores closer than `tolerance` are a tie. Raises DataError for unequally many or
    non-finite scores.
    """
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if first.shape != second.shape or first.ndim != 1:
        raise DataError(f"scores of shapes {first.shape} and {second.shape} cannot be paired.")
    gap = first - second
    if bad := int((~np.isfinite(gap)).sum()):
        raise DataError(f"{bad} of {len(gap)} pairs of scores are NaN or infinite.")
    return np.where(np.abs(gap) <= tolerance, 0.5, (gap > 0).astype(float))


def judge_win_rate(
    preferences: Sequence[float | None],
    pairs: Sequence[AnswerPair],
    n_boot: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """The win rate over the baseline by any judge, raw and at equal length.

    `preferences[i]` in [0, 1] belongs to `pairs[i]`; None stands for a comparison without a
    verdict, which is left out and counted. Returns `win_rate` (an interval that redraws prompts,
    plus `ties`, the share of exact ½), `length_controlled` (lengths in characters; see
    `length_control`; None where all answers differ from the baseline's by one length), the mean
    lengths `characters` and `baseline_characters`, and the counts `judged` and `left_out`. Raises
    DataError when nothing was judged.
    """
    if len(preferences) != len(pairs):
        raise DataError(f"{len(preferences)} preferences for {len(pairs)} pairs of answers.")
    judged = [i for i, value in enumerate(preferences) if value is not None]
    if not judged:
        raise DataError(f"none of {len(pairs)} comparisons has a verdict: look at the failures.")
    values = [float(preferences[i]) for i in judged]
    prompt_ids = [pairs[i].prompt_id for i in judged]
    lengths = [len(pairs[i].answer) for i in judged]
    baseline_lengths = [len(pairs[i].baseline) for i in judged]
    controlled = None
    if np.ptp(np.subtract(lengths, baseline_lengths)) > 0:
        controlled = length_controlled_win_rate(
            values, lengths, baseline_lengths, prompt_ids, n_boot, seed
        )
    return {
        "win_rate": {
            **bootstrap_mean(values, prompt_ids, n_boot, seed),
            "ties": float(np.mean(np.asarray(values) == 0.5)),
        },
        "length_controlled": controlled,
        "characters": float(np.mean(lengths)),
        "baseline_characters": float(np.mean(baseline_lengths)),
        "judged": len(judged),
        "left_out": len(pairs) - len(judged),
    }


def pairwise(
    client: JudgeClient,
    pairs: Sequence[AnswerPair],
    max_tokens: int = 512,
    verdict_only: bool = False,
) -> tuple[list[Row], Row]:
    """Let a language model compare each answer with the baseline's, in both orders.

    `verdict_only` lets it write nothing but a verdict, without reasons: for a judge too small to
    follow instructions, on a vLLM server.

    A row holds `prompt_id`, `sample`, `verdicts` (of the order with the answer first, then with the
    baseline first: "answer", "baseline", "tie" or None), `failures` (why a verdict is None) and
    `preference`: 1 or 0 where both orders agree, ½ where they agree on a tie or contradict each
    other, None where one of them is missing, since a single order carries the judge's leaning.

    The summary counts `n` pairs and `judged` ones, `failures` by reason (requests), and gives the
    shares `consistent` (both orders say the same) and `ties` of the judged pairs, their
    `position_bias` (verdict reversed by the order) and `first_place_advantage`; these are
    None where nothing was judged.
    """
    requests = [request for pair in pairs for request in pairwise_requests(pair)]
    choices = [f"[[{verdict}]]" for verdict in VERDICTS.values()] if verdict_only else None
    answers = client.ask(requests, max_tokens, choices)
    rows = []
    for pair, first, second in zip(pairs, answers[::2], answers[1::2], strict=True):
        read = [_read(first, parse_verdict), _read(second, parse_verdict)]
        verdicts = [
            _winner(read[0][0], "answer", "baseline"),
            _winner(read[1][0], "baseline", "answer"),
        ]
        rows.append(
            {
                "prompt_id": pair.prompt_id,
                "sample": pair.sample,
                "preference": _preference(verdicts),
                "verdicts": verdicts,
                "failures": [failure for _, failure in read],
            }
        )
    return rows, _pairwise_summary(rows)


def single_grade(
    client: JudgeClient,
    conversations: Sequence[Row],
    max_tokens: int = 512,
    verdict_only: bool = False,
) -> tuple[list[Row], Row]:
    """Let a language model grade a policy's turns from 1 to 10, each with the earlier ones in view.

    `conversations` come from `as_conversations`. A row holds `prompt_id`, `sample`, `grades` (one a
    turn), `failures` (why a grade is None) and `grade`, the mean over the turns, None unless all
    have one; `verdict_only` as in `pairwise`. The summary counts `n` conversations and `graded`
    ones, `failures` by reason (requests), and gives the mean `grade` and, over the same
    conversations, the mean `by_turn`.
    """
    turns = [list(_graded_turns(conversation)) for conversation in conversations]
    requests = [grade_request(context, answer) for found in turns for context, answer in found]
    choices = [f"[[{grade}]]" for grade in GRADES] if verdict_only else None
    answers = iter(client.ask(requests, max_tokens, choices))
    rows = []
    for conversation, found in zip(conversations, turns, strict=True):
        read = [_read(next(answers), parse_grade) for _ in found]
        grades = [grade for grade, _ in read]
        rows.append(
            {
                "prompt_id": conversation["prompt_id"],
                "sample": conversation["sample"],
                "grade": None if None in grades else float(np.mean(grades)),
                "grades": grades,
                "failures": [failure for _, failure in read],
            }
        )
    return rows, _grade_summary(rows)


def as_conversations(generations: Sequence[Row], turns: int = 1) -> list[Row]:
    """Generated rows as finished conversations, one an answer, for `single_grade`.

    `turns` says how many of a conversation's last answers the policy wrote: 1, or 2 for MT-Bench's
    second turns, whose `messages` hold the policy's first answer. Raises DataError for a
    conversation with fewer answers.
    """
    conversations = []
    for row in generations:
        for sample, response in enumerate(row["responses"]):
            messages = [*row["messages"], {"role": "assistant", "content": response["text"]}]
            answers = sum(turn["role"] == "assistant" for turn in messages)
            if not 1 <= turns <= answers:
                raise DataError(
                    f"prompt {row['prompt_id']!r} has {answers} answer(s), of which {turns} cannot "
                    "be graded: put the policy's earlier answers into its messages."
                )
            conversations.append(
                {
                    "prompt_id": row["prompt_id"],
                    "sample": sample,
                    "messages": messages,
                    "turns": turns,
                }
            )
    return conversations


def pairwise_requests(pair: AnswerPair) -> tuple[Request, Request]:
    """The question in both orders: the answer in place A, then the baseline's in place A."""
    return (
        _pairwise_request(pair.context, pair.answer, pair.baseline),
        _pairwise_request(pair.context, pair.baseline, pair.answer),
    )


def grade_request(context: Request, answer: str) -> Request:
    """The question for a grade of `answer`, which follows the messages of `context`."""
    return _user(
        GRADE.format(conversation=_conversation(context), answer=_tagged("answer", answer))
    )


def parse_verdict(text: str) -> str | None:
    """Return "A", "B" or "tie" from a judge's text, or None.

    The verdict stands in double square brackets. Two that differ are none: a weak judge that
    repeats its instructions has not chosen.
    """
    found = {VERDICTS.get(inside.lower()) for inside in BRACKETS.findall(text)} - {None}
    return found.pop() if len(found) == 1 else None


def parse_grade(text: str) -> float | None:
    """Return the grade in double square brackets, or None.

    None for no number, one outside 1 to 10, or several that differ.
    """
    inside = [found.removesuffix("/10") for found in BRACKETS.findall(text)]
    numbers = {float(found) for found in inside if re.fullmatch(r"\d+(\.\d+)?", found)}
    grade = numbers.pop() if len(numbers) == 1 else 0.0
    return grade if GRADES[0] <= grade <= GRADES[-1] else None


def _pairwise_request(context: Request, a: str, b: str) -> Request:
    return _user(
        PAIRWISE.format(
            conversation=_conversation(context),
            answer_a=_tagged("answer_a", a),
            answer_b=_tagged("answer_b", b),
        )
    )


def _user(text: str) -> Request:
    # One user message: some judges' templates know no system message.
    return [{"role": "user", "content": text}]


def _conversation(context: Request) -> str:
    return _tagged("conversation", "\n\n".join(f"{m['role']}: {m['content']}" for m in context))


def _tagged(tag: str, text: str) -> str:
    """The text between its tags; a tag inside the text would move the border and is defused."""
    for name in TAGS:
        text = text.replace(f"<{name}>", f"({name})").replace(f"</{name}>", f"(/{name})")
    return f"<{tag}>\n{text}\n</{tag}>"


def _graded_turns(conversation: Row) -> list[tuple[Request, str]]:
    """(context, answer) of each of the policy's turns; a turn sees nothing of what follows."""
    messages = conversation["messages"]
    places = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    return [(messages[:i], messages[i]["content"]) for i in places[-conversation["turns"] :]]


def _read(answer: Answer, parse: Callable[[str], Any]) -> tuple[Any, str | None]:
    """(verdict, None), or (None, why there is none)."""
    if answer.failure:
        return None, answer.failure
    verdict = parse(answer.text)
    return verdict, None if verdict is not None else NO_VERDICT


def _winner(verdict: str | None, in_a: str, in_b: str) -> str | None:
    return {"A": in_a, "B": in_b}.get(verdict, verdict)


def _preference(verdicts: Sequence[str | None]) -> float | None:
    first, second = verdicts
    if first is None or second is None:
        return None
    return POINTS[first] if first == second else 0.5


def _failures(rows: Sequence[Row]) -> dict[str, int]:
    return dict(Counter(reason for row in rows for reason in row["failures"] if reason))


def _pairwise_summary(rows: Sequence[Row]) -> Row:
    judged = [row for row in rows if row["preference"] is not None]
    counts = {"n": len(rows), "judged": len(judged), "failures": _failures(rows)}
    if not judged:
        return {**counts, **dict.fromkeys(SHARES)}
    orders = np.array([[POINTS[verdict] for verdict in row["verdicts"]] for row in judged])
    shares = (
        float(np.mean(orders[:, 0] == orders[:, 1])),
        float(np.mean([row["preference"] == 0.5 for row in judged])),
        position_bias(orders),
        first_place_advantage(orders),
    )
    return {**counts, **dict(zip(SHARES, shares, strict=True))}


def _grade_summary(rows: Sequence[Row]) -> Row:
    graded = [row for row in rows if row["grade"] is not None]
    return {
        "n": len(rows),
        "graded": len(graded),
        "failures": _failures(rows),
        "grade": float(np.mean([row["grade"] for row in graded])) if graded else None,
        "by_turn": [
            float(np.mean(turn)) for turn in zip(*(row["grades"] for row in graded), strict=True)
        ],
    }
