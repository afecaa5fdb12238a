"""Model cards and data cards, written from a stage's manifest and pushed only on request.

    rlhf-guide card runs/cpu reward_model
    rlhf-guide card runs/cpu reward_model --push NAME/reward-model

A card lies in RUN/cards, not beside the weights: a stage's own files must stay as it left them.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import GuideError
from .files import read_json, write_text
from .workspace import Stage

WHAT = {
    "sft": "A language model fine-tuned on demonstrations (paper, section 3.1): π0.",
    "reward_model": "A Bradley–Terry reward model (paper, section 2.1): a score for each answer.",
    "preference_model": "A pairwise preference model (paper, section 2.1): A or B in one token.",
    "offline_dpo": "A policy trained by DPO on stored preference pairs (paper, appendix B.3).",
    "online": "A policy of iterative online DPO (paper, section 3.3, Algorithm 2).",
}
# Of the profiles' base models: the name on the Hub, and the licence that its derivatives keep.
HUB_NAMES = {"smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
LICENCES = {"HuggingFaceTB/SmolLM2": "apache-2.0", "meta-llama/Meta-Llama-3": "llama3"}

ADAPTER = "These are LoRA weights; they go on top of the stage `sft` of the same run."
SIMULATED = (
    "The data is the course's own miniature; its preferences are simulated from a known utility. "
    "Useful to learn from, not to deploy."
)


def write_card(stage: Stage) -> Path:
    """Write a finished stage's card to RUN/cards and return its path.

    Raises GuideError for a stage that makes neither a model nor data.
    """
    text = data_card(stage) if stage.name == "data" else model_card(stage)
    path = stage.workspace.path / "cards" / f"{stage.name.replace('/', '_')}.md"
    write_text(path, text)
    return path


def model_card(stage: Stage) -> str:
    """Card of a trained model in Markdown: what it is, from what, how it was trained, how good."""
    folder = weights_folder(stage)
    adapter = (folder / "adapter_config.json").exists()
    base = _base_model(stage)
    data = stage.workspace.load("data").manifest["config"]["data_source"]
    header = {
        "library_name": "peft" if adapter else "transformers",
        "license": _licence(base),
        **({"base_model": base} if "/" in base and not Path(base).is_absolute() else {}),
        "tags": ["rlhf", stage.name.split("/")[0].replace("_", "-")],
    }
    origin = (
        f"Trained from `{_shown(base)}`, profile `{stage.workspace.profile.name}` of the RLHF "
        "Guide, after *RLHF Workflow: From Reward Modeling to Online RLHF* (TMLR 2024)."
    )
    notes = [
        WHAT[stage.name.split("/")[0]],
        origin,
        ADAPTER if adapter else "",
        SIMULATED if data == "embedded" else "The data keeps its sources' licences: see its card.",
    ]
    return _card(header, stage, notes)


def data_card(stage: Stage) -> str:
    """Card of the data stage: rows of each table, the sources with their licences, the numbers."""
    folder, source = stage.dir, stage.manifest["config"]["data_source"]
    sources = _sources(folder)
    barred = [name for name, row in sources.items() if row["non_commercial"]]
    header = {
        "license": "cc-by-nc-4.0" if barred else "apache-2.0" if source == "embedded" else "other",
        "tags": ["rlhf", "preferences"],
    }
    tables = "\n".join(
        f"| {path.stem} | {_count_lines(path)} |" for path in sorted(folder.glob("*.jsonl"))
    )
    licences = "\n".join(
        f"| {name} | {row['hub_id']} | {row['licence']} |" for name, row in sources.items()
    )
    notes = [
        "Demonstrations, preference pairs and prompts, as message lists.",
        SIMULATED if source == "embedded" else "Each source keeps its own licence.",
        f"Not for commercial use, because of {', '.join(barred)}." if barred else "",
        f"| table | rows |\n|---|---|\n{tables}",
        f"| source | repository | licence |\n|---|---|---|\n{licences}" if licences else "",
    ]
    return _card(header, stage, notes)


def push(stage: Stage, repository: str) -> str:
    """Upload a stage's model or tables with the card to a private Hub repository; its address.

    The login is the Hub client's own (`hf auth login`, or HF_TOKEN). Raises GuideError when there
    is none, the Hub refuses, or the network is switched off.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    card = write_card(stage)
    kind = "dataset" if stage.name == "data" else "model"
    folder = stage.dir if kind == "dataset" else weights_folder(stage)
    patterns = ["*.jsonl"] if kind == "dataset" else ["*.safetensors", "*.json", "*.jinja"]
    api = HfApi()
    try:
        address = api.create_repo(repository, repo_type=kind, private=True, exist_ok=True)
        options = {"repo_id": repository, "repo_type": kind}
        api.upload_folder(
            folder_path=folder,
            allow_patterns=patterns,
            ignore_patterns=["adapter_config.json", "*/*"],
            **options,
        )
        for name, content in _own_texts(folder, card).items():
            api.upload_file(path_or_fileobj=content, path_in_repo=name, **options)
    except (HfHubHTTPError, LocalTokenNotFoundError, ConnectionError) as error:
        raise GuideError(
            f"the Hub did not take {repository} ({error}): log in with `hf auth login`, unset "
            "HF_HUB_OFFLINE, and look whether you may write there."
        ) from error
    return str(address)


def weights_folder(stage: Stage) -> Path:
    """The folder of a stage's model or adapter; raises GuideError when it has none."""
    for folder in (stage.dir, *sorted(stage.dir.glob("*/"))):
        if any((folder / name).exists() for name in ("adapter_config.json", "config.json")):
            return folder
    raise GuideError(
        f"stage {stage.name!r} holds no model, so there is nothing to describe: name data, "
        f"{', '.join(WHAT)} or a policy such as online/iteration_1/dpo."
    )


def _own_texts(folder: Path, card: Path) -> dict[str, bytes]:
    """The card, and an adapter's configuration without this machine's path to its base."""
    texts = {"README.md": card.read_bytes()}
    configuration = folder / "adapter_config.json"
    if configuration.exists():
        content = {**read_json(configuration), "base_model_name_or_path": None}
        texts[configuration.name] = json.dumps(content, indent=1).encode()
    return texts


def _base_model(stage: Stage) -> str:
    """Name of the model that the stage's own was trained from, as the profile gave it."""
    config = stage.manifest["config"]
    if "base" in config:
        return HUB_NAMES.get(config["base"], config["base"])
    if "base_model" not in config:  # DPO starts from π0
        config = stage.workspace.load("sft").manifest["config"]
    return HUB_NAMES.get(config["base_model"], config["base_model"])


def _licence(base: str) -> str:
    return next((licence for name, licence in LICENCES.items() if base.startswith(name)), "other")


def _shown(base: str) -> str:
    """A model's name without the folders of this machine."""
    return Path(base).name if Path(base).is_absolute() else base


def _sources(folder: Path) -> dict[str, dict[str, Any]]:
    """The sources of real data, from the manifests of the mixtures it was built from."""
    found = [read_json(path)["sources"] for path in sorted(folder.glob("build/*/manifest.json"))]
    return {name: row for sources in found for name, row in sources.items()}


def _count_lines(path: Path) -> int:
    with open(path, "rb") as rows:
        return sum(1 for _ in rows)


def _card(header: Mapping[str, Any], stage: Stage, notes: list[str]) -> str:
    manifest = stage.manifest
    versions = ", ".join(f"{name} {number}" for name, number in manifest["versions"].items())
    origin = (
        f"{versions}; {manifest['device']}, {manifest['dtype']}; finished "
        f"{manifest['finished_at']}. Fingerprint `{stage.fingerprint}`."
    )
    front = "\n".join(f"{name}: {json.dumps(value)}" for name, value in header.items())
    parts = [
        f"---\n{front}\n---",
        f"# {stage.name}, profile {stage.workspace.profile.name}",
        *filter(None, notes),
        f"## Measured\n\n{_table(manifest['metrics'])}",
        f"## Settings\n\n{_table(manifest['config'])}",
        f"## Made by\n\n{origin}",
    ]
    return "\n\n".join(parts) + "\n"


def _table(values: Mapping[str, Any]) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in _flat(values))
    return f"| name | value |\n|---|---|\n{rows}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested values as dotted names; a measured value with its 95% interval in one row."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and {"value", "low", "high"} <= value.keys():
            yield name, "{value:.3f} [{low:.3f}, {high:.3f}]".format(**value)
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        elif isinstance(value, float):
            yield name, f"{value:.6g}"
        elif isinstance(value, list):
            yield name, f"{len(value)} entries"
        else:
            yield name, _shown(str(value))
