"""Training prompts that overlap with evaluation prompts, found by common runs of words.

    index = EvaluationIndex(evaluation_prompts)
    index.contaminated("Please tell me, …")    # the id of an evaluation prompt, or None

The rule that GPT-3's authors used (Brown et al. 2020, appendix C): two texts overlap if they share
a run of `n` = 13 words, case, punctuation and white space aside. An evaluation prompt of fewer
words must occur as a whole. One of fewer than `SHORTEST` words ("Who are you?") occurs in too many
texts by chance: there the texts must be equal. Paraphrases and translations are not found.
The paper does not say how, or whether, its prompts were checked: the rule is a choice.
"""

from collections.abc import Iterable

import numpy as np

from data_prep.ngrams import ngram_hashes, prompt_text, words
from data_prep.schema import DataError, Prompt

SHORTEST = 5  # words


class EvaluationIndex:
    """The word runs of the evaluation prompts; built once, then asked for each training prompt.

    prompts: prompt records; their whole conversation counts.
    n: words in a run. Raises DataError for n below `SHORTEST`.
    """

    def __init__(self, prompts: Iterable[Prompt], n: int = 13):
        if n < SHORTEST:
            raise DataError(
                f"n must be at least {SHORTEST} words, not {n}: shorter runs are chance"
            )
        self.n = n
        self._whole: dict[str, str] = {}
        self._runs: dict[int, dict[int, tuple[str, str]]] = {}  # length: hash: (run, id)
        for prompt in prompts:
            self._add(prompt["prompt_id"], words(prompt_text(prompt["messages"])))

    def contaminated(self, text: str) -> str | None:
        """The id of an evaluation prompt that the text overlaps with, or None."""
        spoken = words(text)
        if (whole := " ".join(spoken)) in self._whole:
            return self._whole[whole]
        for length, hashes in enumerate(ngram_hashes(spoken, self.n), 1):
            for found in self._common(length, hashes):
                run, prompt_id = self._runs[length][int(hashes[found])]
                if run == _run(spoken, found, length):  # not only the hashes are equal
                    return prompt_id
        return None

    def _add(self, prompt_id: str, spoken: list[str]) -> None:
        if not spoken:
            return
        self._whole.setdefault(" ".join(spoken), prompt_id)
        length = min(self.n, len(spoken))
        if length < SHORTEST:
            return
        *_, hashes = ngram_hashes(spoken, length)
        runs = self._runs.setdefault(length, {})
        for start, value in enumerate(hashes.tolist()):
            runs.setdefault(value, (_run(spoken, start, length), prompt_id))

    def _common(self, length: int, hashes: np.ndarray) -> list[int]:
        runs = self._runs.get(length)
        values = hashes.tolist() if runs else []
        if not runs or runs.keys().isdisjoint(values):
            return []
        return [place for place, value in enumerate(values) if value in runs]


def _run(spoken: list[str], start: int, length: int) -> str:
    return " ".join(spoken[start : start + length])
