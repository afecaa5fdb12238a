"""The data card of a built mixture: what it is, where it comes from, and under which terms."""

from typing import Any

_NON_COMMERCIAL = """\
> **Not for commercial use.** {names} may not be used commercially, so neither may this mixture,
> nor, by the usual reading, a model trained on it.
"""
_ORIGINS = {
    "embedded": "The rows are the miniature of the RLHF Guide: written for the course in the "
    "upstream schemas, not taken from the data sets named below.",
    "hub": "The rows come from the repositories named below.",
    "folder": "The rows come from local files in the schemas of the repositories named below.",
}


def data_card(manifest: dict[str, Any]) -> str:
    """A Hugging Face data card in Markdown for a manifest of `build.build`."""
    sources = manifest["sources"]
    names = [name for name, source in sources.items() if source["non_commercial"]]
    warning = _NON_COMMERCIAL.format(names=", ".join(names)) if names else ""
    missing = ", ".join(manifest["missing"]) or "none"
    return f"""\
---
license: {"cc-by-nc-4.0" if names else "other"}
configs:
- config_name: default
  data_files: {"slices" if "slices" in manifest else "data"}/*.parquet
tags:
- {manifest["kind"]}
- rlhf
---

# {manifest["mixture"]}

{manifest["notes"]} {_ORIGINS[manifest["origin"]]}

{warning}
| source | repository | licence | rows read | records | citation |
|---|---|---|---|---|---|
{_rows(sources)}

Records: {manifest["records"]}. Sources of the mixture without raw data: {missing}. Each source
keeps its own licence; read it before you use or pass on these records.

`manifest.json` holds the hashes of the input files, the options of each converter, the seed and
the version of the code; `dropped.csv` counts every row that was turned away, with its reason.
"""


def _rows(sources: dict[str, dict[str, Any]]) -> str:
    return "\n".join(
        f"| {name} | {source['hub_id']} ({source['revision']}) | {source['licence']} "
        f"| {source['rows_read']} | {source['records']} | {source['citation']} |"
        for name, source in sources.items()
    )
