"""Small notebooks that stand in for the course: real papermill, real stages, no torch."""

from pathlib import Path

import nbformat

PARAMETERS = 'profile = ""\nrun_dir = ""\nseed = None\nsft_learning_rate = None'

OPEN = """from rlhf_guide.profiles import load_profile
from rlhf_guide.workspace import append_jsonl, open_run, read_jsonl
settings = load_profile(profile, seed=seed, sft_learning_rate=sft_learning_rate)
ws = open_run(settings, run_dir)"""

DATA = """stage = ws.stage("data", {"rows": 3})
if not stage.done:
    append_jsonl(stage.dir / "rows.jsonl", [{"n": n} for n in range(3)])
    append_jsonl(ws.path / "log.jsonl", ["data"])
    stage.finish({"rows": 3})
print("three rows")"""

# Writes six rows; waits for ever after the third while a file named `wait` lies in the run folder.
SFT = """import time
stage = ws.stage("sft", settings.sft, inputs=["data"])
rows = stage.dir / "rows.jsonl"
if not stage.done:
    begun = len(read_jsonl(rows)) if rows.exists() else 0
    for n in range(begun, 6):
        append_jsonl(rows, [{"n": n}])
        append_jsonl(ws.path / "log.jsonl", [f"row {n}"])
        if n == 2 and (ws.path / "wait").exists():
            time.sleep(600)
    stage.finish({"utility_sft": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 100}, "loss": 1.0})"""

FIGURE = """import matplotlib.pyplot as plt
from rlhf_guide.figures import show
fig, ax = plt.subplots(figsize=(2, 1))
show(fig, alt="A flat line at 0.5 & <nothing> else")"""


def notebook(*cells: str, parameters: str = PARAMETERS) -> nbformat.NotebookNode:
    """A notebook with a parameters cell, then the cells given."""
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    rest = [nbformat.v4.new_code_cell(cell) for cell in cells]
    made = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("# A title"), first, *rest]
    )
    made.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}
    }
    return made


def write_course(folder: Path, extra: dict[str, nbformat.NotebookNode] | None = None) -> Path:
    """Two chained notebooks (and extra ones) in `folder/notebooks`; returns that folder."""
    target = folder / "notebooks"
    target.mkdir(parents=True)
    made = {
        "01_preference_data": notebook(OPEN, DATA),
        "02_sft_with_packing": notebook(OPEN, SFT),
    }
    for stem, content in {**made, **(extra or {})}.items():
        nbformat.write(content, target / f"{stem}.ipynb")
    return target
