"""The run folder: stages that finish atomically, know their inputs, and are never done twice.

    settings = load_profile("cpu")
    ws = open_run(settings)
    stage = ws.stage("sft", config=settings.sft, inputs=["data"])
    if not stage.done:
        ...                         # write files into stage.dir
        stage.finish({"loss": 1.2})
    stage.metrics["loss"]

A stage is done when its manifest says so, its settings and the fingerprints of its inputs are the
ones asked for, and its files are all there. Anything else is redone: partial work with the same
settings stays in the folder (so a killed generation continues), work with other settings goes.
"""

import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from . import __version__
from .errors import MissingStage, RunMismatch
from .files import (
    append_jsonl,
    canonical_hash,
    file_hash,
    plain,
    plain_disk_errors,
    project_root,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
)
from .profiles import Profile

__all__ = [
    "STAGE_NOTEBOOK",
    "Stage",
    "Workspace",
    "append_jsonl",
    "open_run",
    "read_json",
    "read_jsonl",
    "write_json",
    "write_jsonl",
]

RUNS_VARIABLE = "RLHF_GUIDE_RUNS"
MANIFEST = "manifest.json"
PENDING = "pending.json"

# The notebook that makes each stage; the part before the first slash decides.
STAGE_NOTEBOOK = {
    "tour": "00_tour",
    "data": "01_preference_data",
    "sft": "02_sft_with_packing",
    "reward_model": "03_reward_model",
    "preference_model": "04_preference_model",
    "rewards": "05_what_rewards_measure",
    "offline_dpo": "06_offline_dpo",
    "evaluation_answers_sft": "06_offline_dpo",
    "evaluation_answers_offline_dpo": "06_offline_dpo",
    "online": "07_online_dpo",
    "evaluation_answers_online_dpo": "07_online_dpo",
    "evaluation": "08_evaluation",
    "theory": "09_theory",
    "gallery": "11_failure_gallery",
    "ablations": "12_ablations",
}

LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets")


def default_run_dir(profile_name: str) -> Path:
    """`runs/<profile>` beside the notebooks; RLHF_GUIDE_RUNS names another parent folder."""
    parent = os.environ.get(RUNS_VARIABLE)
    return (
        Path(parent).expanduser() / profile_name
        if parent
        else project_root() / "runs" / profile_name
    )


def open_run(profile: Profile, run_dir: str | Path | None = None) -> "Workspace":
    """Open or start a run folder.

    Raises `RunMismatch` when the folder belongs to another profile, seed or package version, and
    `GuideError` when it cannot be written.
    """
    path = Path(run_dir).expanduser() if run_dir else default_run_dir(profile.name)
    path = path if path.is_absolute() else project_root() / path
    with plain_disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    wanted = {"profile": profile.name, "seed": profile.seed, "version": __version__}
    if (path / "run.json").exists():
        _check_same_run(path, read_json(path / "run.json"), wanted)
    else:
        write_json(path / "run.json", {**wanted, "created": _now()})
    return Workspace(path, profile)


def _check_same_run(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for key, value in wanted.items():
        if found.get(key) != value:
            raise RunMismatch(
                f"the run folder {shown(path)} was made with {key} {found.get(key)!r}, this run "
                f"has {key} {value!r}. Choose another folder (run_dir in a notebook, --run-dir on "
                f"the command line), or delete {shown(path)} to start afresh."
            )


def shown(path: Path) -> str:
    """A path as the reader typed it: relative to the project when it lies inside."""
    root = project_root()
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class Workspace:
    """One run's folder. `path` is the folder, `profile` the settings it belongs to."""

    def __init__(self, path: Path, profile: Profile) -> None:
        self.path = path
        self.profile = profile

    def stage(self, name: str, config: Any, inputs: Sequence[str] = ()) -> "Stage":
        """Begin or reopen a stage; `config` is everything that its result depends on.

        Raises `MissingStage` when an input has not finished.
        """
        fingerprints = {other: self.load(other).fingerprint for other in inputs}
        return Stage(self, name, plain(config), fingerprints)._open()

    def load(self, name: str) -> "Stage":
        """A finished stage, whatever its settings; raises `MissingStage` otherwise."""
        stage = Stage(self, name)
        stage.manifest = stage._read_manifest()
        if stage.manifest is None:
            raise MissingStage(_missing(name, self.path, "has not finished"))
        if changed := stage._changed_file():
            raise MissingStage(_missing(name, self.path, f"has lost or changed {changed}"))
        return stage

    def finished(self) -> Iterator["Stage"]:
        """Every finished stage of the run, by name."""
        for manifest in sorted(self.path.rglob(MANIFEST)):
            stage = Stage(self, manifest.parent.relative_to(self.path).as_posix())
            stage.manifest = stage._read_manifest()
            if stage.manifest:
                yield stage


def _missing(name: str, run: Path, what: str) -> str:
    notebook = STAGE_NOTEBOOK.get(name.split("/")[0])
    message = f"stage {name!r} {what} in {shown(run)}"
    if notebook is None:
        return f"{message}."
    return (
        f"{message}; run notebooks/{notebook}.ipynb first "
        f"(or `rlhf-guide run --only {notebook[:2]}`) with the same profile and run_dir."
    )


class Stage:
    """One step of a run and its folder; made by `Workspace.stage` and `Workspace.load`.

    `dir` is the folder, `done` whether nothing is left to do, `metrics` what `finish` was given.
    """

    def __init__(
        self,
        workspace: Workspace,
        name: str,
        config: Any = None,
        inputs: Mapping[str, str] | None = None,
    ) -> None:
        self.workspace = workspace
        self.name = name
        self.dir = workspace.path / name
        self.config = config
        self.inputs = dict(inputs or {})
        self.manifest: dict[str, Any] | None = None
        self._began = time.perf_counter()

    @property
    def done(self) -> bool:
        """Whether the stage has finished with these settings and inputs."""
        return self.manifest is not None

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics given to `finish`; empty before."""
        return self.manifest["metrics"] if self.manifest else {}

    @property
    def fingerprint(self) -> str:
        """One hash over settings, inputs and outputs: what later stages build on."""
        parts = [self.manifest[key] for key in ("config_hash", "inputs", "outputs")]
        return canonical_hash(parts)

    def finish(
        self, metrics: Mapping[str, Any] | None = None, files: Sequence[str] | None = None
    ) -> "Stage":
        """Write the manifest: from now on the stage is done.

        `files` (relative to the folder) are hashed as its outputs, by default all of them.
        """
        names = files if files is not None else [self._relative(path) for path in self._own_files()]
        paths = {str(name): self.dir / name for name in names}
        device, dtype = _device_and_dtype(self.workspace.profile.dtype)
        manifest = {
            "stage": self.name,
            "status": "finished",
            "config": self.config,
            "config_hash": canonical_hash(self.config),
            "inputs": self.inputs,
            "outputs": {name: file_hash(path) for name, path in paths.items()},
            "sizes": {name: path.stat().st_size for name, path in paths.items()},
            "versions": versions(),
            "device": device,
            "dtype": dtype,
            "seconds": round(time.perf_counter() - self._began, 2),
            "peak_gib": peak_gib(),
            "metrics": plain(metrics or {}),
            "finished_at": _now(),
        }
        write_json(self.dir / MANIFEST, manifest)
        (self.dir / PENDING).unlink(missing_ok=True)
        self.manifest = manifest
        return self

    def _open(self) -> "Stage":
        """Settle whether the stage is done, may continue, or has to start over."""
        key = {"config_hash": canonical_hash(self.config), "inputs": self.inputs}
        found = self._read_manifest()
        if found and all(found[part] == key[part] for part in key):
            if not (changed := self._changed_file(found)):
                self.manifest = found
                return self
            self._start_over(f"{changed} is missing or changed")
        elif found:
            self._start_over(_difference(found, self.config))
        elif self._own_files() and self._read(PENDING) != key:
            self._start_over("its unfinished work has other settings")
        write_json(self.dir / PENDING, key)
        return self

    def _start_over(self, why: str) -> None:
        print(f"Stage {self.name!r}: {why}; doing it again.")
        with plain_disk_errors(self.dir):
            (self.dir / MANIFEST).unlink(missing_ok=True)  # first, so that a kill leaves no lie
            for path in self._own_files():
                path.unlink()
            for folder in sorted(self.dir.glob("*/"), reverse=True):
                if not any(part.is_file() for part in folder.rglob("*")):
                    shutil.rmtree(folder)

    def _own_files(self) -> list[Path]:
        """The stage's files, sorted; a subfolder with a manifest is another stage's."""
        found = []
        for folder, folders, files in os.walk(self.dir):
            here = Path(folder)
            folders[:] = [sub for sub in folders if not _is_stage(here / sub)]
            found += [here / file for file in files if file not in (MANIFEST, PENDING)]
        return sorted(found)

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.dir).as_posix()

    def _changed_file(self, manifest: Mapping[str, Any] | None = None) -> str | None:
        """The first output that is gone or has another size (hashing gigabytes costs minutes)."""
        for name, size in (manifest or self.manifest)["sizes"].items():
            path = self.dir / name
            if not path.exists() or path.stat().st_size != size:
                return f"{self.name}/{name}"
        return None

    def _read(self, name: str) -> Any:
        path = self.dir / name
        return read_json(path) if path.exists() else None

    def _read_manifest(self) -> dict[str, Any] | None:
        found = self._read(MANIFEST)
        return found if found and found.get("status") == "finished" else None


def _is_stage(folder: Path) -> bool:
    return (folder / MANIFEST).exists() or (folder / PENDING).exists()


def _difference(found: Mapping[str, Any], config: Any) -> str:
    """What changed since a stage finished, in a few words."""
    old = found["config"]
    if old == config:
        return "its inputs have changed"
    if isinstance(old, dict) and isinstance(config, dict):
        names = sorted(key for key in old.keys() | config.keys() if old.get(key) != config.get(key))
        return f"its settings have changed ({', '.join(names)})"
    return "its settings have changed"


def versions() -> dict[str, str | None]:
    """Versions of Python, this package and the libraries that results depend on."""
    found: dict[str, str | None] = {"python": platform.python_version(), "rlhf_guide": __version__}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def peak_gib() -> float:
    """The largest resident memory of this process so far, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB on Linux
    return round(peak / unit, 2)


def _device_and_dtype(dtype: str) -> tuple[str, str]:
    """Device and data type of this process; a stage that never loaded torch ran on the CPU."""
    if "torch" not in sys.modules:
        return "cpu", dtype
    from .models import choose_device

    device, resolved, _ = choose_device(dtype)
    return str(device), str(resolved).removeprefix("torch.")
