"""The arguments that all trainers share, and the history they leave."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rlhf_guide.errors import DataError, ParameterError
from rlhf_guide.profiles import PROFILES, load_profile
from rlhf_guide.training import (
    accumulation_steps,
    checkpoint,
    common_arguments,
    history,
    remove_checkpoints,
    run_metrics,
    training_dtype,
)


def test_accumulation_follows_from_the_number_of_devices():
    assert accumulation_steps(128, per_device=2, devices=8) == 8  # Table 7 on eight GPUs
    assert accumulation_steps(128, per_device=2, devices=1) == 64
    assert accumulation_steps(8, per_device=8, devices=1) == 1


@pytest.mark.parametrize(("batch", "per_device", "devices"), [(10, 4, 1), (8, 8, 2)])
def test_a_batch_that_cannot_be_made_is_refused(batch, per_device, devices):
    with pytest.raises(ParameterError, match="multiple of"):
        accumulation_steps(batch, per_device, devices)


def test_the_launcher_sets_the_number_of_devices(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "8")
    arguments = common_arguments(load_profile("paper").dpo, tmp_path, 0, torch.bfloat16)
    assert arguments["gradient_accumulation_steps"] == 8


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("section", ["sft", "reward_model", "preference_model", "dpo"])
def test_every_profile_gives_arguments_that_trl_accepts(name, section, tmp_path):
    from trl import DPOConfig, RewardConfig, SFTConfig

    settings = getattr(load_profile(name), section)
    kind = {"dpo": DPOConfig, "reward_model": RewardConfig}.get(section, SFTConfig)
    config = kind(**common_arguments(settings, tmp_path, 7, torch.float32))
    assert config.learning_rate == settings.learning_rate
    assert config.num_train_epochs == settings.epochs
    assert config.seed == 7
    assert config.train_batch_size * config.gradient_accumulation_steps == settings.batch_size


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's own rules")
def test_cpu_trains_without_autocast_and_without_checkpointing(tmp_path):
    arguments = common_arguments(load_profile("cpu").sft, tmp_path, 0, torch.bfloat16)
    assert not any(arguments[key] for key in ("bf16", "fp16", "gradient_checkpointing"))
    assert arguments["save_strategy"] == "no"


def test_warm_up_is_a_share_of_all_steps(tmp_path):
    from trl import SFTConfig

    settings = replace(load_profile("cpu").sft, warmup_ratio=0.1)
    config = SFTConfig(**common_arguments(settings, tmp_path, 0, torch.float32))
    assert config.get_warmup_steps(100) == 10


def test_full_fine_tuning_holds_float32_weights():
    assert training_dtype(0, torch.bfloat16) == torch.float32
    assert training_dtype(16, torch.bfloat16) == torch.bfloat16


def _trainer(losses):
    log = [{"step": i + 1, "loss": loss, "learning_rate": 0.1} for i, loss in enumerate(losses)]
    log.append({"step": len(losses), "train_runtime": 2.0, "train_loss": 1.0})
    return SimpleNamespace(state=SimpleNamespace(log_history=log, global_step=len(losses)))


def test_history_has_one_row_a_step_and_metrics_follow():
    trainer = _trainer([3.0, 2.0, 1.0])
    assert [(row["step"], row["loss"]) for row in history(trainer)] == [(1, 3), (2, 2), (3, 1)]
    assert run_metrics(trainer) == {
        "train_seconds": 2.0,
        "steps": 3,
        "first_loss": 3.0,
        "last_loss": 1.0,
    }


def test_a_loss_that_is_no_number_stops_the_stage():
    with pytest.raises(DataError, match="from step 2"):
        history(_trainer([1.0, float("nan")]))


def test_the_newest_complete_checkpoint_is_found_and_all_are_removed(tmp_path):
    assert checkpoint(tmp_path / "absent") is None
    assert checkpoint(tmp_path) is None
    for step in (200, 1000):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    (tmp_path / "checkpoint-1200").mkdir()  # the kill came while it was written
    assert checkpoint(tmp_path) == str(tmp_path / "checkpoint-1000")
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "README.md").touch()  # TRL's card
    remove_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
