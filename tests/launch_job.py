"""Four stages of two small runs, as one job of any number of processes.

accelerate launch --config_file rlhf_guide/configs/ddp.yaml --num_processes 2 \
    tests/launch_job.py FOLDER
"""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from rlhf_guide import dpo, online_stages, reward_model, sft
from rlhf_guide.launch import main
from rlhf_guide.models import load_tokenizer, resolve_model
from rlhf_guide.profiles import load_profile
from rlhf_guide.training import is_main_process
from rlhf_guide.workspace import Stage, open_run, write_jsonl

# A stage's folder, program, section of the profile and numbers. Four examples a step, which divide
# the eight packed blocks and the twelve pairs. Each trains other weights: all of a model whose
# head is not its embedding, adapters and a new head, all of a model that ties head and embedding,
# and adapters that stay beside their model.
BATCH = {"batch_size": 4, "per_device_batch_size": 1}
STAGES = {
    "first/sft": (
        partial(main, "sft", sft.open_stage, sft.train_stage),
        "sft",
        {"lora_rank": 0, "max_length": 48, "epochs": 2, "learning_rate": 1e-3, "max_samples": 0},
    ),
    "first/reward_model": (
        partial(main, "reward_model", reward_model.open_stage, reward_model.train_stage),
        "reward_model",
        {"lora_rank": 4, "learning_rate": 1e-2, "max_samples": 12},
    ),
    "second/offline_dpo": (
        partial(main, "dpo", dpo.open_stage, dpo.train_stage),
        "dpo",
        {"lora_rank": 0, "learning_rate": 1e-3, "max_samples": 12},
    ),
    "second/online/iteration_1/dpo": (
        partial(online_stages.launch_iteration, 1),
        "dpo",
        {"lora_rank": 4, "learning_rate": 1e-2},
    ),
}


def member(environment: dict[str, str], folder: Path) -> None:
    """One process of the job, started with what a launcher would set for it."""
    os.environ.update(environment)
    run(folder)


def lose_one(environment: dict[str, str], said: Path) -> None:
    """One process of a job whose second process is killed while the first waits for it.

    What the first prints as an error goes to the file `said`: a fork server's is its own.
    """
    os.environ.update(environment)

    def train_stage(_stage: Stage) -> dict:
        if not is_main_process():
            os.kill(os.getpid(), signal.SIGKILL)
        torch.distributed.barrier()
        return {"metrics": {}}

    with tempfile.TemporaryDirectory() as folder:
        options = ["--run-dir", folder, "--set", "sft_batch_size=2"]
        with said.open("a", encoding="utf-8") as file, contextlib.redirect_stderr(file):
            main("sft", lambda ws: ws.stage("sft", {}), train_stage, options)


def run(folder: Path) -> None:
    """Train the stages in this process and those of its group."""
    for place, (program, section, numbers) in STAGES.items():
        changes = [f"{section}_{key}={value}" for key, value in {**BATCH, **numbers}.items()]
        options = ["--profile", "smoke", "--run-dir", str(folder / place.split("/")[0])]
        options += [f"--set=base_model={folder / 'untied'}", *(f"--set={each}" for each in changes)]
        program(options)


def prepare(folder: Path) -> None:
    """Make the two run folders with what the stages read, and a model with a head of its own."""
    tied = resolve_model("random-tiny-llama")
    set_seed(1)
    config = LlamaConfig.from_pretrained(tied, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder / "untied")
    load_tokenizer(tied).save_pretrained(folder / "untied")
    for name in ("first", "second"):
        ws = open_run(load_profile("smoke"), folder / name)
        data = ws.stage("data", {})
        write_jsonl(data.dir / "sft.jsonl", [{"messages": talk(i)} for i in range(16)])
        write_jsonl(data.dir / "preference_train.jsonl", [pair(i) for i in range(12)])
        data.finish()
    reference = ws.stage("sft", {}, ["data"])
    shutil.copytree(tied, reference.dir / "model")
    reference.finish()
    drawn = ws.stage("online/iteration_1/annotation", {})
    write_jsonl(drawn.dir / "annotated.jsonl", [annotated(i) for i in range(12)])
    drawn.finish()


def talk(number: int, answer: str = "yes") -> list[dict[str, str]]:
    """A question, and an answer whose length depends on its number."""
    words = " ".join([answer] * (1 + number % 6))
    return [
        {"role": "user", "content": f"Question {number}?"},
        {"role": "assistant", "content": f"{number} {words}"},
    ]


def pair(number: int) -> dict:
    """Two answers to one question."""
    sides = {"chosen": talk(number), "rejected": talk(number, "no")}
    return {"prompt_id": f"p{number}", "source": "test", **sides}


def annotated(number: int) -> dict:
    """A prompt with two answers and their rewards."""
    question, good = talk(number)
    bad = talk(number, "no")[-1]
    answers = [
        {"text": answer["content"], "finish_reason": "stop", "temperature": 1.0, "seed": place}
        for place, answer in enumerate((good, bad))
    ]
    return {
        "prompt_id": f"p{number}",
        "messages": [question],
        "source": "test",
        "responses": [{**answer, "n_tokens": 4} for answer in answers],
        "rewards": [1.0, 0.0],
    }


if __name__ == "__main__":
    run(Path(sys.argv[1]))
