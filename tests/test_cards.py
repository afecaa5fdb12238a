"""Cards say what the manifests say, name no machine, and leave the stages as they are."""

import json

import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import LocalTokenNotFoundError

from rlhf_guide import cards, cli
from rlhf_guide.errors import GuideError
from rlhf_guide.profiles import load_profile
from rlhf_guide.workspace import open_run, write_json, write_jsonl

ACCURACY = {"value": 0.6814, "low": 0.6, "high": 0.75, "n": 48}


@pytest.fixture
def ws(tmp_path):
    """A run with data, a policy π0, a reward model and an adapter."""
    ws = open_run(load_profile("cpu"), tmp_path / "run")
    data = ws.stage("data", {"seed": 42, "data_source": "embedded"})
    write_jsonl(data.dir / "preference_train.jsonl", [{}, {}, {}])
    data.finish({"longer_chosen": ACCURACY})
    model(ws, "sft", {"base_model": str(tmp_path / "my-base")}, ["data"])
    model(ws, "reward_model", {"base": "smollm2-135m-instruct", "learning_rate": 1e-3}, ["data"])
    adapter = ws.stage("offline_dpo", {"beta": 0.1}, ["data", "sft"])
    settings = {"r": 16, "base_model_name_or_path": str(tmp_path)}
    write_json(adapter.dir / "policy" / "adapter_config.json", settings)
    adapter.finish()
    return ws


def model(ws, name, config, inputs):
    stage = ws.stage(name, config, inputs)
    write_json(stage.dir / "model" / "config.json", {})
    stage.finish({"reward_model_accuracy": ACCURACY, "training": {"steps": 55}})


def read(ws, name):
    """The header and the text of a stage's card."""
    text = cards.write_card(ws.load(name)).read_text(encoding="utf-8")
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def test_a_model_card_holds_the_manifest(ws):
    header, body = read(ws, "reward_model")
    assert header["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert header["license"] == "apache-2.0"
    assert "| reward_model_accuracy | 0.681 [0.600, 0.750] |" in body
    assert "| training.steps | 55 |" in body
    assert "| learning_rate | 0.001 |" in body
    assert ws.load("reward_model").fingerprint in body
    assert "simulated" in body


def test_a_card_names_no_folder_of_this_machine(ws, tmp_path):
    for name in ("data", "sft", "reward_model", "offline_dpo"):
        header, body = read(ws, name)
        assert str(tmp_path) not in f"{header}{body}"
    assert "`my-base`" in read(ws, "sft")[1]
    assert "base_model" not in read(ws, "sft")[0]


def test_an_adapter_says_what_it_goes_on(ws):
    header, body = read(ws, "offline_dpo")
    assert header["library_name"] == "peft"
    assert cards.ADAPTER in body


def test_a_data_card_counts_rows_and_keeps_the_strictest_licence(ws):
    header, body = read(ws, "data")
    assert header["license"] == "apache-2.0"
    assert "| preference_train | 3 |" in body
    source = {"hub_id": "a/b", "licence": "CC-BY-NC-4.0", "non_commercial": True}
    real = ws.stage("data", {"seed": 42, "data_source": "hub"})
    write_json(real.dir / "build" / "mix" / "manifest.json", {"sources": {"safe": source}})
    real.finish()
    header, body = read(ws, "data")
    assert header["license"] == "cc-by-nc-4.0"
    assert "| safe | a/b | CC-BY-NC-4.0 |" in body
    assert "Not for commercial use, because of safe." in body


def test_a_card_leaves_the_stage_finished(ws):
    before = ws.load("sft").fingerprint
    cards.write_card(ws.load("sft"))
    assert ws.load("sft").fingerprint == before
    assert not (ws.path / "sft" / "model" / "README.md").exists()


def test_a_stage_without_a_model_is_refused(ws):
    ws.stage("rewards", {}).finish()
    with pytest.raises(GuideError, match="holds no model"):
        cards.write_card(ws.load("rewards"))


class Hub:
    """Stands in for the Hub's client and remembers what it was given."""

    def __init__(self):
        self.files = {}

    def create_repo(self, repository, **options):
        assert options["private"]
        return f"https://hub/{repository}"

    def upload_folder(self, **options):
        self.folder = options

    def upload_file(self, path_or_fileobj, path_in_repo, **_):
        self.files[path_in_repo] = path_or_fileobj.decode()


def test_push_uploads_on_request_only(ws, monkeypatch, capsys):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert cli.main(["card", str(ws.path), "offline_dpo"]) == 0
    assert hub.files == {}
    assert cli.main(["card", str(ws.path), "offline_dpo", "--push", "me/policy"]) == 0
    assert "https://hub/me/policy" in capsys.readouterr().out
    assert "hf_secret" not in str(hub.files)
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] is None
    assert "adapter_config.json" in hub.folder["ignore_patterns"]


def test_push_without_a_login_says_so(ws, monkeypatch, capsys):
    def refuse(*_, **__):
        raise LocalTokenNotFoundError("no token")

    monkeypatch.setattr(Hub, "create_repo", refuse)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert cli.main(["card", str(ws.path), "sft", "--push", "me/policy"]) == 1
    assert "hf auth login" in capsys.readouterr().err
