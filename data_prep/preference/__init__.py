"""The preference sources: the ten of the paper's Table 5, and two that mix1 and DPO need."""

from data_prep.preference import (
    argilla_math,
    capybara,
    codeultrafeedback,
    helpsteer,
    hh_rlhf,
    nectar,
    orca,
    pku_saferlhf,
    shp,
    summarize,
    ultrafeedback,
    ultrainteract,
)
from data_prep.source import Source

_MODULES = (
    hh_rlhf,
    shp,
    helpsteer,
    pku_saferlhf,
    ultrafeedback,
    ultrainteract,
    codeultrafeedback,
    argilla_math,
    orca,
    capybara,
    summarize,
    nectar,
)
SOURCES: dict[str, Source] = {module.SOURCE.name: module.SOURCE for module in _MODULES}
