"""Exact and near-duplicate texts: of each group the first one stays.

Exact means equal after `ngrams.normalise` (case, white space, Unicode form). Near means that the
sets of 3-grams over words and punctuation marks have a Jaccard similarity |A ∩ B| / |A ∪ B| of at
least `threshold`. Candidates come from MinHash with locality-sensitive hashing (Broder 1997;
library datasketch); each is then confirmed on the sets themselves. So nothing is removed by
accident of hashing, and a near-duplicate is missed with the probability `missed_share`. Before
the sets are compared, candidates whose sketches agree far too little are passed over: prompts with
the same long preamble would otherwise cost one comparison a pair.

Texts alike but for a number, such as two sums in the same words, count as near-duplicates once
they are long enough. For prompts that is harmless; do not use it on questions that are graded.
The paper removed duplicates by a method that it does not describe: all of this is a choice.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from datasketch import MinHash, MinHashLSH

from data_prep.ngrams import ngram_hashes, normalise, tokens

SHINGLE = 3  # tokens in an n-gram
PERMUTATIONS = 128
# More than three standard deviations of a sketch's estimate, which are at most 0.5 / sqrt(128).
ESTIMATE_SLACK = 0.15
_MISSES_MATTER = (0.1, 0.9)  # weights of false candidates, which are confirmed, and of misses

Removed = dict[int, tuple[int, str]]  # index: (index of the text that stays, reason code)


def deduplicate(texts: Sequence[str], threshold: float = 0.8) -> tuple[list[int], Removed]:
    """Indices of the texts that stay, in order, and for the others what they repeat and why.

    The reason is `duplicate` or `near_duplicate`. The result depends on the texts and their order
    only. Raises ValueError for a threshold outside of (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"the threshold must be above 0 and at most 1, not {threshold}")
    first_of, removed = _exact(texts)
    kept: list[int] = []
    index = MinHashLSH(num_perm=PERMUTATIONS, params=_bands(threshold))
    signatures = np.empty((len(texts), PERMUTATIONS), dtype=np.uint32)
    sketches = MinHash.generator(
        (_shingles(texts[number]).tolist() for number in first_of),
        num_perm=PERMUTATIONS,
        hashfunc=_high_half,
    )
    for number, sketch in zip(first_of, sketches, strict=True):
        signatures[number] = sketch.hashvalues
        near = _alike(signatures, number, index.query(sketch), threshold - ESTIMATE_SLACK)
        original = _first_near(texts, number, near, threshold)
        if original is None:
            index.insert(number, sketch, check_duplication=False)
            kept.append(number)
        else:
            removed[number] = (original, "near_duplicate")
    # An exact copy of a near-duplicate repeats the text that stays.
    for number, (original, reason) in removed.items():
        removed[number] = (removed.get(original, (original,))[0], reason)
    return kept, dict(sorted(removed.items()))


def jaccard(first: str, second: str) -> float:
    """|A ∩ B| / |A ∪ B| of the two texts' 3-gram sets; 1 for two texts without any."""
    return _jaccard(_shingles(first), _shingles(second))


def missed_share(similarity: float, threshold: float = 0.8) -> float:
    """The probability that two texts of this Jaccard similarity never become candidates.

    With b bands of r rows, (1 - similarity^r)^b (Leskovec et al., Mining of Massive Datasets,
    section 3.4).
    """
    bands, rows = _bands(threshold)
    return float((1 - similarity**rows) ** bands)


def _exact(texts: Sequence[str]) -> tuple[list[int], Removed]:
    first_of: dict[str, int] = {}
    removed: Removed = {}
    for number, text in enumerate(texts):
        first = first_of.setdefault(normalise(text), number)
        if first != number:
            removed[number] = (first, "duplicate")
    return list(first_of.values()), removed


@cache
def _bands(threshold: float) -> tuple[int, int]:
    """The number of bands and the rows of each that suit the threshold."""
    index = MinHashLSH(threshold, PERMUTATIONS, weights=_MISSES_MATTER)
    return index.b, index.r


def _shingles(text: str) -> np.ndarray:
    """Sorted, different hashes of the 3-grams; of a shorter text its one n-gram."""
    *_, longest = (np.empty(0, dtype=np.uint64), *ngram_hashes(tokens(text), SHINGLE))
    return np.unique(longest)


def _high_half(shingle: int) -> int:
    return shingle >> 32


def _alike(
    signatures: np.ndarray, number: int, candidates: Sequence[int], share: float
) -> list[int]:
    """The candidates whose sketches agree in at least this share of places, in order."""
    if not candidates:
        return []
    ordered = np.sort(np.array(candidates))
    agreement = (signatures[ordered] == signatures[number]).mean(axis=1)
    return ordered[agreement >= share].tolist()


def _first_near(
    texts: Sequence[str], number: int, candidates: Sequence[int], threshold: float
) -> int | None:
    """The earliest candidate that is at least as similar as the threshold, if any."""
    if not candidates:
        return None
    own = _shingles(texts[number])
    near = (c for c in candidates if _jaccard(own, _shingles(texts[c])) >= threshold)
    return next(near, None)


def _jaccard(first: np.ndarray, second: np.ndarray) -> float:
    common = len(np.intersect1d(first, second, assume_unique=True))
    union = len(first) + len(second) - common
    return common / union if union else 1.0
