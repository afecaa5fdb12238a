"""The profiles: the paper's recipe number by number, strict parameters, one code path."""

from dataclasses import fields, is_dataclass

import pytest

from rlhf_guide.errors import ParameterError, UnknownProfile
from rlhf_guide.profiles import (
    PROFILES,
    load_profile,
    parameter_names,
    parameter_value,
    require_available_data,
)

# Every number of the paper's recipe that is a setting, with the place it is printed.
PAPER = {
    # supervised fine-tuning, section 3.1 and appendix B.3
    "base_model": "meta-llama/Meta-Llama-3-8B",
    "sft_learning_rate": 2e-5,
    "sft_batch_size": 32,
    "sft_epochs": 1,
    "sft_max_length": 8192,
    "sft_packing": True,
    "sft_scheduler": "cosine",
    "sft_warmup_ratio": 0.03,
    "sft_lora_rank": 0,
    # Bradley-Terry reward model, section 2.1; weight decay and length from the released code
    "reward_base_model": "meta-llama/Meta-Llama-3-8B-Instruct",
    "reward_model_learning_rate": 2e-6,
    "reward_model_batch_size": 512,
    "reward_model_per_device_batch_size": 1,
    "reward_model_epochs": 1,
    "reward_model_max_length": 4096,
    "reward_model_scheduler": "cosine",
    "reward_model_warmup_ratio": 0.03,
    "reward_model_weight_decay": 0.001,
    "reward_model_lora_rank": 0,
    # pairwise preference model, section 2.1
    "preference_model_learning_rate": 5e-6,
    "preference_model_batch_size": 128,
    "preference_model_per_device_batch_size": 1,
    "preference_model_epochs": 1,
    "preference_model_max_length": 3072,
    "preference_model_packing": True,
    "preference_model_scheduler": "cosine",
    "preference_model_warmup_ratio": 0.03,
    "preference_model_lora_rank": 0,
    # length study, section 2.2, Figure 3
    "evaluation_length_study_prompts": 2_000,
    "evaluation_length_study_samples": 16,
    # generation, section 3.3
    "generation_backend": "vllm",
    "generation_max_new_tokens": 2048,
    "generation_top_p": 1.0,
    "online_temperature_high": 1.0,
    "online_temperature_low": 0.7,
    "online_samples_per_prompt": 16,
    # DPO, Table 7 and section 3.3; one epoch for the offline baseline, appendix B.3
    "dpo_beta": 0.1,
    "dpo_learning_rate": 5e-7,
    "dpo_batch_size": 128,
    "dpo_per_device_batch_size": 2,
    "dpo_epochs": 2,
    "dpo_offline_epochs": 1,
    "dpo_max_length": 2048,
    "dpo_scheduler": "cosine",
    "dpo_warmup_ratio": 0.03,
    "dpo_nll_weight": 0.0,
    "dpo_lora_rank": 0,
    # Algorithm 2
    "online_iterations": 3,
    "online_prompts_per_iteration": 20_000,
    "online_pair_strategy": "best_worst",
    "online_reference": "sft",
    "online_warm_start": True,
    "online_length_penalty": 0.0,
    # chat benchmark, appendix B.2
    "evaluation_prompts": 805,
}


@pytest.mark.parametrize(("name", "value"), PAPER.items())
def test_paper_profile_holds_the_recipe(name, value):
    assert parameter_value(PROFILES["paper"], name) == value


def test_paper_batches_follow_from_eight_gpus():
    """Table 7: 2 a device, accumulation 8, eight devices; section 1.4's 1 x 64 x 8; 1 x 16 x 8."""
    paper = PROFILES["paper"]
    for section, accumulation in (
        (paper.dpo, 8),
        (paper.reward_model, 64),
        (paper.preference_model, 16),
    ):
        assert section.per_device_batch_size * accumulation * 8 == section.batch_size


def test_paper_counts():
    paper = PROFILES["paper"]
    assert paper.online.iterations * paper.online.prompts_per_iteration == 60_000
    assert 700_000 // paper.reward_model.batch_size == 1_367  # steps of Figure 7
    # the concise variant of Table 4 is one override away (Eq. 9, per character)
    assert load_profile("paper", online_length_penalty=0.001).online.length_penalty == 0.001


def test_every_profile_has_the_same_shape():
    """A profile changes numbers, never code paths: all sections and types are the same."""

    def shape(value):
        if is_dataclass(value):
            return {item.name: shape(getattr(value, item.name)) for item in fields(value)}
        return type(value)

    assert len({str(shape(profile)) for profile in PROFILES.values()}) == 1


def test_every_value_of_every_profile_passes_its_own_check():
    for name, profile in PROFILES.items():
        values = {key: parameter_value(profile, key) for key in parameter_names()}
        assert load_profile(name, **values) == profile


def test_embedded_profiles_need_no_download_and_none_allows_one():
    assert not any(profile.allow_download for profile in PROFILES.values())
    assert PROFILES["cpu"].data_source == PROFILES["smoke"].data_source == "embedded"


def test_smoke_keeps_the_shape_of_the_loop():
    smoke = PROFILES["smoke"].online
    assert smoke.iterations == 3
    assert smoke.samples_per_prompt == 4


def test_default_profile(monkeypatch):
    monkeypatch.delenv("RLHF_GUIDE_PROFILE", raising=False)
    assert load_profile().name == load_profile("").name == "cpu"
    monkeypatch.setenv("RLHF_GUIDE_PROFILE", "smoke")
    assert load_profile("").name == "smoke"
    assert load_profile("gpu").name == "gpu"


def test_none_keeps_and_integers_are_numbers():
    assert load_profile("cpu", dpo_beta=None) == PROFILES["cpu"]
    beta = load_profile("cpu", dpo_beta=1).dpo.beta
    assert beta == 1.0
    assert isinstance(beta, float)


def test_download_switch(monkeypatch):
    monkeypatch.setenv("RLHF_GUIDE_ALLOW_DOWNLOAD", "1")
    assert load_profile("cpu").allow_download
    assert not load_profile("cpu", allow_download=False).allow_download


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"sft_learning_rat": 1e-4}, ["'sft_learning_rat'", "'sft_learning_rate'"]),
        ({"beta": 0.1}, ["'beta'", "unknown parameter"]),
        ({"sft_learning_rate": "1e-4"}, ["a number", "1.0e-4"]),
        ({"sft_learning_rate": "2.5"}, ["write 2.5"]),
        ({"sft_epochs": "2"}, ["whole number", "without quotes"]),
        ({"sft_epochs": True}, ["whole number", "True (bool)"]),
        ({"sft_epochs": 1.0}, ["whole number", "1.0 (float)"]),
        ({"sft_packing": "false"}, ["true or false", "write false"]),
        ({"sft_packing": 1}, ["true or false"]),
        ({"base_model": 7}, ["text"]),
        ({"base_model": " "}, ["empty"]),
        ({"sft_epochs": 0}, ["at least 1"]),
        ({"dpo_beta": 0.0}, ["above 0"]),
        ({"dpo_beta": float("nan")}, ["above 0"]),
        ({"generation_top_p": 1.5}, ["at most 1"]),
        ({"dtype": "float16"}, ["auto, float32, bfloat16"]),
        ({"online_reference": "base"}, ["sft, previous"]),
        ({"tracking": "mlflow"}, ["none, trackio, tensorboard, wandb"]),
        ({"online_samples_per_prompt": 7}, ["even"]),
        ({"dpo_batch_size": 10}, ["not a multiple", "dpo_per_device_batch_size"]),
    ],
)
def test_strict_parameters(override, words):
    with pytest.raises(ParameterError) as caught:
        load_profile("cpu", **override)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_unknown_profile():
    with pytest.raises(UnknownProfile, match=r"smoke, cpu, gpu, paper.*'cpu'"):
        load_profile("cpuu")


def test_importing_the_package_loads_no_torch():
    import subprocess
    import sys

    code = (
        "import sys, rlhf_guide.profiles, rlhf_guide.workspace; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["gpu", "paper"])
def test_the_hub_is_read_only_when_downloads_are_allowed(name):
    with pytest.raises(ParameterError, match="data_source=embedded"):
        require_available_data(load_profile(name))
    allowed = load_profile(name, allow_download=True)
    assert require_available_data(allowed) is allowed
    embedded = load_profile(name, data_source="embedded")
    assert require_available_data(embedded) is embedded


def test_a_folder_of_raw_data_must_exist_and_is_found_from_the_project(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "raw").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    found = require_available_data(load_profile("smoke", data_source="raw"))
    assert found.data_source == str(tmp_path / "raw")
    with pytest.raises(ParameterError, match="no such folder"):
        require_available_data(load_profile("smoke", data_source="rwa"))


def test_only_the_notebook_that_reads_raw_data_refuses_its_source(tmp_path, monkeypatch):
    from rlhf_guide import notebook

    for name in ("stay_offline", "quieten", "set_seeds", "use_style"):
        monkeypatch.setattr(notebook, name, lambda *values: None)
    with pytest.raises(ParameterError, match="data_source=embedded"):
        notebook.start("gpu", tmp_path / "hub", data_source=None)
    settings, _ = notebook.start("gpu", tmp_path / "embedded", data_source="embedded")
    assert settings.data_source == "embedded"
    later, _ = notebook.start("gpu", tmp_path / "embedded")  # as notebooks 02 to 08 do
    assert later.name == "gpu"
