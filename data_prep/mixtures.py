"""Which sources a data set is mixed from, and with which options.

    python -m data_prep build --mixture mix2 --from hub --out data/mix2

`mix1` and `mix2` are the paper's (section 2); `v1` to `v4` are the earlier versions of the authors'
blog, a cheap ablation: all pairs beat best against random, 30,000 safety pairs mend safety, and
150,000 hurt reasoning. `sft` and `prompts` are the nine and six sets of appendices B.3 and A.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from data_prep import preference, prompts, sft
from data_prep.filters import prompt_id
from data_prep.schema import DataError, PreferencePair, pair_problem
from data_prep.source import Drop, Kind, Rejected, Row, Source, each_row, number


@dataclass(frozen=True)
class Part:
    """One source of a mixture: its name, its options where they are not the source's own.

    `limit` keeps the first pairs in file order and counts the others as `not_drawn`; 0 keeps all.
    """

    source: str
    options: dict[str, Any] = field(default_factory=dict)
    limit: int = 0


@dataclass(frozen=True)
class Mixture:
    """A named list of parts of one kind, and what is known of the original."""

    name: str
    kind: Kind
    parts: tuple[Part, ...]
    notes: str


def find_mixture(name: str) -> Mixture:
    """A mixture by name; raises DataError that lists the names."""
    if name not in MIXTURES:
        raise DataError(f"unknown mixture {name!r}; the mixtures are {', '.join(MIXTURES)}")
    return MIXTURES[name]


def _standard_pair(row: Row, drop: Drop) -> list[PreferencePair]:
    """A row that is in the standard format already, checked by its six rules."""
    if reason := pair_problem(row):
        raise Rejected(reason)
    chosen, rejected = (_plain(row[side]) for side in ("chosen", "rejected"))
    scores = [
        None if row.get(f"{side}_score") is None else number(row, f"{side}_score")
        for side in ("chosen", "rejected")
    ]
    return [
        {
            "prompt_id": prompt_id("preference_700k", chosen[:-1]),
            "chosen": chosen,
            "rejected": rejected,
            "chosen_score": scores[0],
            "rejected_score": scores[1],
            "source": "preference_700k",
        }
    ]


def _plain(messages: Iterable[Row]) -> list[dict[str, str]]:
    for turn in messages:
        try:
            turn["content"].encode("utf-8")
        except UnicodeEncodeError as error:
            raise Rejected("broken_utf8") from error
    return [{"role": turn["role"], "content": turn["content"]} for turn in messages]


# The authors' own training set. How its 700,000 pairs were chosen was never recorded.
PREFERENCE_700K = Source(
    name="preference_700k",
    kind="preference",
    hub_id="hendrydong/preference_700K",
    files="*train*",
    licence="none stated; holds PKU-SafeRLHF, so treat it as non-commercial",
    non_commercial=True,
    citation="Dong et al., 2024, arXiv:2405.07863",
    columns=("chosen", "rejected", "chosen_score", "rejected_score"),
    convert=each_row(_standard_pair),
    annotator="mixed",
    paper={"pairs": 700_000},
    notes="Already in the standard format: only the six rules are checked.",
)

# The larger safety set of version 4, read like its 30K subset.
PKU_FULL = replace(
    preference.SOURCES["pku_saferlhf"],
    name="pku_saferlhf_full",
    hub_id="PKU-Alignment/PKU-SafeRLHF",
    paper={},
    notes="Version 4 takes 150,000 pairs of it; which ones is not documented.",
)

SOURCES: dict[str, Source] = {
    **preference.SOURCES,
    PREFERENCE_700K.name: PREFERENCE_700K,
    PKU_FULL.name: PKU_FULL,
    **sft.SOURCES,
    **prompts.SOURCES,
}

_TABLE_5 = (
    "hh_rlhf",
    "shp",
    "helpsteer",
    "pku_saferlhf",
    "ultrafeedback",
    "ultrainteract",
    "codeultrafeedback",
    "argilla_math",
    "orca",
    "capybara",
)
_V2 = tuple(map(Part, ("hh_rlhf", "shp", "ultrafeedback", "helpsteer", "capybara", "orca")))
_BEST_VS_RANDOM = {"pairs": "best_vs_random"}


def _all_of(sources: Iterable[str]) -> tuple[Part, ...]:
    return tuple(map(Part, sources))


_MIXTURES = (
    Mixture(
        "mix1",
        "preference",
        _all_of(("hh_rlhf", "shp", "ultrafeedback", "summarize")),
        "Paper, section 2: close to the recipe of UltraRM.",
    ),
    Mixture(
        "mix2",
        "preference",
        _all_of(_TABLE_5),
        "Paper, section 2 and Table 5: all ten sets, 848,965 pairs when they are added up.",
    ),
    Mixture(
        "v1",
        "preference",
        (
            Part("hh_rlhf"),
            Part("shp", {"cap": 1}),
            Part("ultrafeedback", _BEST_VS_RANDOM),
            Part("helpsteer", _BEST_VS_RANDOM),
            Part("capybara"),
            Part("orca"),
        ),
        "Blog, version 1, about 250,000 pairs: one pair a prompt. Choice: the blog takes the 7K "
        "Capybara set, this guide its filtered successor, as Table 5 does.",
    ),
    Mixture("v2", "preference", _V2, "Blog, version 2: all pairs but ties, up to 5 a prompt."),
    Mixture(
        "v3",
        "preference",
        (*_V2, Part("pku_saferlhf")),
        "Blog, version 3: version 2 and 30,000 safety rows; 555,000 pairs on the Hub.",
    ),
    Mixture(
        "v4",
        "preference",
        (*_V2, Part(PKU_FULL.name, limit=150_000)),
        "Blog, version 4: version 2 and 150,000 safety pairs. Choice: the first ones.",
    ),
    Mixture(
        "preference_700k",
        "preference",
        (Part(PREFERENCE_700K.name),),
        "The authors' training set as it is on the Hub; it cannot be rebuilt from its sources.",
    ),
    Mixture(
        "nectar",
        "preference",
        (Part("nectar"),),
        "The offline DPO baseline (appendix B.3); the paper does not state its pair rule.",
    ),
    Mixture("sft", "sft", _all_of(sft.SOURCES), "Appendix B.3: nine sets, sizes not given."),
    Mixture(
        "prompts",
        "prompts",
        _all_of(prompts.SOURCES),
        "Appendix A: six sets, filtered and de-duplicated into three slices.",
    ),
)
MIXTURES: dict[str, Mixture] = {mixture.name: mixture for mixture in _MIXTURES}
