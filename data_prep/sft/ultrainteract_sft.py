"""UltraInteract (SFT): reasoning trajectories that end in a correct answer.

Schema: `task`, `dataset`, `instruction`, `response`, `id`, `parent_id`.
Rule: instruction and response are one turn each, then the role filter.
Confirmed: schema, licence, 288,579 rows (data card); a component of the authors' mixture.
"""

from data_prep.records import one_turn
from data_prep.schema import Demonstration
from data_prep.source import Drop, Row, Source, each_row, text


def convert_row(row: Row, drop: Drop) -> list[Demonstration]:
    """The task and its correct solution."""
    return [one_turn(SOURCE.name, text(row, "instruction"), text(row, "response"))]


SOURCE = Source(
    name="ultrainteract_sft",
    kind="sft",
    hub_id="openbmb/UltraInteract_sft",
    files="*.parquet",
    licence="MIT",
    citation="Yuan et al., 2024, arXiv:2404.02078",
    columns=("instruction", "response"),
    convert=each_row(convert_row),
    notes="Confirmed: schema, licence, 288,579 raw rows, a component.",
)
