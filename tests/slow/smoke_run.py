"""A smoke run of the whole course as a process that can be killed, and what it left behind."""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
# Numbers that measure this run and not its result.
TIMING = re.compile(r"(^|_)(seconds|per_second|runtime)$|^peak_gib$")


def start(folder: Path, only: str | None = None, more: Sequence[str] = ()) -> subprocess.Popen:
    """Start `rlhf-guide run` at the smoke profile; its lines of progress come through stdout."""
    line = [sys.executable, "-u", "-m", "rlhf_guide.cli", "run", "--profile", "smoke"]
    line += ["--no-network", "--run-dir", str(folder), *(["--only", only] if only else []), *more]
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(folder: Path, only: str | None = None) -> str:
    """Run to the end and return what was printed; fails with it where the run does."""
    process = start(folder, only)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    return printed


def kill(process: subprocess.Popen) -> None:
    """`kill -9` for the runner, its kernels and their children, as when the machine goes down."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid)
        for member in (family, *family.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()


def artefacts(folder: Path) -> dict[str, str]:
    """A hash of every output and of the metrics of every finished stage, timing fields aside."""
    found = {}
    for path in sorted(folder.rglob("manifest.json")):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        stage = manifest["stage"]
        found[f"{stage}: metrics"] = _hash(_without_timing(manifest["metrics"]))
        for name in manifest["outputs"]:
            found[f"{stage}/{name}"] = _content(path.parent / name)
    return found


def _content(path: Path) -> str:
    if path.suffix == ".json":
        return _hash(_without_timing(json.loads(path.read_text(encoding="utf-8"))))
    if path.suffix == ".jsonl":
        rows = path.read_text(encoding="utf-8").splitlines()
        return _hash([_without_timing(json.loads(row)) for row in rows])
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _without_timing(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not (TIMING.search(k) and type(v) is float)}
        return {name: _without_timing(item) for name, item in kept.items()}
    return [_without_timing(item) for item in value] if isinstance(value, list) else value


def changed(first: dict[str, str], second: dict[str, str]) -> list[str]:
    """The artefacts that two runs do not share, byte for byte."""
    return sorted(name for name in first | second if first.get(name) != second.get(name))
