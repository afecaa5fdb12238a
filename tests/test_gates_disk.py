"""A full disk and a read-only one, for real: small file systems in a name space of their own."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from fake_course import OPEN, notebook, write_course

ROOT = Path(__file__).resolve().parent.parent
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
BIG = 'append_jsonl(ws.stage("data", 1).dir / "rows.jsonl", ["x" * 500_000])'


def can_mount(folder):
    try:
        line = [*NAMESPACE, f"mount -t tmpfs none {shlex.quote(str(folder))}"]
        return subprocess.run(line, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def run_on(disk, options, notebooks):
    """The course with its run folder on a disk mounted with these options."""
    disk.mkdir()
    if not can_mount(disk):
        pytest.skip("no unprivileged mounts here")
    run = [sys.executable, "-m", "rlhf_guide.cli", "run", "--profile", "smoke"]
    run += ["--run-dir", str(disk / "run"), "--notebooks", str(notebooks)]
    mount = ["mount", "-t", "tmpfs", "-o", options, "none", str(disk)]
    return subprocess.run(
        [*NAMESPACE, f"{shlex.join(mount)} && {shlex.join(run)}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_a_read_only_run_folder_is_refused_before_a_kernel_starts(tmp_path):
    done = run_on(tmp_path / "disk", "ro", write_course(tmp_path))
    assert done.returncode == 1
    assert "read-only; choose another folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_full_disk_is_named_and_finished_stages_are_said_to_be_kept(tmp_path):
    notebooks = write_course(tmp_path, {"01_preference_data": notebook(OPEN, BIG)})
    done = run_on(tmp_path / "disk", "size=128k", notebooks)
    assert done.returncode == 1
    assert "the disk is full; free some space" in done.stderr
    assert "Traceback" not in done.stderr
