"""Run the slow tier and keep what it found, with date, machine and versions.

    python tests/slow/record.py                        # all of it, hours
    python tests/slow/record.py determinism            # one file

Writes tests/benchmarks/results/slow_<name>.json, failures included. To prove the machinery in
minutes: RLHF_GUIDE_SLOW_ONLY=01 (notebooks), RLHF_GUIDE_SLOW_KILLS=2, RLHF_GUIDE_SLOW_ROUNDS=2 and
RLHF_GUIDE_SLOW_FILES="tests/test_oracle.py"; what was set is recorded.
"""

import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from datetime import date
from pathlib import Path

from rlhf_guide.machine import usable_cores
from rlhf_guide.workspace import versions

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "benchmarks" / "results"
NAMES = sorted(file.stem.removeprefix("test_") for file in HERE.glob("test_*.py"))


def main(names: list[str]) -> None:
    """Run each named file's tests and store counts, seconds and what they recorded."""
    if unknown := set(names) - set(NAMES):
        sys.exit(f"unknown test {', '.join(sorted(unknown))}: there are {', '.join(NAMES)}.")
    codes = []
    for name in names or NAMES:
        code, tests = run(name)
        codes.append(code)
        found = {
            "date": date.today().isoformat(),
            "cores": usable_cores(),
            "versions": versions(),
            "settings": {k: v for k, v in os.environ.items() if k.startswith("RLHF_GUIDE_SLOW_")},
            "result": "passed" if code == 0 else "failed",
            "tests": tests,
        }
        file = RESULTS / f"slow_{name}.json"
        file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(f"{name}: {found['result']}")
    sys.exit(any(codes))


def run(name: str) -> tuple[int, list[dict]]:
    """The tests of one file: pytest's exit code, and each test's outcome."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        file = str(HERE / f"test_{name}.py")
        line = [sys.executable, "-m", "pytest", file, "-m", "slow", f"--junitxml={report}"]
        line += ["-n", str(usable_cores()), "--dist", "worksteal"]  # each computes on one thread
        code = subprocess.run(line, cwd=HERE.parents[1]).returncode
        return code, [_row(case) for case in ElementTree.parse(report).iter("testcase")]


def _row(case: ElementTree.Element) -> dict:
    """Name, outcome and seconds of a test, and what it recorded."""
    outcomes = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
    row = {
        "test": case.get("name"),
        "outcome": outcomes[0] if outcomes else "passed",
        "seconds": round(float(case.get("time")), 1),
    }
    return row | {entry.get("name"): int(entry.get("value")) for entry in case.iter("property")}


if __name__ == "__main__":
    main(sys.argv[1:])
