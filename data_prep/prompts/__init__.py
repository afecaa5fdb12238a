"""The six sources of the paper's prompt set (appendix A)."""

from data_prep.prompts import capybara, dibt, helpsteer, openorca, ultrafeedback, ultrainteract
from data_prep.source import Source

_MODULES = (ultrafeedback, helpsteer, openorca, ultrainteract, capybara, dibt)
SOURCES: dict[str, Source] = {module.SOURCE.name: module.SOURCE for module in _MODULES}
