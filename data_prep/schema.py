"""The records that pass between stages, and their validator.

Messages, never templated strings, pass between stages: a chat template belongs to one model, the
data does not. The preference record is RLHFlow's standard format plus `source` and `prompt_id`,
which the original lacks.
"""

from typing import Any, TypedDict

Message = dict[str, str]  # {"role": "user" | "assistant" | "system", "content": str}


class DataError(Exception):
    """Data that cannot be used as it is; the message says what to do."""


class Demonstration(TypedDict):
    """One conversation for supervised fine-tuning; ends with an assistant turn."""

    id: str
    messages: list[Message]
    source: str


class PreferencePair(TypedDict):
    """Two conversations that differ in their last assistant turn only."""

    prompt_id: str
    chosen: list[Message]
    rejected: list[Message]
    chosen_score: float | None
    rejected_score: float | None
    source: str


class Prompt(TypedDict):
    """A conversation that ends with a user turn and waits for an answer."""

    prompt_id: str
    messages: list[Message]
    source: str


def pair_problem(row: dict[str, Any]) -> str | None:
    """Name the first rule of the standard format that a preference pair breaks, or None.

    The six rules of the RLHFlow data cards: equal length, even length, alternating roles, no empty
    turn, same history, different last answers. The codes are `malformed`, `length_mismatch`,
    `odd_length`, `role_order`, `empty_turn`, `history_mismatch` and `identical_answers`.
    """
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not (_is_conversation(chosen) and _is_conversation(rejected)):
        return "malformed"
    if len(chosen) != len(rejected):
        return "length_mismatch"
    if len(chosen) % 2:
        return "odd_length"
    if not (roles_alternate(chosen) and roles_alternate(rejected)):
        return "role_order"
    if any(not turn["content"].strip() for turn in [*chosen, *rejected]):
        return "empty_turn"
    if chosen[:-1] != rejected[:-1]:
        return "history_mismatch"
    if chosen[-1] == rejected[-1]:
        return "identical_answers"
    return None


def demonstration_problem(row: dict[str, Any]) -> str | None:
    """Name the first rule a demonstration breaks, or None (the published SFT role filter).

    At least two messages; after an optional system turn, user and assistant alternate; no turn is
    empty; the last turn is the assistant's. Codes: `malformed`, `too_short`, `role_order`,
    `empty_turn`, `no_answer`.
    """
    messages = row.get("messages")
    if not _is_conversation(messages):
        return "malformed"
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if len(turns) < 2:
        return "too_short"
    if not roles_alternate(turns):
        return "role_order"
    if any(not turn["content"].strip() for turn in messages):
        return "empty_turn"
    return None if messages[-1]["role"] == "assistant" else "no_answer"


def roles_alternate(messages: list[Message]) -> bool:
    """True if the roles are user, assistant, user, … from the first turn on."""
    return all(
        turn["role"] == ("assistant" if index % 2 else "user")
        for index, turn in enumerate(messages)
    )


def _is_conversation(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and len(messages) > 0
        and all(
            isinstance(turn, dict)
            and isinstance(turn.get("role"), str)
            and isinstance(turn.get("content"), str)
            for turn in messages
        )
    )
