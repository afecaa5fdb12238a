"""The headless course: every notebook through papermill, in order, resumable.

    rlhf-guide run --profile cpu --only 02-05 --set dpo_beta=0.05

Parameters are checked before a kernel starts. Each notebook's executed copy and a small record go
to RUN/notebooks; a rerun skips a notebook whose record says ok, whose code and parameters are the
same, and whose stages are still done. This is the only module that calls papermill.
"""

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from .errors import GuideError, MissingStage, NotebookFailed, ParameterError
from .files import canonical_hash, plain_disk_errors, read_json, write_json
from .machine import peak_memory
from .offline import BLOCK_VARIABLE
from .parameters import FLAT_FIELDS, check_value, nearest
from .profiles import (
    DOWNLOAD_VARIABLE,
    Profile,
    load_profile,
    require_available_data,
    section_dict,
)
from .sources import (
    RUN_PARAMETERS,
    list_notebooks,
    notebook_parameters,
    notebooks_dir,
    read_notebook,
    select,
    source_hash,
)
from .workspace import STAGE_NOTEBOOK, Stage, Workspace, open_run, shown

Print = Callable[[str], None]

KERNEL_STARTS = 3


def run_course(
    profile: str | None = None,
    only: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    run_dir: str | Path | None = None,
    notebooks: str | Path | None = None,
    block_network: bool = False,
    say: Print = print,
    one_of_several: bool = False,
) -> Workspace:
    """Execute the notebooks of a profile and return its run folder.

    With `one_of_several`, an override that only notebooks outside `only` take is no error: another
    job runs those.

    Raises `ParameterError` before any kernel starts for a wrong parameter, `NotebookFailed` with
    the failing cell's error in plain words, and `GuideError` when the folder is in use.
    """
    overrides = dict(overrides or {})
    settings = require_available_data(load_profile(profile, **overrides))
    overrides.pop("allow_download", None)  # kernels learn of it through their environment
    folder = notebooks_dir(notebooks)
    every = list_notebooks(folder)
    chosen = select(every, only)
    parameters = split_parameters(chosen, overrides, every if one_of_several else ())
    workspace = open_run(settings, run_dir)
    with _only_runner(workspace), _kernel_environment(settings, block_network):
        for path in chosen:
            _run_or_skip(path, parameters[path.stem], workspace, say)
    return workspace


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """`["dpo_beta=0.05"]` as `{"dpo_beta": 0.05}`, each value read as its parameter's type.

    Raises `ParameterError` for a text without `=`, an unknown name, a wrong type or range.
    """
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise ParameterError(f"--set {text}: write name=value, for example dpo_beta=0.05.")
        if name not in FLAT_FIELDS:
            raise ParameterError(
                f"--set {text}: unknown parameter {name!r}.{nearest(name, FLAT_FIELDS)} "
                "`rlhf-guide parameters` lists all names."
            )
        values[name] = check_value(name, _typed(FLAT_FIELDS[name][1].type, value))
    return values


def _typed(kind: type, text: str) -> Any:
    """A command line's text as a value of a type, or unchanged where it is none."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return kind(text)
    except ValueError:
        return text


def split_parameters(
    notebooks: Sequence[Path], overrides: Mapping[str, Any], others: Sequence[Path] = ()
) -> dict[str, dict[str, Any]]:
    """The overrides that each notebook takes, by the notebook's stem.

    Raises `ParameterError` when a notebook declares a name that no profile knows, lacks one
    that all must take, or when none of the chosen notebooks, and of the `others`, takes an
    override.
    """
    declared = {path.stem: notebook_parameters(read_notebook(path)) for path in notebooks}
    for stem, names in declared.items():
        _check_declared(stem, names)
    elsewhere = [notebook_parameters(read_notebook(path)) for path in others]
    for name in overrides:
        if not any(name in names for names in (*declared.values(), *elsewhere)):
            raise ParameterError(
                f"{name}: none of the chosen notebooks takes it ({', '.join(declared)}); "
                "leave it out, or choose other notebooks with --only."
            )
    return {
        stem: {name: value for name, value in overrides.items() if name in names}
        for stem, names in declared.items()
    }


def _check_declared(stem: str, names: Sequence[str]) -> None:
    if missing := [name for name in RUN_PARAMETERS if name not in names]:
        raise ParameterError(
            f"{stem}.ipynb: its cell tagged `parameters` does not set {' and '.join(missing)}; "
            "add it there."
        )
    for name in names:
        if name not in FLAT_FIELDS and name not in RUN_PARAMETERS:
            raise ParameterError(
                f"{stem}.ipynb: its parameters cell sets {name!r}, which no profile has."
                f"{nearest(name, FLAT_FIELDS)}"
            )


@contextmanager
def _only_runner(workspace: Workspace) -> Iterator[None]:
    """Refuse a second runner in the same folder; the lock ends with the process, killed or not."""
    with plain_disk_errors(workspace.path), open(workspace.path / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise GuideError(
                f"another `rlhf-guide run` is working in {shown(workspace.path)}; wait for it, or "
                "choose another folder with --run-dir."
            ) from error
        yield


@contextmanager
def _kernel_environment(settings: Profile, block_network: bool) -> Iterator[None]:
    """The environment that kernels inherit, put back afterwards."""
    wanted = {"TOKENIZERS_PARALLELISM": "false", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    wanted |= {DOWNLOAD_VARIABLE: "1"} if settings.allow_download else {"HF_HUB_OFFLINE": "1"}
    if block_network:
        wanted[BLOCK_VARIABLE] = "1"
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _run_or_skip(
    path: Path, overrides: Mapping[str, Any], workspace: Workspace, say: Print
) -> None:
    """One notebook and its line of progress."""
    notebook = read_notebook(path)
    key = {
        "source_hash": source_hash(notebook),
        "parameters": {"profile": workspace.profile.name, **overrides},
        "settings_hash": settings_hash(workspace.profile),
    }
    found = read_record(workspace, path.stem)
    if found and is_current(workspace, found, key):
        say(f"{path.stem} … done before ({_cost(found)})")
        return
    began = datetime.now(UTC)
    try:
        seconds, peak = _execute(path, key["parameters"], workspace)
    except NotebookFailed as error:
        say(f"{path.stem} … failed")
        _write_record(workspace, path.stem, {**key, "status": "failed", "error": str(error)})
        raise
    record = {**key, "status": "ok", **_totals(workspace, path.stem, began, seconds, peak)}
    _write_record(workspace, path.stem, record)
    say(f"{path.stem} … ok {_cost(record)}")


def settings_hash(profile: Profile) -> str:
    """A hash of every number of a profile: editing `profiles.py` makes old records stale."""
    return canonical_hash(section_dict(profile))


def _cost(record: Mapping[str, Any]) -> str:
    return f"{record['seconds']:.0f} s, {record['peak_gib']:.1f} GiB"


def record_path(workspace: Workspace, stem: str) -> Path:
    """Where a notebook's record lies, beside its executed copy."""
    return workspace.path / "notebooks" / f"{stem}.json"


def read_record(workspace: Workspace, stem: str) -> dict[str, Any] | None:
    """A notebook's record, or None before it has run."""
    path = record_path(workspace, stem)
    return read_json(path) if path.exists() else None


def _write_record(workspace: Workspace, stem: str, record: Mapping[str, Any]) -> None:
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(record_path(workspace, stem), {**record, "finished_at": finished})


def is_current(workspace: Workspace, record: Mapping[str, Any], key: Mapping[str, Any]) -> bool:
    """Whether a record is of a successful run with this code, parameters, settings and stages."""
    if record["status"] != "ok" or any(record.get(name) != key[name] for name in key):
        return False
    try:
        stages = {name: workspace.load(name) for name in record["stages"]}
        inputs_now = [
            workspace.load(name).fingerprint == fingerprint
            for stage in stages.values()
            for name, fingerprint in stage.manifest["inputs"].items()
        ]
    except MissingStage:
        return False
    return all(inputs_now) and all(
        stages[name].fingerprint == fingerprint for name, fingerprint in record["stages"].items()
    )


def stages_of(workspace: Workspace, stem: str) -> list[Stage]:
    """The finished stages that a notebook makes."""
    return [
        stage
        for stage in workspace.finished()
        if STAGE_NOTEBOOK.get(stage.name.split("/")[0]) == stem
    ]


def _totals(
    workspace: Workspace, stem: str, began: datetime, seconds: float, peak: float
) -> dict[str, Any]:
    """Time, memory and disk of a notebook, counting stages that an earlier, killed run finished."""
    stages = stages_of(workspace, stem)
    reused = [s for s in stages if datetime.fromisoformat(s.manifest["finished_at"]) < began]
    size = sum(sum(stage.manifest["sizes"].values()) for stage in stages)
    return {
        "seconds": round(seconds + sum(s.manifest["seconds"] for s in reused), 1),
        "peak_gib": round(max([peak, *(s.manifest["peak_gib"] for s in reused)]), 2),
        "disk_gib": round(size / 2**30, 3),
        "stages": {stage.name: stage.fingerprint for stage in stages},
    }


def _execute(
    path: Path, parameters: Mapping[str, Any], workspace: Workspace
) -> tuple[float, float]:
    """Run one notebook with papermill; returns seconds and the kernel's peak memory in GiB."""
    import papermill
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    for name in ("papermill", "papermill.translators", "nbclient", "traitlets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    target = workspace.path / "notebooks" / path.name
    with plain_disk_errors(target):
        target.parent.mkdir(exist_ok=True)
    began = time.perf_counter()
    with peak_memory() as peak, plain_disk_errors(target):
        execute = partial(
            papermill.execute_notebook,
            path,
            target,
            parameters={**parameters, "run_dir": str(workspace.path)},
            kernel_name="python3",
            progress_bar=False,
            cwd=path.parent,
            coalesce_streams=True,
            # Neither its note on loopback TCP, nor that it was interrupted when told to end.
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
        )
        try:
            _with_a_kernel(execute, path)
        except papermill.PapermillExecutionError as error:
            raise NotebookFailed(_cell_failed(path, target, error)) from None
        except (DeadKernelError, CellExecutionError, CellTimeoutError) as error:
            raise NotebookFailed(_kernel_died(path, target, error)) from None
    return time.perf_counter() - began, peak["gib"]


def _with_a_kernel(execute: Callable[[], Any], path: Path) -> None:
    """Call `execute`, once more each time its kernel ended before it had run anything.

    Jupyter looks for free ports before it starts the kernel that binds them, so another program
    can be faster. Raises NotebookFailed after `KERNEL_STARTS` such starts.
    """
    for _ in range(KERNEL_STARTS):
        try:
            execute()
            return
        except RuntimeError as error:
            if "before replying to kernel_info" not in str(error):
                raise
    raise NotebookFailed(
        f"{path.name}: its kernel ended {KERNEL_STARTS} times before it ran a cell; what it said "
        "stands above. Where another program took its port, give the same command again."
    )


def _cell_failed(path: Path, target: Path, error: Any) -> str:
    first = next((line for line in error.source.splitlines() if line.strip()), "").strip()
    return (
        f"{path.name} stopped in cell [{error.exec_count}], which begins `{first}`:\n"
        f"  {error.ename.rsplit('.')[-1]}: {error.evalue}\n"
        f"{_what_next(target)}"
    )


def _kernel_died(path: Path, target: Path, error: Exception) -> str:
    return (
        f"{path.name}: its kernel died ({type(error).__name__}). The usual reason is memory: "
        "close other programs or lower generation_batch_size and the per-device batch sizes.\n"
        f"{_what_next(target)}"
    )


def _what_next(target: Path) -> str:
    return (
        f"The executed copy with the full traceback is {shown(target)}. Finished stages are kept: "
        "mend the cause and give the same command again to go on from here."
    )
