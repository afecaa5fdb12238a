"""Texts as sets of hashed n-grams: what near-duplicates and leaked prompts are found by."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from zlib import crc32

import numpy as np

from data_prep.schema import Message

_WORDS = re.compile(r"\w+")
_TOKENS = re.compile(r"\w+|[^\w\s]")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, with well-mixed bits


def prompt_text(messages: Sequence[Message]) -> str:
    """All turns of a conversation as one text, a line break between them."""
    return "\n".join(turn["content"] for turn in messages)


def normalise(text: str) -> str:
    """Unicode's compatible form (NFKC) in lower case, runs of white space as one space."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def words(text: str) -> list[str]:
    """The words of a text, normalised, punctuation left out."""
    return _WORDS.findall(normalise(text))


def tokens(text: str) -> list[str]:
    """The words and punctuation marks of a text, normalised: 2+3 and 2-3 differ."""
    return _TOKENS.findall(normalise(text))


def ngram_hashes(units: Sequence[str], longest: int) -> Iterator[np.ndarray]:
    """For n from 1 to `longest`, the 64-bit hashes of all n-grams in order, shape (len - n + 1,).

    A polynomial over the CRC-32 of the units, modulo 2^64: the same on every machine. Ends early
    when the text has fewer units.
    """
    single = np.array([crc32(unit.encode("utf-8", "replace")) for unit in units], dtype=np.uint64)
    hashes = np.zeros(len(units) + 1, dtype=np.uint64)
    for n in range(1, min(longest, len(units)) + 1):
        hashes = (hashes[:-1] + single[n - 1 :]) * _BASE
        yield hashes
