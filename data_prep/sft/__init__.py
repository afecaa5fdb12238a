"""The nine sources of the paper's SFT mixture (appendix B.3)."""

from data_prep.sft import (
    evol_instruct,
    gpt4_llm,
    gpteacher,
    magicoder,
    mathinstruct,
    orca_math,
    sharegpt,
    slimorca,
    ultrainteract_sft,
)
from data_prep.source import Source

_MODULES = (
    sharegpt,
    evol_instruct,
    slimorca,
    mathinstruct,
    magicoder,
    gpt4_llm,
    orca_math,
    gpteacher,
    ultrainteract_sft,
)
SOURCES: dict[str, Source] = {module.SOURCE.name: module.SOURCE for module in _MODULES}
