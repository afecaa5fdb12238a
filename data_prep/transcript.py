"""Transcripts with speakers' markers, as in HH-RLHF and Nectar, to messages."""

import re

from data_prep.schema import Message
from data_prep.source import Rejected

# A marker opens a turn: blank line, speaker, colon, then white space or the end of the text.
_MARKER = re.compile(r"\n\n(Human|Assistant):(?=\s|\Z)")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def read_transcript(transcript: str, open_end: bool = False) -> list[Message]:
    """Split `"\\n\\nHuman: …\\n\\nAssistant: …"` at its markers; white space around turns goes.

    A marker that a speaker wrote inside a turn cannot be told from a real one; it makes the roles
    stop alternating, which the role check finds. With `open_end` the transcript is a prompt and
    must end in the assistant's marker, which is taken off. Raises `Rejected` with `no_markers`,
    `trailing_marker` (nothing after the last marker, without `open_end`) or `no_user_turn` (text
    after it, with `open_end`).
    """
    before, *parts = _MARKER.split(transcript)
    if not parts or before.strip():
        raise Rejected("no_markers")
    messages = [
        {"role": _ROLES[speaker], "content": said.strip()}
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    last = messages[-1]
    if open_end:
        if last["role"] != "assistant" or last["content"]:
            raise Rejected("no_user_turn")
        return messages[:-1]
    if not last["content"]:
        raise Rejected("trailing_marker")
    return messages
