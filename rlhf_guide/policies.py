"""Where the policies of a run lie: each is a model folder, with an adapter folder or without.

    model, adapter = sft_policy(ws)            # π0
    model, adapter = offline_policy(ws)        # π0 + DPO on stored pairs
    model, adapter = iteration_policy(ws, 2)   # π_2 of Algorithm 2
    model, adapter = chosen_policy(ws)         # the checkpoint picked on validation prompts

Both go to `generation.generate(model, ..., adapter=adapter)`.
"""

from __future__ import annotations

from pathlib import Path

from rlhf_guide.errors import MissingStage
from rlhf_guide.workspace import Stage, Workspace

POLICY = "policy"  # the folder inside a DPO stage that holds the trained adapter or model
Policy = tuple[Path, Path | None]


def sft_policy(ws: Workspace) -> Policy:
    """Return the SFT policy π0, the start and the reference of every DPO run."""
    return model_folder(ws.load("sft")), None


def offline_policy(ws: Workspace) -> Policy:
    """Return the policy trained by offline DPO on stored pairs."""
    return _trained(ws, ws.load("offline_dpo"))


def iteration_policy(ws: Workspace, t: int) -> Policy:
    """Return π_t of Algorithm 2; t = 0 is the SFT policy."""
    return sft_policy(ws) if t == 0 else _trained(ws, ws.load(policy_stage(t)))


def chosen_policy(ws: Workspace) -> Policy:
    """Return the online policy that was chosen on the validation prompts."""
    return iteration_policy(ws, ws.load("online").metrics["iteration"])


def policy_stage(t: int) -> str:
    """Name the stage that makes π_t."""
    return f"online/iteration_{t}/dpo" if t else "sft"


def policy_location(reference: str | Path, trained: str | Path) -> Policy:
    """Return the policy in ``trained``: an adapter on top of ``reference``, or a whole model."""
    folder = Path(trained)
    if (folder / "adapter_config.json").exists():
        return Path(reference), folder
    return folder, None


def model_folder(stage: Stage) -> Path:
    """Return the one model folder of a stage: the stage's own folder or a subfolder.

    Raises MissingStage when the stage has finished but its model is gone.
    """
    for folder in (stage.dir, *sorted(stage.dir.glob("*/"))):
        if (folder / "config.json").exists():
            return folder
    raise MissingStage(
        f"Stage {stage.name!r} has no model in {stage.dir.name}/; delete that folder and run its "
        "notebook again."
    )


def _trained(ws: Workspace, stage: Stage) -> Policy:
    return policy_location(sft_policy(ws)[0], stage.dir / POLICY)
