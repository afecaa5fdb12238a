"""Write the raw miniature of the preference sources, in the upstream schemas.

    python -m data_prep.make_raw_preference [--out data_prep/embedded/raw]

Every file holds clean rows, made from the course's own prompts and candidate answers (never from
evaluation prompts), and after them the dirty rows that the source's filter must catch. Votes and
ratings are set by a fixed pattern, so they teach the schema, not which answer is good. The output
depends on the embedded prompts and samples only.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from data_prep.embedded import corruptions, load_candidates, load_prompts
from data_prep.raw_miniature import lines_of, write_files

Row = dict[str, Any]
Case = tuple[str, list[str]]  # a question and its answers, best first

SPLITS = ("sft", "preference_train", "preference_heldout")
ROWS = 40  # clean rows of a source; HelpSteer, with a row an answer, has 43 for 14 prompts
SURROGATE = "half a character: \ud83d"
MODELS = ("reference-writer", "small-model", "hasty-model", "confused-model", "looping-model")

# Sources about one subject take their prompts from that section, the others from all in turn.
SECTION = {"pku_saferlhf": "safety", "ultrainteract": "reasoning", "argilla_math": "reasoning"}

# Answers by falling quality: the reference, a stored sample where there is one, corruptions.
_QUALITY = (
    "reference",
    "sample",
    "corruption:missing_facts",
    "corruption:truncated",
    "corruption:repetition",
    "corruption:wrong_topic",
    "corruption:wrong_format",
)


def hh_rlhf() -> Iterator[Row]:
    """Transcripts of one and of two rounds; then every way in which a pair of them goes wrong."""
    cases = _cases("hh_rlhf", ROWS + 1)
    for i, (question, answers) in enumerate(cases[:ROWS]):
        before = "" if i % 2 else _said(cases[i + 1][0], cases[i + 1][1][0])
        rejected = answers[1 + i % 3]
        yield _transcripts(before + _said(question, answers[0]), before + _said(question, rejected))
    question, (good, bad, *_) = cases[ROWS]
    pair = _transcripts(_said(question, good), _said(question, bad))
    spoken = {"empty": _said(question, ""), "asked": f"\n\nHuman: {question}"}
    yield {**pair, "rejected": spoken["empty"].rstrip()}  # ends in the marker
    yield {**pair, "chosen": pair["chosen"] + "\n\nHuman:"}
    yield {**pair, "chosen": f"{question}\n{good}"}  # no markers
    yield {**pair, "rejected": "Chat log" + pair["rejected"]}
    yield _transcripts(*(spoken["empty"] + _said("And then?", a) for a in (good, bad)))  # silence
    yield _transcripts(_said(question, good) + _said("Why?", bad), _said(question, bad))
    yield _transcripts(*(_said(question, a) + "\n\nHuman: Thanks." for a in (good, bad)))
    yield _transcripts(*(spoken["asked"] + _said("Please answer.", a) for a in (good, bad)))
    yield _transcripts(*(f"\n\nAssistant: Hi.{spoken['asked']}" for _ in range(2)))
    yield _transcripts(_said(question, good) + _said("Why?", bad), _said(question, bad) * 2)
    yield {**pair, "rejected": pair["chosen"] + "  \n"}  # the same answer but for white space
    yield {**pair, "rejected": None}
    yield {**pair, "rejected": _said(question, SURROGATE)}


def shp() -> Iterator[Row]:
    """Posts with two comments; one post has seven pairs above the ratio, of which five may stay."""
    cases = _cases("shp", ROWS + 1)
    for i, (post, answers) in enumerate(cases[:ROWS]):
        yield _votes(i, post, answers[0], answers[1 + i % 3], 9 + i, 2 + i % 3, swap=i % 2 == 1)
    post, (good, bad, other, worst) = cases[ROWS]
    for i, score in enumerate(range(50, 57)):
        yield _votes(i, post, good, f"{bad} ({i})", score, 3)
    row = _votes(99, post + " Any ideas?", good, other, 12, 4)
    yield {**row, "score_A": "12", "score_B": " 4 "}  # numbers as text are numbers
    yield {**row, "score_A": 8, "score_ratio": 2.0}  # exactly 2 is not above 2
    yield {**row, "score_A": 7, "score_B": 5, "score_ratio": 1.4}
    yield {**row, "score_A": 4, "score_ratio": 1.0}
    yield {**row, "score_B": 0}
    yield {**row, "score_A": -3, "score_B": -9}
    yield {**row, "labels": 0}  # says B, the votes say A
    yield {**row, "labels": 2}
    yield {**row, "labels": None}
    yield {**row, "score_B": "N/A"}
    yield {**row, "human_ref_B": good}
    yield {**row, "human_ref_B": "  "}
    yield {**row, "history": ""}
    yield {**row, "history": [post]}
    yield {**row, "human_ref_A": SURROGATE, "human_ref_B": worst}


def helpsteer() -> Iterator[Row]:
    """Rows of answers: prompts with four, three and two; ties under one key and not the other."""
    cases = _cases("helpsteer", 17)
    for i, (prompt, answers) in enumerate(cases[:14]):
        for rank, answer in enumerate(answers[: 4 - i % 3]):
            helpful = 4 - rank if i % 4 else 4 - rank // 2  # every fourth prompt has ties
            yield _rated(prompt, answer, helpful, verbosity=(rank + i) % 3)
    first, (again, *_) = cases[0][0], cases[14][1]
    yield _rated(first, again, 0)  # the prompt of the first rows, far away from them
    prompt, (good, bad, other, _) = cases[15]
    yield {**_rated(prompt, good, 4), "helpfulness": "4", "correctness": "3"}
    yield _rated(prompt, bad, 1)
    yield {**_rated(prompt, other, 2), "helpfulness": "N/A"}
    yield {**_rated(prompt, other, 2), "correctness": None}
    yield {**_rated(prompt, other, 2), "helpfulness": True}
    yield _rated(prompt, good, 3)  # the first answer once more, rated lower
    yield _rated(prompt, " ", 3)
    yield _rated("", good, 3)
    yield {**_rated(prompt, good, 3), "response": None}
    yield _rated(prompt, SURROGATE, 3)
    yield _rated(cases[16][0], cases[16][1][0], 4)  # the only answer to its prompt


def pku_saferlhf() -> Iterator[Row]:
    """Pairs with both labels; every fifth pair has the helpful answer unsafe."""
    cases = _cases("pku_saferlhf", ROWS + 1)
    for i, (prompt, (good, bad, *_)) in enumerate(cases[:ROWS]):
        yield _compared(prompt, good, bad, swap=i % 2 == 1, disagree=i % 5 == 0)
    prompt, (good, bad, *_) = cases[ROWS]
    row = _compared(prompt, good, bad)
    yield {**row, "is_response_0_safe": False, "is_response_1_safe": True}  # safer id says 0
    yield {**row, "safer_response_id": 2}
    yield {**row, "safer_response_id": None}
    yield {**row, "is_response_1_safe": "no"}
    yield {**row, "response_1": good}
    yield {**row, "response_0": ""}
    yield {**row, "prompt": None}
    yield {**row, "response_1": SURROGATE}


def ultrafeedback() -> Iterator[Row]:
    """Four rated completions a row; every third row has a tie, ratings are text."""
    cases = _cases("ultrafeedback", ROWS + 1)
    for i, (instruction, answers) in enumerate(cases[:ROWS]):
        third = 4 if i % 3 == 0 else 3
        yield _completions(instruction, answers, [5, 4, third, 2])
    instruction, answers = cases[ROWS]
    missing = _completions(instruction, answers, [5, 4, 3, "N/A"])
    yield missing
    yield _completions(instruction, answers, [5, "N/A", "N/A", "N/A"])
    yield _completions(instruction, answers, [3, 3, 3, 3])
    yield _completions(instruction, [answers[0], answers[0], answers[1], " "], [5, 4, 3, 2])
    bug = _completions(instruction, answers, [5, 4, 3, 2])
    bug["completions"][0]["overall_score"] = 1.0  # a 10 with its nought lost
    yield bug
    no_notes = _completions(instruction, answers, [5, 4, 3, 2])
    no_notes["completions"][3]["annotations"] = None
    yield no_notes
    yield {**missing, "completions": []}
    yield {**missing, "completions": None}
    yield {**missing, "instruction": "\n"}
    yield {**missing, "instruction": SURROGATE}


def ultrainteract() -> Iterator[Row]:
    """Tasks with one step and, every second row, a wrong step and feedback before it."""
    cases = _cases("ultrainteract", ROWS + 1)
    for i, (task, answers) in enumerate(cases[:ROWS]):
        earlier = [("assistant", answers[3]), ("user", "That is not right yet. Try again.")]
        turns = [("user", task), *(earlier if i % 2 else [])]
        yield _trajectory(i, turns, answers[0], answers[1])
    task, (good, bad, *_) = cases[ROWS]
    asked = [("user", task)]
    yield _trajectory(90, [("system", "Think step by step."), *asked], good, bad)  # folded
    yield _trajectory(91, [*asked, ("assistant", bad)], good, bad)  # ends on the assistant
    yield _trajectory(92, [*asked, *asked], good, bad)
    yield _trajectory(93, [*asked, ("assistant", ""), *asked], good, bad)
    yield _trajectory(94, [*asked, ("python", "error"), *asked], good, bad)
    yield {**_trajectory(95, asked, good, bad), "trajectory": []}
    yield {**_trajectory(96, asked, good, bad), "trajectory": task}
    yield _trajectory(97, asked, good, good)
    yield _trajectory(98, asked, "", bad)
    yield _trajectory(99, asked, good, None)
    yield _trajectory(100, [("user", SURROGATE)], good, bad)


def codeultrafeedback() -> Iterator[Row]:
    """Responses and ratings in different orders; a match by position would be wrong in most."""
    cases = _cases("codeultrafeedback", ROWS + 1)
    for i, (instruction, answers) in enumerate(cases[:ROWS]):
        ratings = [5, 4, 3 if i % 2 else 4, 1]
        row = _judged(instruction, answers, ratings)
        turn = i % 4
        row["annotations"] = row["annotations"][turn:] + row["annotations"][:turn]
        yield row
    instruction, answers = cases[ROWS]
    yield _judged(instruction, answers, [5, 4, "N/A", 2])
    unmatched = _judged(instruction, answers, [5, 4, 3, 2])
    unmatched["annotations"][3]["model"] = "unknown-model"
    yield unmatched
    twice = _judged(instruction, answers, [5, 4, 3, 2])
    twice["responses"][1]["model"] = twice["responses"][0]["model"]
    yield twice
    yield _judged(instruction, answers, [2, 2, 2, 2])
    yield _judged(instruction, answers[:1], [4])
    yield {**unmatched, "annotations": []}
    yield {**unmatched, "responses": None}
    yield {**unmatched, "instruction": ""}


def argilla_math() -> Iterator[Row]:
    """Rated pairs of answers."""
    cases = _cases("argilla_math", ROWS + 1)
    for i, (instruction, answers) in enumerate(cases[:ROWS]):
        yield _math(instruction, answers[0], answers[1 + i % 3], 9.0, 3.0 + i % 4)
    instruction, (good, bad, *_) = cases[ROWS]
    row = _math(instruction, good, bad, 8.0, 5.0)
    yield {**row, "chosen_rating": "8", "rejected_rating": "5.5"}  # numbers as text are numbers
    yield {**row, "rejected_rating": 8.0}
    yield {**row, "rejected_rating": 9.0}
    yield {**row, "rejected_rating": None}
    yield {**row, "chosen_rating": "N/A"}
    yield {**row, "rejected_response": good}
    yield {**row, "rejected_response": ""}
    yield {**row, "instruction": 7}
    yield {**row, "chosen_response": SURROGATE}


def orca() -> Iterator[Row]:
    """Rated pairs with a system prompt; the rating follows the order of the generations."""
    cases = _cases("orca", ROWS + 1)
    for i, (question, answers) in enumerate(cases[:ROWS]):
        system = "You are a helpful assistant." if i % 2 else ""
        row = _compared_again(system, question, answers[0], answers[1 + i % 3], 9.0 - i % 4, 4.0)
        yield {**row, "in_gsm8k_train": i % 10 == 0}
    question, (good, bad, *_) = cases[ROWS]
    row = _compared_again("Be brief.", question, good, bad, 9.0, 5.0)
    yield {**row, "generations": [bad, good], "rating": [5.0, 9.0], "status": "swapped"}
    yield {**row, "rating": [9.0, 9.0], "status": "tie"}
    yield {**row, "rating": [9.0, 9.0]}  # a tie that the status hides
    yield {**row, "rating": None, "status": "tie", "chosen_score": None}
    yield {**row, "rating": [9.0, None]}
    yield {**row, "rating": []}
    yield {**row, "rating": [9.0]}
    yield {**row, "rating": [5.0, 9.0]}  # prefers the rejected answer
    yield {**row, "chosen_score": 3.0}
    yield {**row, "status": "unknown"}
    yield {**row, "rejected": good, "generations": [good, good]}
    yield {**row, "input": " "}
    yield {**row, "system": None}
    yield {**row, "chosen": SURROGATE}


def capybara() -> Iterator[Row]:
    """Conversations of up to two rounds with rated last answers."""
    cases = _cases("capybara", ROWS + 1)
    for i, (question, answers) in enumerate(cases[:ROWS]):
        before = _turns(*cases[i + 1]) if i % 2 else []
        asked = [*before, _turn("user", question)]
        yield _conversations(asked, answers[0], answers[1 + i % 3], 5, 2 + i % 3)
    question, (good, bad, *_) = cases[ROWS]
    asked = [_turn("user", question)]
    row = _conversations(asked, good, bad, 5, 3)
    answered = [_turn("assistant", good)]
    yield _conversations([_turn("system", "Be kind."), *asked], good, bad, 5, 3)  # folded
    yield _conversations(asked, good, bad, 4, 4)
    yield _conversations(asked, good, bad, 3, 4)
    yield _conversations(asked, good, bad, 4, None)
    yield {**row, "rejected": [_turn("user", "Another question?"), _turn("assistant", bad)]}
    yield {**row, "rejected": [*asked, *answered, *asked, *answered]}
    yield {**row, "chosen": asked, "rejected": asked}
    yield {**row, "chosen": answered + asked, "rejected": answered + asked}
    yield {**row, "chosen": [_turn("narrator", question), *answered]}
    yield _conversations(asked, good, good, 5, 3)
    yield _conversations(asked, good, "\n", 5, 3)
    yield {**row, "chosen": []}
    yield {**row, "rejected": "no list"}
    yield _conversations(asked, good, SURROGATE, 5, 3)


def summarize() -> Iterator[Row]:
    """Posts with two summaries; the post is an answer, its summary the question's short form."""
    cases = _cases("summarize", ROWS + 1)
    for i, (title, answers) in enumerate(cases[:ROWS]):
        yield _summaries(title, answers[0], answers[1], answers[3], swap=i % 2 == 1)
    title, (post, good, _, bad) = cases[ROWS]
    row = _summaries(title, post, good, bad)
    yield {**row, "info": {**row["info"], "title": None}}  # a post without a title
    yield {**row, "choice": 2}
    yield {**row, "choice": None}
    yield {**row, "summaries": row["summaries"][:1]}
    yield {**row, "summaries": []}
    yield {**row, "summaries": [{"text": good}, {"text": f" {good}\n"}]}
    yield {**row, "summaries": [{"text": good}, {"text": ""}]}
    yield {**row, "summaries": [{"text": good}, {"text": SURROGATE}]}
    yield {**row, "info": {**row["info"], "post": " "}}
    yield {**row, "info": {"article": post}}
    yield {**row, "info": None}


def nectar() -> Iterator[Row]:
    """Ranked answers; rank 1 is the best, and every third row ranks two answers equally."""
    cases = _cases("nectar", ROWS + 1, answers=5)
    for i, (question, answers) in enumerate(cases[:ROWS]):
        before = _said(cases[i + 1][0], cases[i + 1][1][0]) if i % 2 else ""
        ranks = [1, 1 if i % 3 == 0 else 2, 3, 4, 5]
        yield _ranked(before + f"\n\nHuman: {question}", answers, ranks)
    question, answers = cases[ROWS]
    asked = f"\n\nHuman: {question}"
    row = _ranked(asked, answers, [1, 2, 3, 4, 5])
    yield _ranked(asked, answers, [1, 1, 1, 1, 1])
    yield _ranked(asked, answers, ["1", "2", None, "N/A", 5])
    yield _ranked(asked, [*answers[:2], "", answers[0], SURROGATE], [1, 2, 3, 4, 5])
    yield _ranked(asked, answers[:1], [1])
    yield {**row, "answers": []}
    yield {**row, "answers": None}
    yield {**row, "prompt": asked}  # ends without the assistant's marker
    yield {**row, "prompt": question}
    yield {**row, "prompt": f"{asked}{asked}\n\nAssistant: "}
    yield {**row, "prompt": "\n\nHuman: \n\nAssistant: "}
    yield {**row, "prompt": None}


MAKERS: dict[str, Callable[[], Iterator[Row]]] = {
    maker.__name__: maker
    for maker in (
        hh_rlhf,
        shp,
        helpsteer,
        pku_saferlhf,
        ultrafeedback,
        ultrainteract,
        codeultrafeedback,
        argilla_math,
        orca,
        capybara,
        summarize,
        nectar,
    )
}

# Lines that are no rows at all: a cut download and a JSON value that is not an object.
_BROKEN_LINES = {"shp": ['{"post_id": "cut", "history": "The download sto', '["not", "a", "row"]']}


def raw_lines(name: str) -> list[str]:
    """The lines of one source's raw file: its rows as ASCII JSON, then lines that are no rows."""
    return lines_of(name, MAKERS, _BROKEN_LINES)


def _cases(name: str, count: int, answers: int = 4) -> list[Case]:
    start = list(MAKERS).index(name) * (ROWS + 1)
    pool = _pool(SECTION.get(name))
    chosen = [pool[(start + i) % len(pool)] for i in range(count)]
    return [(question, candidates[:answers]) for question, candidates in chosen]


@cache
def _pool(section: str | None) -> list[Case]:
    return [
        (prompt["messages"][0]["content"], _best_first([*corruptions(prompt), *candidates]))
        for prompts, pools in ((load_prompts(s), load_candidates(s)) for s in SPLITS)
        for prompt, candidates in ((p, pools[p["prompt_id"]]) for p in prompts)
        if section in (None, prompt["section"])
    ]


def _best_first(candidates: list[Row]) -> list[str]:
    """One answer of each kind, the best first, all different and none empty."""
    by_kind: dict[str, str] = {}
    for candidate in candidates:
        kind = "sample" if candidate["kind"].startswith("sample:") else candidate["kind"]
        if candidate["text"].strip():
            by_kind.setdefault(kind, candidate["text"].strip())
    answers = [by_kind[kind] for kind in _QUALITY if kind in by_kind]
    return list(dict.fromkeys(answers))


def _said(question: str, answer: str) -> str:
    return f"\n\nHuman: {question}\n\nAssistant: {answer}"


def _transcripts(chosen: str, rejected: str) -> Row:
    return {"chosen": chosen, "rejected": rejected}


def _votes(i: int, post: str, good: str, bad: str, high: int, low: int, swap: bool = False) -> Row:
    comments, scores = ((bad, good), (low, high)) if swap else ((good, bad), (high, low))
    return {
        "post_id": f"post{i}",
        "domain": "askexample_train",
        "upvote_ratio": 0.9,
        "history": post,
        "c_root_id_A": f"a{i}",
        "c_root_id_B": f"b{i}",
        "created_at_utc_A": 1_600_000_000 + i,
        "created_at_utc_B": 1_600_000_100 + i,
        "score_A": scores[0],
        "score_B": scores[1],
        "human_ref_A": comments[0],
        "human_ref_B": comments[1],
        "labels": 0 if swap else 1,
        "seconds_difference": 100.0,
        "score_ratio": round(high / low, 3),
    }


def _rated(prompt: str, response: str, helpful: int, verbosity: int = 1) -> Row:
    return {
        "prompt": prompt,
        "response": response,
        "helpfulness": helpful,
        "correctness": helpful,
        "coherence": min(4, helpful + 1),
        "complexity": 1,
        "verbosity": verbosity,
    }


def _compared(prompt: str, good: str, bad: str, swap: bool = False, disagree: bool = False) -> Row:
    """`good` is the safer answer; with `disagree` people found the unsafe one more helpful."""
    answers = (bad, good) if swap else (good, bad)
    safer = int(swap)
    return {
        "prompt": prompt,
        "response_0": answers[0],
        "response_1": answers[1],
        "is_response_0_safe": not (disagree and swap),
        "is_response_1_safe": not (disagree and not swap),
        "better_response_id": 1 - safer if disagree else safer,
        "safer_response_id": safer,
    }


def _completions(instruction: str, answers: list[str], ratings: list[Any]) -> Row:
    triples = zip(MODELS, answers, ratings, strict=False)
    return {
        "source": "embedded",
        "instruction": instruction,
        "models": list(MODELS[: len(answers)]),
        "completions": [_completion(*triple) for triple in triples],
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    }


def _completion(model: str, answer: str, rating: Any) -> Row:
    aspects = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    known = rating if isinstance(rating, int) else 3
    return {
        "model": model,
        "principle": "helpfulness",
        "custom_system_prompt": "",
        "response": answer,
        "critique": "",
        "overall_score": 2.0 * known,
        "fine-grained_score": float(known),
        "annotations": {
            aspect: {"Rating": str(rating if aspect == "helpfulness" else known), "Rationale": ""}
            for aspect in aspects
        },
    }


def _trajectory(i: int, turns: list[tuple[str, str]], chosen: str, rejected: str | None) -> Row:
    return {
        "task": "Logic",
        "dataset": "embedded",
        "trajectory": [{"from": speaker, "value": value} for speaker, value in turns],
        "chosen": chosen,
        "rejected": rejected,
        "id": f"step{i}",
        "parent_id": f"task{i}",
    }


def _judged(instruction: str, answers: list[str], ratings: list[Any]) -> Row:
    models = MODELS[: len(answers)]
    return {
        "instruction": instruction,
        "preference": "readability",
        "models": list(models),
        "responses": [
            {"model": model, "response": answer}
            for model, answer in zip(models, answers, strict=True)
        ],
        "annotations": [
            {"model": model, "rating": str(rating), "rationale": ""}
            for model, rating in zip(models, ratings, strict=True)
        ],
    }


def _math(instruction: str, good: str, bad: str, high: float, low: float) -> Row:
    return {
        "metadata": "{}",
        "instruction": instruction,
        "chosen_response": good,
        "chosen_rating": high,
        "rejected_response": bad,
        "rejected_rating": low,
    }


def _compared_again(
    system: str, question: str, good: str, bad: str, high: float, low: float
) -> Row:
    return {
        "system": system,
        "input": question,
        "chosen": good,
        "rejected": bad,
        "generations": [good, bad],
        "order": ["chosen", "rejected"],
        "labelling_model": "simulated",
        "labelling_prompt": [{"role": "user", "content": "Rate both answers from 1 to 10."}],
        "raw_labelling_response": f"{high} {low}",
        "rating": [high, low],
        "rationale": "",
        "status": "unchanged",
        "original_chosen": good,
        "original_rejected": bad,
        "chosen_score": high,
        "in_gsm8k_train": False,
    }


def _turn(role: str, content: str) -> Row:
    return {"role": role, "content": content}


def _turns(question: str, answers: list[str]) -> list[Row]:
    return [_turn("user", question), _turn("assistant", answers[0])]


def _conversations(asked: list[Row], good: str, bad: str, high: int, low: int | None) -> Row:
    return {
        "source": "embedded",
        "chosen": [*asked, _turn("assistant", good)],
        "chosen_rating": high,
        "chosen_model": MODELS[0],
        "rejected": [*asked, _turn("assistant", bad)],
        "rejected_rating": low,
        "rejected_model": MODELS[1],
    }


def _summaries(title: str, post: str, good: str, bad: str, swap: bool = False) -> Row:
    texts = (bad, good) if swap else (good, bad)
    return {
        "info": {"id": "t3_0", "post": post, "title": title, "subreddit": "example"},
        "summaries": [{"text": f" {text}", "policy": "sup1", "note": ""} for text in texts],
        "choice": int(swap),
        "worker": "w1",
        "batch": "batch1",
        "split": "train",
        "extra": {},
    }


def _ranked(asked: str, answers: list[str], ranks: list[Any]) -> Row:
    triples = zip(answers, MODELS, ranks, strict=False)
    return {
        "prompt": f"{asked}\n\nAssistant: ",
        "answers": [
            {"answer": answer, "model": model, "rank": float(rank) if type(rank) is int else rank}
            for answer, model, rank in triples
        ],
        "turns": asked.count("\n\nHuman: "),
        "num_responses": len(answers),
        "source": ["embedded"],
        "good_natured": True,
    }


if __name__ == "__main__":
    write_files(__doc__.splitlines()[0], MAKERS, raw_lines)
