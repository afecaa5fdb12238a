"""A Llama-3 base model, as profile `paper` meets it, without its weights.

Its own files need an accepted licence, so they are rebuilt: the published configuration with a few
small layers, and a tokenizer with Llama-3's special tokens in their order, its rule for splitting
text and its BOS in front of everything, over SmolLM2's vocabulary. As published, the base has no
chat template, no padding token, and the end of a document as eos.
"""

import json
from dataclasses import replace

import pytest
import torch
from test_plan import LLAMA3 as PUBLISHED
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_guide import dpo, reward_model, sft
from rlhf_guide.chat import LLAMA3, encode_prompt, stop_token_ids
from rlhf_guide.generation import generate
from rlhf_guide.models import load_tokenizer, resolve_model, save_model
from rlhf_guide.profiles import load_profile

BOS, END, TURN_END = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
SPARE = [f"<|reserved_special_token_{number}|>" for number in range(12)]
# In the order of the published ids 128000 to 128016; SmolLM2's special tokens are its first 17.
SPECIAL = [BOS, END, *SPARE[:4], "<|start_header_id|>", "<|end_header_id|>", SPARE[4], TURN_END]
SPECIAL += SPARE[5:12]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SMALL = {
    "vocab_size": 49_152,
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": SPECIAL.index(BOS),
    "eos_token_id": SPECIAL.index(END),
}
QUESTION = {"role": "user", "content": "What is 2 + 2?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("It is 4.", "No idea"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of the base model."""
    folder = tmp_path_factory.mktemp("llama3")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**PUBLISHED.to_dict(), **SMALL})).save_pretrained(folder)
    fast = published_layout(resolve_model("random-tiny-llama") / "tokenizer.json")
    PreTrainedTokenizerFast(tokenizer_object=fast, bos_token=BOS, eos_token=END).save_pretrained(
        folder
    )
    return folder


def published_layout(file):
    """SmolLM2's tokenizer with Llama-3's special tokens, splitting rule and BOS."""
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    for entry in content["added_tokens"]:
        vocabulary[SPECIAL[entry["id"]]] = vocabulary.pop(entry["content"])
        entry["content"] = SPECIAL[entry["id"]]
    fast = Tokenizer.from_str(json.dumps(content))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, SPECIAL.index(BOS))]
    )
    return fast


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


def test_the_base_gets_template_padding_and_both_stops(base, tokenizer, tmp_path):
    bare = PreTrainedTokenizerFast.from_pretrained(base)
    assert (bare.chat_template, bare.pad_token, bare.eos_token) == (None, None, END)
    assert bare("Hi")["input_ids"][0] == bare.bos_token_id, "BOS comes twice if this is templated"
    tokenizer.save_pretrained(tmp_path)
    for found in (tokenizer, load_tokenizer(tmp_path)):
        assert found.chat_template == LLAMA3
        assert found.pad_token == SPARE[0]
        assert found.convert_ids_to_tokens(stop_token_ids(found)) == [END, TURN_END]


def test_all_three_trainers_read_one_bos_and_learn_the_end_of_the_turn(tokenizer):
    profile = load_profile("paper")
    pair = {"prompt_id": "p", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}
    rows, counts = sft.build_dataset(tokenizer, [{"messages": pair["chosen"]}], profile.sft)
    assert counts["demonstrations"] == 1
    learnt = [label for label in rows[0]["labels"] if label != sft.IGNORED]
    assert tokenizer.decode(learnt) == GOOD["content"] + TURN_END
    (scored,), _ = reward_model.encode_pairs(tokenizer, [pair], profile.reward_model.max_length)
    (compared,), _ = dpo.encode_pairs(tokenizer, [pair], profile.dpo.max_length)
    whole = scored["chosen_ids"]
    assert rows[0]["input_ids"] == whole == compared["prompt_ids"] + compared["chosen_ids"]
    assert tokenizer.decode(whole) == (
        f"{BOS}<|start_header_id|>user<|end_header_id|>\n\n{QUESTION['content']}{TURN_END}"
        f"<|start_header_id|>assistant<|end_header_id|>\n\n{GOOD['content']}{TURN_END}"
    )


@pytest.mark.parametrize("end", [TURN_END, END])
def test_either_end_stops_an_answer_of_the_saved_policy(base, tokenizer, tmp_path, end):
    """The policy's first word is made to be the end; it is saved as SFT saves it."""
    model = LlamaForCausalLM.from_pretrained(base)
    prompt = torch.tensor([encode_prompt(tokenizer, [QUESTION])])
    with torch.no_grad():
        state = model.model(prompt).last_hidden_state[0, -1]
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(end)] = 100 * state
    save_model(model, tokenizer, tmp_path / "policy")
    # Other programs read the saved configuration.
    assert model.generation_config.eos_token_id == stop_token_ids(tokenizer)
    (row,) = generate(
        tmp_path / "policy",
        [{"prompt_id": "p", "messages": [QUESTION]}],
        replace(load_profile("smoke").generation, max_new_tokens=4),
        [0.0],
        1,
        tmp_path / "answers.jsonl",
        "float32",
        progress=False,
    )
    (answer,) = row["responses"]
    assert (answer["finish_reason"], answer["n_tokens"], answer["text"]) == ("stop", 0, "")
