"""Draw the stored answers of the miniature's preference pairs from a language model.

    python -m rlhf_guide.stored_samples runs/cpu/sft/model --name SmolLM2-135M-Instruct+sft \\
        --out samples.jsonl

For every prompt of the two preference splits: half the answers at temperature 1.0 and half at
0.7, as in the online loop. `data_prep/embedded/samples.jsonl` was made by this command from the
SFT policy of a `cpu` run. Sampling depends on the processor in the last bits, so a new run gives
other answers of the same kind.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from data_prep.embedded import load_prompts
from rlhf_guide.generation import generate
from rlhf_guide.profiles import load_profile

SPLITS = ("preference_train", "preference_heldout")
TEMPERATURES = (1.0, 1.0, 0.7, 0.7)
STORED = ("text", "finish_reason", "temperature", "n_tokens")


def draw(model: Path, name: str, seed: int = 1) -> list[dict]:
    """Return one row a prompt: `prompt_id`, `model` and `responses`.

    `model` is a folder with a model and a tokenizer that has a chat template.
    """
    prompts = [prompt for split in SPLITS for prompt in load_prompts(split)]
    settings = load_profile("cpu").generation
    with TemporaryDirectory() as folder:
        path = Path(folder) / "generations.jsonl"
        rows = generate(model, prompts, settings, TEMPERATURES, seed, path, torch.float32)
    return [
        {
            "prompt_id": row["prompt_id"],
            "model": name,
            "responses": [{key: answer[key] for key in STORED} for answer in row["responses"]],
        }
        for row in rows
    ]


def main() -> None:
    """Write the rows, one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder with a model and its tokenizer")
    parser.add_argument("--name", required=True, help="name stored with the answers")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    lines = [json.dumps(row, ensure_ascii=False) for row in draw(arguments.model, arguments.name)]
    arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
