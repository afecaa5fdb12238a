"""Write the raw miniature of the SFT and prompt sources, in the upstream schemas.

    python -m data_prep.make_raw_sft [--out data_prep/embedded/raw]

Every file holds clean rows, made from the course's own prompts and reference answers, and after
them the dirty rows that the source's filter must catch. Three prompt files end with leaked
evaluation prompts: the only place where evaluation prompts are written to training data, so that
the contamination check has something to find. The output depends on the embedded prompts only.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from data_prep.embedded import load_prompts
from data_prep.raw_miniature import lines_of, write_files

Row = dict[str, Any]
Case = tuple[str, str]  # a question and its reference answer

ROWS = 20  # clean rows of a source
SURROGATE = "half a character: \ud83d"
SYSTEM = "You are a careful assistant. Think before you answer."


def sharegpt() -> Iterator[Row]:
    """Chats of one and of two rounds, pieces of longer ones, and every break of the role order."""
    cases = _cases("sharegpt", ROWS + 2)
    (question, answer), (other, reply) = cases[ROWS:]
    for i in range(ROWS):
        second = cases[i + 1] if i % 2 else ()
        yield _chat(i, *_rounds(*cases[i], *second))
    yield _chat(20, ("gpt", answer), *_rounds(other, reply))  # a piece that starts in the middle
    yield _chat(21, *_rounds(question, answer), ("human", other))  # and one that ends there
    yield _chat(22, ("gpt", answer), *_rounds(other, reply), ("human", question))
    yield from _broken_chats(question, answer)
    yield _chat(90, ("human", question), ("bing", answer))
    yield _chat(91, ("gpt", answer))
    yield _chat(92, ("human", question), ("human", other), ("gpt", answer))
    yield _chat(93, *_rounds(question, answer), ("gpt", reply))


def evol_instruct() -> Iterator[Row]:
    """One round each; the same breaks as in a chat."""
    cases = _cases("evol_instruct", ROWS + 1)
    for i, case in enumerate(cases[:ROWS]):
        yield {**_chat(i, *_rounds(*case)), "idx": f"evol{i}"}
    for row in _broken_chats(*cases[ROWS]):
        yield {**row, "idx": "broken"}


def slimorca() -> Iterator[Row]:
    """With and without a system turn; system turns that are empty, late or alone."""
    cases = _cases("slimorca", ROWS + 1)
    question, answer = cases[ROWS]
    for i, case in enumerate(cases[:ROWS]):
        system = [("system", SYSTEM)] if i % 4 else []
        yield _weighted(*system, *_rounds(*case))
    yield _weighted(("system", SYSTEM))
    yield _weighted(("system", SYSTEM), ("human", question))
    yield _weighted(("system", SYSTEM), ("gpt", answer), ("human", question))
    yield _weighted(("system", ""), *_rounds(question, answer))
    yield _weighted(("human", question), ("system", SYSTEM), ("gpt", answer))
    yield _weighted(("system", SYSTEM), *_rounds(question, answer), ("human", "And then?"))
    yield _weighted(("system", SYSTEM), *_rounds(question, SURROGATE))
    yield {"conversations": "system: human: gpt:"}


def mathinstruct() -> Iterator[Row]:
    """Questions with solutions; empty, missing and unreadable fields."""
    yield from _two_texts("mathinstruct", "instruction", "output", source="data/CoT/embedded.json")


def magicoder() -> Iterator[Row]:
    """Tasks with solutions; empty, missing and unreadable fields."""
    yield from _two_texts("magicoder", "instruction", "response")


def gpt4_llm() -> Iterator[Row]:
    """Instructions with and without an input; an input of white space, a missing one."""
    yield from _alpaca("gpt4_llm", "output")


def orca_math() -> Iterator[Row]:
    """Word problems with solutions; empty, missing and unreadable fields."""
    yield from _two_texts("orca_math", "question", "answer")


def gpteacher() -> Iterator[Row]:
    """Instructions with and without an input; an input of white space, a missing one."""
    yield from _alpaca("gpteacher", "response")


def ultrainteract_sft() -> Iterator[Row]:
    """Tasks with correct solutions; empty, missing and unreadable fields."""
    extra = {"task": "Logic", "dataset": "embedded", "id": "step", "parent_id": "task"}
    yield from _two_texts("ultrainteract_sft", "instruction", "response", **extra)


def ultrafeedback_prompts() -> Iterator[Row]:
    """Instructions; leaked evaluation prompts as they are, retyped, and inside a longer text."""
    rest = {"source": "embedded", "models": [], "completions": []}
    for question, _ in _cases("ultrafeedback_prompts", ROWS):
        yield {**rest, "instruction": question}
    leaked = [prompt["messages"][0]["content"] for prompt in load_prompts("evaluation")[:3]]
    for leak in (leaked[0], leaked[1].upper() + " !!", f"Hello. {leaked[2]} Thanks a lot."):
        yield {**rest, "instruction": leak}
    yield from ({**rest, "instruction": broken} for broken in ("  ", None, SURROGATE))


def helpsteer_prompts() -> Iterator[Row]:
    """A row an answer, so that each prompt comes twice."""
    for question, answer in _cases("helpsteer_prompts", ROWS):
        for helpfulness in (4, 2):
            yield {"prompt": question, "response": answer, "helpfulness": helpfulness}
    yield from (
        {"prompt": broken, "response": "Yes."} for broken in ("\n", ["a", "list"], SURROGATE)
    )


def openorca_prompts() -> Iterator[Row]:
    """With and without a system prompt; a leaked evaluation prompt below a system prompt."""
    cases = _cases("openorca_prompts", ROWS)
    for i, (question, answer) in enumerate(cases):
        yield _asked(i, SYSTEM if i % 2 else "", question, answer)
    leaked = load_prompts("evaluation")[3]["messages"][0]["content"]
    yield _asked(50, SYSTEM, leaked, "")
    yield _asked(51, SYSTEM, " ", "")
    yield {**_asked(52, "", *cases[0]), "system_prompt": None}
    yield {**_asked(53, "", *cases[0]), "question": 7}
    yield _asked(54, SURROGATE, *cases[0])


def ultrainteract_prompts() -> Iterator[Row]:
    """Tasks, and tasks with a first try and feedback; trajectories that are no prompts."""
    cases = _cases("ultrainteract_prompts", ROWS)
    for i, (task, answer) in enumerate(cases):
        tried = [("assistant", answer), ("user", "Feedback: that is not complete yet.")]
        yield _trajectory(("user", task), *(tried if i % 2 else []))
    task, answer = cases[0]
    yield _trajectory(("user", task))  # the same task again, for another pair of steps
    yield _trajectory(("user", task), ("assistant", answer))
    yield _trajectory(("assistant", answer), ("user", task))
    yield _trajectory(("user", task), ("assistant", ""), ("user", "Go on."))
    yield _trajectory(("user", task), ("tool", "ok"), ("user", "Go on."))
    yield _trajectory()
    yield _trajectory(("user", SURROGATE))
    yield {**_trajectory(("user", task)), "trajectory": {"from": "user", "value": task}}


def capybara_prompts() -> Iterator[Row]:
    """Conversations of one to three user turns; some that end without an answer."""
    cases = _cases("capybara_prompts", ROWS + 2)
    for i in range(ROWS):
        yield _preferred(*(turn for case in cases[i : i + 1 + i % 3] for turn in _turns(*case)))
    asked, answered = _turns(*cases[ROWS])
    yield _preferred(asked)
    yield _preferred(asked, answered, asked)
    yield _preferred(answered)
    yield _preferred(asked, asked, answered)
    yield _preferred(asked, {**answered, "content": ""}, asked, answered)
    yield _preferred({**asked, "role": "moderator"}, answered)
    yield _preferred()
    yield _preferred({**asked, "content": SURROGATE}, answered)
    yield {**_preferred(asked, answered), "chosen": None}


def dibt_prompts() -> Iterator[Row]:
    """Rated prompts; copies of another source's prompts, retyped and lightly edited."""
    prompts = [question for question, _ in _cases("dibt_prompts", ROWS)]
    (first, _), (second, _) = _cases("ultrafeedback_prompts", 2)
    long = " ".join(prompts[:3])
    prompts += [first, f"  {second.upper()}\n", long, f"{long} Thanks!", "", None, SURROGATE]
    for i, prompt in enumerate(prompts):
        yield {"prompt": prompt, "avg_rating": 1.0 + i % 5, "num_responses": 2, "topic": "any"}


SFT = (
    sharegpt,
    evol_instruct,
    slimorca,
    mathinstruct,
    magicoder,
    gpt4_llm,
    orca_math,
    gpteacher,
    ultrainteract_sft,
)
PROMPTS = (
    ultrafeedback_prompts,
    helpsteer_prompts,
    openorca_prompts,
    ultrainteract_prompts,
    capybara_prompts,
    dibt_prompts,
)
MAKERS: dict[str, Callable[[], Iterator[Row]]] = {
    maker.__name__: maker for maker in (*SFT, *PROMPTS)
}

# Lines that are no rows at all: a cut download and a JSON value that is not an object.
_BROKEN_LINES = {"magicoder": ['{"instruction": "The download sto', '"not a row"']}


def raw_lines(name: str) -> list[str]:
    """The lines of one source's raw file: its rows as ASCII JSON, then lines that are no rows."""
    return lines_of(name, MAKERS, _BROKEN_LINES)


def _cases(name: str, count: int) -> list[Case]:
    """Questions of the kind's own splits; sources of one kind take different ones in turn."""
    kind = SFT if MAKERS[name] in SFT else PROMPTS
    pool = _pool(("sft",) if kind is SFT else ("preference_train", "preference_heldout"))
    start = kind.index(MAKERS[name]) * ROWS
    return [pool[(start + i) % len(pool)] for i in range(count)]


@cache
def _pool(splits: tuple[str, ...]) -> list[Case]:
    return [
        (prompt["messages"][0]["content"], prompt["reference"])
        for split in splits
        for prompt in load_prompts(split)
    ]


def _two_texts(name: str, asked: str, answered: str, **extra: str) -> Iterator[Row]:
    cases = _cases(name, ROWS + 1)
    question, answer = cases[ROWS]
    texts = [*cases[:ROWS], ("", answer), (question, "\n "), (question, None), (3.5, answer)]
    texts += [([question], answer), (question, SURROGATE)]
    yield from ({**extra, asked: first, answered: second} for first, second in texts)


def _alpaca(name: str, answered: str) -> Iterator[Row]:
    cases = _cases(name, ROWS + 1)
    question, answer = cases[ROWS]
    rows = [
        (text, "Answer for a child." if i % 3 == 0 else "", reply)
        for i, (text, reply) in enumerate(cases[:ROWS])
    ]
    rows += [
        (question, " ", answer),
        ("", "", answer),
        (question, "", ""),
        (question, None, answer),
    ]
    rows += [(question, "", ["a"]), (question, SURROGATE, answer)]
    for instruction, given, reply in rows:
        yield {"instruction": instruction, "input": given, answered: reply}


def _chat(number: int, *turns: tuple[str, Any]) -> Row:
    return {"id": f"chat_{number}", "conversations": _spoken(turns)}


def _spoken(turns: tuple[tuple[str, Any], ...]) -> list[Row]:
    return [{"from": speaker, "value": value} for speaker, value in turns]


def _rounds(*texts: str) -> list[tuple[str, str]]:
    """Question, answer, question, answer … as turns of ShareGPT's speakers."""
    return [("gpt" if i % 2 else "human", text) for i, text in enumerate(texts)]


def _broken_chats(question: str, answer: str) -> Iterator[Row]:
    yield _chat(80)
    yield _chat(81, ("human", question))
    yield _chat(82, *_rounds(question, ""))
    yield _chat(83, *_rounds(question, None))
    yield _chat(84, *_rounds(question, SURROGATE))
    yield _chat(85, ("tool", question), ("gpt", answer))
    yield {"id": "chat_86", "conversations": f"{question} {answer}"}
    yield {"id": "chat_87", "conversations": [question, answer]}


def _weighted(*turns: tuple[str, str]) -> Row:
    spoken = _spoken(turns)
    return {"conversations": [{**t, "weight": float(t["from"] == "gpt")} for t in spoken]}


def _asked(number: int, system: str, question: str, answer: str) -> Row:
    return {
        "id": f"cot.{number}",
        "system_prompt": system,
        "question": question,
        "response": answer,
    }


def _trajectory(*turns: tuple[str, str]) -> Row:
    return {
        "task": "Logic",
        "dataset": "embedded",
        "trajectory": _spoken(turns),
        "chosen": "One way on.",
        "rejected": "Another.",
    }


def _turns(question: str, answer: str) -> list[Row]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _preferred(*turns: Row) -> Row:
    return {"source": "embedded", "chosen": list(turns), "chosen_rating": 5, "rejected": []}


if __name__ == "__main__":
    write_files(__doc__.splitlines()[0], MAKERS, raw_lines)
