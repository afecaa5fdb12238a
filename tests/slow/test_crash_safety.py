"""`kill -9` at each notebook boundary and at random moments: the rerun gives the same artefacts."""

import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from smoke_run import ROOT, artefacts, changed, finish, kill, start

KILLS = int(os.environ.get("RLHF_GUIDE_SLOW_KILLS", "20"))
# A notebook takes about half a minute: most kills hit its middle, some its first or last moments.
LONGEST_WAIT = 60


def until_killed_or_done(folder, only, seconds):
    """Run for some seconds, then kill; whether the run ended before."""
    process = start(folder, only)
    timer = threading.Timer(seconds, kill, [process])
    timer.start()
    for _ in process.stdout:
        pass
    process.wait()
    timer.cancel()
    timer.join()
    assert process.returncode in (0, -signal.SIGKILL)
    return process.returncode == 0


def test_a_kill_after_each_notebook_changes_nothing(undisturbed, tmp_path, only):
    folder, boundaries = tmp_path / "smoke", 0
    while True:
        process = start(folder, only)
        line = next((line for line in process.stdout if " … ok " in line), None)
        if line is None:
            break
        kill(process)
        boundaries += 1
    assert process.wait() == 0
    assert boundaries == len(list((undisturbed / "notebooks").glob("*.ipynb")))
    assert changed(artefacts(undisturbed), artefacts(folder)) == []


def test_kills_at_random_moments_change_nothing(undisturbed, tmp_path, only, record_property):
    chance, kills, courses = random.Random(0), 0, 0
    while kills < KILLS:
        folder = tmp_path / f"smoke_{courses}"
        while kills < KILLS:
            if until_killed_or_done(folder, only, chance.uniform(0, LONGEST_WAIT)):
                break
            kills += 1
        finish(folder, only)
        assert changed(artefacts(undisturbed), artefacts(folder)) == []
        shutil.rmtree(folder)
        courses += 1
    record_property("kills", kills)
    record_property("courses", courses)


def test_a_kill_of_the_runner_alone_leaves_no_kernel_and_no_lock(undisturbed, tmp_path, only):
    folder = tmp_path / "smoke"
    process = start(folder, only)
    next(line for line in process.stdout if re.search(r" … ok ", line))
    process.kill()  # its kernel lives on until it notices, a second later
    process.wait()
    finish(folder, only)
    assert changed(artefacts(undisturbed), artefacts(folder)) == []


@pytest.mark.parametrize("size", ["1m", "8m", "24m"])
def test_a_disk_that_fills_up_ends_in_a_clear_message_and_the_course_goes_on(
    undisturbed, tmp_path, only, size
):
    """In 1 MB the data do not fit, in the others a first and a second model does not."""
    kept = tmp_path / "kept"
    done = run_on_disk(tmp_path / "disk", size, only, keep=kept)
    assert done.returncode == 1
    assert re.search("disk is full|No space left", done.stderr), done.stderr
    assert "again" in done.stderr
    assert "Traceback" not in done.stderr
    finish(kept, only)
    assert changed(artefacts(undisturbed), artefacts(kept)) == []


def run_on_disk(disk, size, only, keep):
    """The course in a small file system of its own, then a copy of what it left behind."""
    disk.mkdir()
    course = shlex.join([sys.executable, "-m", "rlhf_guide.cli", "run", "--profile", "smoke"])
    course += f" --no-network --run-dir {disk}" + (f" --only {only}" if only else "")
    script = f"mount -t tmpfs -o size={size} none {disk} && {course}; end=$?; "
    script += f"cp -r {disk} {keep}; exit $end"
    line = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
