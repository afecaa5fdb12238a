"""Draw the stored answers of the miniature's preference pairs from a language model.

    python -m data_prep.make_samples MODEL_FOLDER --name SmolLM2-135M-Instruct --out samples.jsonl

For every prompt of the two preference splits: half the answers at temperature 1.0 and half at 0.7,
no top-p, at most 96 new tokens. `embedded/samples.jsonl` holds two such files one after the other:
four answers a prompt of SmolLM2-135M-Instruct and four of the same model after a short supervised
fine-tuning on the SFT split (`+sft`), so that the pairs cover what both models write. They were
drawn with the tokenizer as transformers converts it, without the digit splitting that
`rlhf_guide.embedded` restores. Sampling depends on the processor in the last bits, so a new run
gives other answers of the same kind.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from data_prep.embedded import load_prompts
from data_prep.schema import Prompt

SPLITS = ("preference_train", "preference_heldout")
TEMPERATURES = (1.0, 0.7)
MAX_NEW_TOKENS = 96


def sample(
    folder: Path, name: str, per_temperature: int = 2, batch_size: int = 74, seed: int = 0
) -> Iterator[dict]:
    """Yield one row a prompt: `prompt_id`, `model` and `responses`, prompts sorted by length.

    `folder` holds a model and a tokenizer with a chat template; `batch_size` counts prompts.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [prompt for split in SPLITS for prompt in load_prompts(split)]
    prompts.sort(key=lambda prompt: len(prompt["messages"][0]["content"]))
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        answers: dict[str, list[dict]] = {prompt["prompt_id"]: [] for prompt in batch}
        for temperature in TEMPERATURES:
            repeated = [prompt for prompt in batch for _ in range(per_temperature)]
            drawn = _answers(model, tokenizer, repeated, temperature)
            for prompt, answer in zip(repeated, drawn, strict=True):
                answers[prompt["prompt_id"]].append(answer)
        for prompt in batch:
            row = {"prompt_id": prompt["prompt_id"], "model": name}
            yield {**row, "responses": answers[prompt["prompt_id"]]}


def _answers(model, tokenizer, prompts: list[Prompt], temperature: float) -> list[dict]:
    inputs = tokenizer.apply_chat_template(
        [prompt["messages"] for prompt in prompts],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(
        **inputs,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        max_new_tokens=MAX_NEW_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
    )
    new_tokens = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [_answer(tokenizer, ids, temperature) for ids in new_tokens]


def _answer(tokenizer, ids: list[int], temperature: float) -> dict:
    finished = tokenizer.eos_token_id in ids
    kept = ids[: ids.index(tokenizer.eos_token_id)] if finished else ids
    return {
        "text": tokenizer.decode(kept),
        "finish_reason": "stop" if finished else "length",
        "temperature": temperature,
        "n_tokens": len(kept),
    }


def main() -> None:
    """Write the rows as they come, one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder with a model and its tokenizer")
    parser.add_argument("--name", required=True, help="name stored with the answers")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with arguments.out.open("w", encoding="utf-8") as file:
        for row in sample(arguments.model, arguments.name):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
