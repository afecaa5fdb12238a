"""`kill -9` at ten random moments of the online loop: nothing finished is repeated or changed."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from online_world import make_run, tiny_profile
from smoke_run import ROOT, artefacts, changed

from rlhf_guide.workspace import MANIFEST

KILLS = int(os.environ.get("RLHF_GUIDE_SLOW_KILLS", "10"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop") / "prepared"
    make_run(folder, tiny_profile())
    return folder


def run_loop(folder, seconds=None):
    """Run the loop, or kill it so long after its first stage began; whether it ended by itself."""
    line = [sys.executable, str(ROOT / "tests" / "online_world.py"), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    with open(folder.parent / "printed.txt", "a") as printed:
        process = subprocess.Popen(line, env=environment, stdout=printed, stderr=printed)
        while process.poll() is None and before == {
            path: path.stat().st_mtime_ns for path in folder.rglob("*.json")
        }:
            time.sleep(0.02)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    if process.returncode != -signal.SIGKILL:
        assert process.returncode == 0, (folder.parent / "printed.txt").read_text()[-3000:]
    return process.returncode == 0


def manifests(folder):
    """The finished stages' manifests, with the time that each was finished at."""
    return {path: path.read_bytes() for path in folder.rglob(MANIFEST)}


def test_kills_at_random_moments_of_the_loop(prepared, tmp_path, record_property):
    undisturbed = shutil.copytree(prepared, tmp_path / "undisturbed" / "run")
    began = time.monotonic()
    assert run_loop(undisturbed)
    length = time.monotonic() - began
    chance, kills, loops, moments = random.Random(0), 0, 0, set()
    while kills < KILLS:
        folder = shutil.copytree(prepared, tmp_path / f"loop_{loops}" / "run")
        done, ended = manifests(folder), False
        while not ended:
            ended = run_loop(folder, chance.uniform(0, length / 2) if kills < KILLS else None)
            kills += not ended
            moments |= {path.parent.name for path in folder.rglob("pending.json")}
            now = manifests(folder)
            assert {path: now.get(path) for path in done} == done, "a finished stage was repeated"
            done = now
        assert changed(artefacts(undisturbed), artefacts(folder)) == []
        loops += 1
    record_property("kills", kills)
    record_property("loops", loops)
    record_property("stages_interrupted", len(moments))
