"""What every notebook calls first: settings, run folder, seeds, quiet libraries, figure style.

settings, ws = start(profile, run_dir, seed=seed)
"""

import logging
import os
import random
import sys
import warnings
from pathlib import Path
from typing import Any

from IPython.display import Markdown

from .figures import use_style
from .files import read_json
from .machine import keep_freed_memory, usable_cores
from .offline import block_if_asked
from .profiles import PROFILES, Profile, load_profile, require_available_data
from .workspace import Workspace, open_run, shown, versions

TIMINGS = Path(__file__).with_name("timings.json")

NOISY = (
    "accelerate",
    "datasets",
    "huggingface_hub",
    "peft",
    "torch",
    "tqdm",
    "transformers",
    "trl",
)


def start(
    profile: str | None = None, run_dir: str | Path | None = None, **overrides: Any
) -> tuple[Profile, Workspace]:
    """Prepare a notebook: parameters, run folder, seeds, threads, memory, quiet libraries, style.

    Prints one line with what the results depend on. Raises `ParameterError` for a wrong
    parameter and `RunMismatch` for a run folder that belongs to other settings.
    """
    settings = load_profile(profile, **overrides)
    if "data_source" in overrides:  # this notebook reads raw data; the others read stored stages
        settings = require_available_data(settings)
    workspace = open_run(settings, run_dir)
    stay_offline(settings.allow_download)
    quieten()
    set_seeds(settings.seed)
    keep_freed_memory()
    use_style()
    print(_summary(settings, workspace))
    return settings, workspace


def stay_offline(allow_download: bool) -> None:
    """Tell the Hub's client not to use the network, unless downloads are allowed."""
    if not allow_download:
        os.environ["HF_HUB_OFFLINE"] = "1"
        # The client reads the variable once, when it is imported.
        for name, flag in (
            ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
            ("datasets.config", "HF_HUB_OFFLINE"),
        ):
            if name in sys.modules:
                setattr(sys.modules[name], flag, True)
    block_if_asked()


def quieten() -> None:
    """Keep library chatter (progress bars, warnings, adverts) out of the notebook's outputs."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=rf"{name}(\.|$)")
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.simplefilter("ignore", category)
    # tqdm warns where ipywidgets is missing; the text bars used here do not need it.
    warnings.filterwarnings("ignore", message="IProgress not found")
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def set_seeds(seed: int) -> None:
    """Seed Python, NumPy and torch, and use as many threads as this process has cores."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002 (the trainers draw from the global state)
    torch.manual_seed(seed)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(usable_cores())


def _summary(settings: Profile, workspace: Workspace) -> str:
    found = versions()
    libraries = ", ".join(f"{name} {found[name]}" for name in ("torch", "transformers", "trl"))
    return (
        f"profile {settings.name}, seed {settings.seed}, run folder {shown(workspace.path)}\n"
        f"Python {found['python']}, {libraries}, {usable_cores()} cores"
    )


def time_box(notebook: str) -> Markdown:
    """Time, memory and disk of one notebook (by its stem) for each profile, as measured.

    The numbers are stored by `rlhf-guide publish`; a profile without any says so.
    """
    return Markdown(time_table(notebook, read_timings()))


def read_timings(path: Path = TIMINGS) -> dict[str, Any]:
    """The stored measurements: profile name to notebook stem to seconds, peak_gib, disk_gib."""
    return read_json(path) if path.exists() else {}


def time_table(notebook: str, timings: dict[str, Any]) -> str:
    """`time_box` as Markdown text."""
    lines = ["| profile | time | memory | disk |", "|---|---|---|---|"]
    for profile in PROFILES:
        found = timings.get(profile, {}).get(notebook)
        if found is None:
            lines.append(f"| `{profile}` | not measured yet | | |")
            continue
        lines.append(
            f"| `{profile}` | {in_words(found['seconds'])} | {found['peak_gib']:.1f} GiB "
            f"| {found['disk_gib']:.1f} GiB |"
        )
    return "\n".join(lines)


def in_words(seconds: float) -> str:
    """A duration for human readers: `45 s`, `12 min`."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
