"""UltraInteract (pairs): a right and a wrong next step in a reasoning trajectory.

Schema: `trajectory` (turns of `from` and `value`: the task, earlier steps, feedback), `chosen` and
`rejected` (the next step as text), `task`, `dataset`, `id`, `parent_id`.
Rule: the trajectory must be a prompt that ends on the user's turn; chosen and rejected follow.
Confirmed: schema, 219,522 raw rows. Not documented: the filter that left 161,927 pairs in the
paper; with the rules here the count will be higher. Table 5 prints GPT-4 as the annotator; the
data card derives correctness from execution and reference answers.
"""

from data_prep.filters import check_prompt, fold_system, read_messages
from data_prep.pairing import one_record
from data_prep.schema import PreferencePair
from data_prep.source import Drop, Row, Source, each_row, text


def convert_row(row: Row, drop: Drop) -> list[PreferencePair]:
    """The trajectory with its two continuations, without scores."""
    trajectory = read_messages(row, "trajectory", role_key="from", content_key="value")
    prompt = check_prompt(fold_system(trajectory))
    return [one_record(SOURCE.name, prompt, text(row, "chosen"), text(row, "rejected"))]


SOURCE = Source(
    name="ultrainteract",
    kind="preference",
    hub_id="openbmb/UltraInteract_pair",
    licence="MIT",
    citation="Yuan et al., 2024, arXiv:2404.02078",
    columns=("trajectory", "chosen", "rejected"),
    convert=each_row(convert_row),
    annotator="GPT-4",
    paper={
        "prompts": 76086,
        "prompt_tokens": 507.4,
        "chosen_tokens": 396.6,
        "rejected_tokens": 416.7,
        "pairs": 161927,
    },
    notes="Confirmed: schema. Not documented: the filter from 219,522 rows to 161,927 pairs.",
)
