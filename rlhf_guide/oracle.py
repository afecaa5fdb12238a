"""The known utility of the embedded world, and the annotators that are simulated from it.

In real data nobody knows how good an answer truly is. The miniature's prompts carry the facts that
an answer must contain and the format that it must keep, so here the truth is computed:

    u(x, a) = facts + instruction − repetition − truncation − rambling        (oracle 1)

and a simulated annotator prefers a over b with the Bradley–Terry probability (paper, Eq. 1)

    P(a ≻ b | x) = σ((u(x, a) − u(x, b) + v · (len a − len b) / 50) / τ)      (oracle 2)

where len counts words, τ is the annotator's temperature and v a verbosity bias in utility per 50
words. With v = 0 the annotator is noisy but fair.
"""

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data_prep import instructions

LONG_ANSWER_WORDS = 60  # an answer longer than this starts to ramble
ANNOTATOR_TEMPERATURE = 0.25  # one fact of three more is preferred 79% of the time


@dataclass(frozen=True)
class Utility:
    """The terms of (oracle 1) for one answer; each is ≥ 0, and the last three are subtracted.

    facts: share of the prompt's facts that the answer contains, 0 to 1.
    instruction: 1 if the format instruction is kept, else 0; 1 if the prompt gives none and the
        answer is not empty.
    repetition: share of repeated word trigrams, 0 to 1.
    truncation: 0.5 if the answer was cut by the length limit.
    rambling: 0 up to 60 words, growing to 0.5 at 120 words and above.
    """

    facts: float
    instruction: float
    repetition: float
    truncation: float
    rambling: float

    @property
    def total(self) -> float:
        """u(x, a), between −2 and 2."""
        return self.facts + self.instruction - self.repetition - self.truncation - self.rambling


def utility(prompt: dict[str, Any], text: str, finish_reason: str = "stop") -> Utility:
    """True utility of an answer to a prompt of the miniature (oracle 1).

    Raises KeyError for a prompt without `facts`: real data has no oracle.
    """
    kept = instruction_kept(prompt, text)
    return Utility(
        facts=facts_covered(prompt["facts"], text),
        instruction=float(bool(text.strip()) if kept is None else kept),
        repetition=repetition(text),
        truncation=0.5 if finish_reason == "length" else 0.0,
        rambling=0.5 * min(1.0, max(0, len(text.split()) - LONG_ANSWER_WORDS) / LONG_ANSWER_WORDS),
    )


def instruction_kept(prompt: dict[str, Any], text: str) -> bool | None:
    """Whether the answer keeps the prompt's format instruction; None if the prompt has none."""
    if prompt["instruction"] is None:
        return None
    return instructions.kept(prompt["instruction"], text)


def facts_covered(facts: list[list[str]], text: str) -> float:
    """Share of the facts of which at least one accepted string stands in the text as a word."""
    lowered = text.lower()
    found = [any(_contains_word(lowered, string) for string in accepted) for accepted in facts]
    return sum(found) / len(found)


def repetition(text: str) -> float:
    """1 − distinct trigrams / trigrams of lower-cased words; 0 for fewer than three words."""
    words = text.lower().split()
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


def preference_probability(
    utility_a: float,
    utility_b: float,
    words_a: int = 0,
    words_b: int = 0,
    temperature: float = ANNOTATOR_TEMPERATURE,
    verbosity_bias: float = 0.0,
) -> float:
    """P(a ≻ b) of a simulated annotator (oracle 2); temperature in units of utility, > 0."""
    advantage = utility_a - utility_b + verbosity_bias * (words_a - words_b) / 50
    return 1 / (1 + math.exp(-advantage / temperature))


def annotator(
    seed: int = 0, temperature: float = ANNOTATOR_TEMPERATURE, verbosity_bias: float = 0.0
) -> Callable[[dict[str, Any], dict[str, Any], str], bool]:
    """A function `prefer(a, b, key) -> bool` that draws one vote from (oracle 2).

    `a` and `b` are candidates with `text` and `utility`. The draw depends on the seed and the key
    only, so the same pair always gets the same label, whatever the number of workers.
    """

    def prefer(a: dict[str, Any], b: dict[str, Any], key: str) -> bool:
        digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
        draw = int.from_bytes(digest[:8], "big") / 2**64
        words = len(a["text"].split()), len(b["text"].split())
        return draw < preference_probability(
            a["utility"], b["utility"], *words, temperature, verbosity_bias
        )

    return prefer


def _contains_word(text: str, string: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(string.lower())}(?!\w)", text) is not None
