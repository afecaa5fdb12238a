"""From raw conversations to demonstrations and prompts: what the sources of a kind share.

The role filter of demonstrations is the published one of the authors' SFT mixture (data card of its
filtered copy): at least two messages; after an optional system turn, user and assistant alternate;
no turn is empty. It left 1,724,908 of 1.76 million conversations. This guide also asks for an
answer at the end, since only the assistant's turns are learned.
"""

from data_prep.filters import check_prompt, fold_system, prompt_id, read_messages
from data_prep.schema import Demonstration, Message, Prompt, demonstration_problem
from data_prep.source import Drop, Rejected, Row

SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system"}


def demonstration(source: str, messages: list[Message]) -> Demonstration:
    """A record of a conversation that passes the role filter; its id is a hash of its messages.

    Raises `Rejected` with `too_short`, `role_order`, `empty_turn` or `no_answer`.
    """
    problem = demonstration_problem({"messages": messages})
    if problem:
        raise Rejected(problem)
    return {"id": prompt_id(source, messages), "messages": messages, "source": source}


def one_turn(source: str, question: str, answer: str) -> Demonstration:
    """A demonstration of one question and its answer; raises `Rejected` with `empty_turn`."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return demonstration(source, messages)


def prompt_record(source: str, messages: list[Message]) -> Prompt:
    """A record of a conversation that waits for an answer; a system turn is folded.

    Raises `Rejected` with `role_order`, `no_user_turn` or `empty_turn`.
    """
    messages = check_prompt(fold_system(messages))
    return {"prompt_id": prompt_id(source, messages), "messages": messages, "source": source}


def read_conversation(row: Row) -> list[Message]:
    """The turns of `conversations`, a list of `from` (human, gpt, system) and `value`.

    Raises `Rejected` with `wrong_type`, `empty_list`, `broken_utf8` or `unknown_role`.
    """
    return read_messages(row, "conversations", "from", "value", SPEAKERS)


def trim(messages: list[Message], drop: Drop) -> list[Message]:
    """Cut what cannot be learned from the ends of a chat that was split into pieces.

    Answers before the first user turn are dropped as `role_order`, user turns after the last
    answer as `no_answer`, each end as one piece. Nothing is cut from a conversation that would
    lose all its turns: the role filter turns it away as a whole.
    """
    start, end = 0, len(messages)
    while start < end and messages[start]["role"] == "assistant":
        start += 1
    while end > start and messages[end - 1]["role"] == "user":
        end -= 1
    if start == end:
        return messages
    for reason, piece in (("role_order", messages[:start]), ("no_answer", messages[end:])):
        if piece:
            drop(reason, piece)
    return messages[start:end]


def joined(instruction: str, context: str) -> str:
    """Alpaca's two fields as one question: the instruction, a blank line, the input if any."""
    return f"{instruction}\n\n{context}" if context.strip() else instruction
