"""The rules that turn raw rows away: small named filters, and a sentence for each reason code.

A filter either returns what may stay or raises `Rejected` with a code of `REASONS`. Rules of the
paper (appendix B.1): drop low-quality rows, conversations with empty rounds, labels that other
columns contradict, ties and small margins. The numbers behind "low quality" are not published;
where a filter needs one, it is an argument.
"""

import hashlib
import json
from typing import Any

from data_prep.schema import Message, roles_alternate
from data_prep.source import Rejected, items, text

REASONS: dict[str, str] = {
    "malformed": "The row, or a value in it, does not have the shape that the schema promises.",
    "wrong_type": "A field is missing or has another type than the schema says.",
    "broken_utf8": "The text is not valid UTF-8 and could not be stored.",
    "invalid_json": "The line of the file is not JSON.",
    "empty_list": "A list that must hold something is empty.",
    "length_mismatch": "Two lists that belong together have different lengths.",
    "odd_length": "The conversation does not end with an answer: its number of turns is odd.",
    "role_order": "User and assistant do not take turns, starting with the user.",
    "unknown_role": "A turn was spoken by someone who is neither user, assistant nor system.",
    "empty_turn": "A turn has no text.",
    "history_mismatch": "The two conversations differ before their last answer.",
    "identical_answers": "The two answers are the same, so there is nothing to prefer.",
    "too_short": "The conversation has fewer than two turns, or the text is below the limit.",
    "no_answer": "The conversation does not end with the assistant's turn.",
    "no_user_turn": "The prompt does not end with the user's turn.",
    "tie": "Both answers have the same score.",
    "small_margin": "The scores differ by less than the minimum margin.",
    "low_score": "The chosen answer is scored below the minimum.",
    "ratio_not_above": "The winner's score is not above the required multiple of the loser's.",
    "nonpositive_score": "A score is zero or negative, so that a ratio of scores means nothing.",
    "label_contradicts_scores": "The label prefers the answer that the other columns rate lower.",
    "over_cap": "The prompt already has the maximum number of pairs.",
    "missing_rating": "A rating is absent or not a number.",
    "status_tie": "The annotation's own status calls the pair a tie.",
    "in_gsm8k_train": "The prompt is in GSM8K's training set.",
    "trailing_marker": "The transcript ends in a speaker's marker with nothing said after it.",
    "no_markers": "The transcript does not open with the marker of the human's turn.",
    "not_drawn": "Not drawn: one pair a prompt, or a fixed number of prompts, is wanted.",
    "answer_unmatched": "An answer and its rating cannot be brought together.",
    "too_few_answers": "Fewer than two usable answers are left for the prompt.",
    "too_long": "The text is above the length limit.",
    "not_english": "Too few of the letters are Latin, so the text is not English.",
    "duplicate": "The same prompt, after normalisation, came before.",
    "near_duplicate": "Almost the same prompt came before.",
    "contaminated": "The prompt overlaps with an evaluation prompt.",
}

_ROLES = {"user": "user", "assistant": "assistant", "system": "system"}
_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


def prompt_id(source: str, messages: list[Message]) -> str:
    """A stable name for a prompt: the source and 16 hex digits of its messages' SHA-256.

    The hash is taken over canonical JSON (sorted keys, no spaces, ASCII), so that equal
    conversations have equal names on every machine and in every run.
    """
    digest = hashlib.sha256(_canonical(messages).encode("ascii")).hexdigest()
    return f"{source}-{digest[:16]}"


def read_messages(
    row: Any,
    key: str,
    role_key: str = "role",
    content_key: str = "content",
    roles: dict[str, str] = _ROLES,
) -> list[Message]:
    """A list field of turns as messages; `roles` maps the source's speakers to standard roles.

    Raises `Rejected` with `wrong_type`, `empty_list`, `broken_utf8` or `unknown_role`.
    """
    messages = []
    for turn in items(row, key):
        role = roles.get(text(turn, role_key))
        if role is None:
            raise Rejected("unknown_role")
        messages.append({"role": role, "content": text(turn, content_key)})
    return messages


def fold_system(messages: list[Message]) -> list[Message]:
    """Put a leading system turn in front of the first user turn, a blank line between them.

    The standard format knows no system turn. An empty system turn disappears; one without a user
    turn after it stays, for the role check to find.
    """
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return messages
    system, user = messages[0]["content"].strip(), messages[1]["content"]
    folded = f"{system}\n\n{user}" if system and user.strip() else user
    return [{"role": "user", "content": folded}, *messages[2:]]


def check_prompt(messages: list[Message]) -> list[Message]:
    """The messages, if they are a prompt: roles alternate, no turn is empty, the user is last.

    Raises `Rejected` with `empty_list`, `role_order`, `no_user_turn` or `empty_turn`.
    """
    if not messages:
        raise Rejected("empty_list")
    if not roles_alternate(messages):
        raise Rejected("role_order")
    if messages[-1]["role"] != "user":
        raise Rejected("no_user_turn")
    for turn in messages:
        check_not_empty(turn["content"])
    return messages


def user_turn(content: str) -> list[Message]:
    """A prompt of one user turn; raises `Rejected` with `empty_turn`."""
    return [{"role": "user", "content": check_not_empty(content)}]


def check_not_empty(content: str) -> str:
    """The text, if it holds more than white space; raises `Rejected` with `empty_turn`."""
    if not content.strip():
        raise Rejected("empty_turn")
    return content


def check_length(content: str, minimum: int = 1, maximum: int | None = None) -> str:
    """The text, if its length in characters is within both limits.

    Raises `Rejected` with `too_short` or `too_long`.
    """
    if len(content) < minimum:
        raise Rejected("too_short")
    if maximum is not None and len(content) > maximum:
        raise Rejected("too_long")
    return content


def check_english(content: str, min_latin_share: float = 0.8) -> str:
    """The text, if enough of its letters are Latin; a text without letters passes.

    A cheap test of script, not of language: it turns away Chinese or Russian, not French.
    Raises `Rejected` with `not_english`.
    """
    if content.isascii():
        return content
    letters = [character for character in content if character.isalpha()]
    latin = sum(character < "\u0250" for character in letters)  # up to Latin Extended-B
    if letters and latin < min_latin_share * len(letters):
        raise Rejected("not_english")
    return content
