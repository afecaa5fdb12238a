"""Write the outputs of a finished `cpu` run into `notebooks/`, where readers see them.

The notebook's metadata then holds the hash of its code cells, the profile, versions and time; a
fast test recomputes the hash, so that stale outputs are caught.

    rlhf-guide publish runs/cpu
"""

import copy
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from .course import read_record, settings_hash
from .errors import GuideError
from .files import write_json, write_text
from .notebook import TIMINGS, read_timings, time_table
from .profiles import load_profile
from .report import notebook_records, open_finished
from .sources import code_cells, list_notebooks, notebooks_dir, read_notebook, source_hash, tagged
from .workspace import Workspace, versions

__all__ = ["publish", "source_hash"]

LARGEST_KB = 300


def publish(
    run: Path | str, notebooks: Path | str | None = None, timings: Path = TIMINGS
) -> list[Path]:
    """Copy a run's outputs into the notebooks; returns those written.

    Raises `GuideError`, and writes nothing, when the run is not a `cpu` run with the profile's own
    numbers, a notebook has not finished, its code has changed since, or it would exceed 300 kB.
    """
    workspace = open_finished(run)
    folder = notebooks_dir(notebooks)
    measured = {**read_timings(timings), **timings_of(workspace)}
    ready: dict[Path, NotebookNode] = {}
    for path in list_notebooks(folder):
        source = read_notebook(path)
        _check_record(workspace, path, source)
        executed = read_notebook(workspace.path / "notebooks" / path.name)
        record = read_record(workspace, path.stem)
        ready[path] = with_outputs(source, executed, _stamp(record), folder.parent)
        _renew_time_boxes(ready[path], path.stem, measured)
        _check_size(path, ready[path])
    for path, notebook in ready.items():
        write_text(path, nbformat.writes(notebook).rstrip("\n") + "\n")
    write_json(timings, measured)
    return list(ready)


def record_timings(run: Path | str, timings: Path = TIMINGS) -> Path:
    """Store a run's times, of any profile, for the boxes at the top of the notebooks."""
    workspace = open_finished(run)
    write_json(timings, {**read_timings(timings), **timings_of(workspace)})
    return timings


def timings_of(workspace: Workspace) -> dict[str, Any]:
    """Seconds, memory and disk of each finished notebook of a run, under its profile's name."""
    names = ("seconds", "peak_gib", "disk_gib")
    rows = {
        stem: {name: record[name] for name in names}
        for stem, record in notebook_records(workspace).items()
    }
    return {workspace.profile.name: rows}


def _check_record(workspace: Workspace, path: Path, source: NotebookNode) -> None:
    """Refuse outputs that are not those of this notebook at the `cpu` profile."""
    again = "; run `rlhf-guide run --profile cpu` and publish that."
    record = read_record(workspace, path.stem)
    if workspace.profile.name != "cpu":
        raise GuideError(f"this is a run of profile {workspace.profile.name}, not cpu{again}")
    if record is None or record["status"] != "ok":
        raise GuideError(f"{path.name} has not finished in this run{again}")
    if record["source_hash"] != source_hash(source):
        raise GuideError(f"the code of {path.name} has changed since this run{again}")
    own = settings_hash(load_profile("cpu"))
    if record["parameters"] != {"profile": "cpu"} or record["settings_hash"] != own:
        raise GuideError(f"{path.name} ran with other numbers than profile cpu has now{again}")


def _stamp(record: dict[str, Any]) -> dict[str, Any]:
    """What the notebook's metadata says of its outputs."""
    return {
        "source_hash": record["source_hash"],
        "profile": "cpu",
        "versions": versions(),
        "seconds": record["seconds"],
    }


def with_outputs(
    source: NotebookNode, executed: NotebookNode, stamp: dict[str, Any], root: Path
) -> NotebookNode:
    """The source notebook with the executed one's outputs, cleaned metadata and the stamp.

    Machine-dependent paths below `root` or the home folder are shortened.
    """
    result = copy.deepcopy(source)
    for count, (cell, done) in enumerate(
        zip(code_cells(result), code_cells(executed), strict=True), 1
    ):
        cell.outputs = [_clean_output(output, root) for output in done.outputs]
        cell.execution_count = count
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
    result.cells = [cell for cell in result.cells if not tagged(cell, "injected-parameters")]
    for cell in result.cells:
        cell.metadata = _clean_metadata(cell)
    result.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "rlhf_guide": stamp,
        }
    )
    return result


def _clean_output(output: NotebookNode, root: Path) -> NotebookNode:
    output = copy.deepcopy(output)
    if "text" in output:
        output.text = _short_paths(output.text, root)
    for media, data in output.get("data", {}).items():
        if media.startswith("text/") and isinstance(data, str):
            output.data[media] = _short_paths(data, root)
    return output


def _short_paths(text: str, root: Path) -> str:
    return text.replace(f"{root}/", "").replace(f"{Path.home()}/", "~/")


def _clean_metadata(cell: NotebookNode) -> NotebookNode:
    """Keep a cell's tags; carry a figure's alternative text to where the book looks for it."""
    kept = {name: cell.metadata[name] for name in ("tags", "mystnb") if name in cell.metadata}
    for output in cell.get("outputs", []):
        if alt := output.get("metadata", {}).get("image/png", {}).get("alt"):
            kept["mystnb"] = {"image": {"alt": alt}}
            break
    return nbformat.from_dict(kept)


def _renew_time_boxes(notebook: NotebookNode, stem: str, measured: dict[str, Any]) -> None:
    """Show this run's own measurements in the box that was drawn before they existed."""
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if "time_box(" in cell.source and "text/markdown" in output.get("data", {}):
                output.data["text/markdown"] = time_table(stem, measured)


def _check_size(path: Path, notebook: NotebookNode) -> None:
    size = len(nbformat.writes(notebook).encode()) / 1000
    if size > LARGEST_KB:
        raise GuideError(
            f"{path.name} would be {size:.0f} kB with its outputs, more than {LARGEST_KB} kB: make "
            "its figures smaller or print less."
        )
