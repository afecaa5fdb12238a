"""A tiny run folder, ready for Algorithm 2: random policy, briefly trained reward model.

Also a program, killed and restarted by test_online: `python tests/online_world.py RUN_DIR`.
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from data_prep.embedded import load_prompts
from rlhf_guide.models import resolve_model
from rlhf_guide.online import run_online
from rlhf_guide.profiles import Profile, load_profile
from rlhf_guide.reward_model import train_reward_model
from rlhf_guide.workspace import Workspace, open_run, write_jsonl


def tiny_profile(**online) -> Profile:
    """Three iterations of three prompts with four samples of eight tokens."""
    profile = load_profile("smoke")
    return replace(
        profile,
        generation=replace(profile.generation, max_new_tokens=8, batch_size=4),
        dpo=replace(profile.dpo, learning_rate=2e-3, batch_size=2, per_device_batch_size=2),
        online=replace(
            profile.online, iterations=3, prompts_per_iteration=3, samples_per_prompt=4, **online
        ),
        evaluation=replace(profile.evaluation, validation_prompts=2, samples_per_prompt=2),
    )


def make_run(folder: Path, profile: Profile) -> Workspace:
    """Finish the stages that online DPO reads: data, sft and reward_model."""
    ws = open_run(profile, folder)
    data = ws.stage("data", {})
    for split in ("online_1", "online_2", "online_3", "validation"):
        write_jsonl(data.dir / f"prompts_{split}.jsonl", load_prompts(split)[:3])
    data.finish()
    base = resolve_model("random-tiny-llama")
    sft = ws.stage("sft", {}, ["data"])
    shutil.copytree(base, sft.dir / "model")
    sft.finish()
    reward = ws.stage("reward_model", {}, ["data"])
    settings = replace(profile.reward_model, learning_rate=1e-2, max_samples=0)
    train_reward_model(base, _pairs(), settings, reward.dir / "model", 0, torch.float32)
    reward.finish()
    return ws


def _pairs() -> list[dict]:
    prompts = load_prompts("preference_train")[:8]
    return [
        {
            side: [*prompt["messages"], {"role": "assistant", "content": text}]
            for side, text in (("chosen", prompt["reference"]), ("rejected", "I do not know."))
        }
        for prompt in prompts
    ]


if __name__ == "__main__":
    settings = tiny_profile()
    run_online(open_run(settings, sys.argv[1]), settings)
