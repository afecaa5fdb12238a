"""Run benchmarks and keep what they found, with the machine and the versions it was found on.

    python tests/benchmarks/record.py                  # all of them, some minutes each
    python tests/benchmarks/record.py packing          # one

Writes `results/<name>.json` beside this file. Nothing else should run meanwhile.
"""

import json
import subprocess
import sys
from datetime import date
from pathlib import Path

from rlhf_guide.machine import usable_cores
from rlhf_guide.models import choose_device
from rlhf_guide.workspace import versions

HERE = Path(__file__).resolve().parent
NAMES = sorted(file.stem for file in HERE.glob("*.py") if file != Path(__file__).resolve())


def main(names: list[str]) -> None:
    """Run each named benchmark in a process of its own and store its JSON."""
    unknown = set(names) - set(NAMES)
    if unknown:
        sys.exit(f"unknown benchmark {', '.join(sorted(unknown))}: there are {', '.join(NAMES)}.")
    for name in names or NAMES:
        command = [sys.executable, str(HERE / f"{name}.py"), "--json"]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = {
            "date": date.today().isoformat(),
            "device": choose_device()[2],
            "cores": usable_cores(),
            "versions": versions(),
            "result": json.loads(output.splitlines()[-1]),
        }
        file = HERE / "results" / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(f"{name}: {json.dumps(found['result'])}")


if __name__ == "__main__":
    main(sys.argv[1:])
