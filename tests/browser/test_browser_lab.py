"""JupyterLab as `make lab` starts it: its first notebook run to the end in a browser, at smoke."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIRST = "00_tour.ipynb"
KERNEL_IDLE = (
    "window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
)
CODE = """[...window.jupyterapp.shell.currentWidget.content.model.cells]
    .filter(cell => cell.type === 'code')"""
ERRORS = f"""{CODE}.flatMap(cell => cell.outputs.toJSON())
    .filter(output => output.output_type === 'error').map(output => output.evalue)"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def lab_command(folder, port):
    """The Makefile's own command for JupyterLab, on a folder, with what a test needs."""
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8")
    line = re.search(r"^\t(\$\(BIN\)/jupyter lab .+?[^\\])$", recipe, re.MULTILINE | re.DOTALL)[1]
    flags = (
        f"--no-browser --port {port} --IdentityProvider.token= --LabApp.expose_app_in_browser=True"
    )
    known = {
        "$(BIN)": str(Path(sys.executable).parent),
        "$(CURDIR)": str(folder),
        "$(LAB_FLAGS)": flags,
        "\\\n": " ",
    }
    for name, value in known.items():
        line = line.replace(name, value)
    return line


@pytest.fixture
def lab(tmp_path):
    """The address of a running JupyterLab at the smoke profile, on a copy of the notebooks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    environment |= {"RLHF_GUIDE_PROFILE": "smoke", "RLHF_GUIDE_RUNS": str(tmp_path / "runs")}
    server = subprocess.Popen(
        f"exec {lab_command(tmp_path, port)}", shell=True, cwd=tmp_path, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{address}/api", server)
        yield address
    finally:
        server.terminate()
        server.wait(30)


def wait_for(address, server, seconds=120):
    """Return as soon as the address answers; fails when the server ends or takes too long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"JupyterLab did not start within {seconds} s, or ended")


def test_the_first_notebook_runs_to_its_end(new_tab, lab):
    tab = new_tab(viewport={"width": 1400, "height": 1000})
    tab.goto(lab)  # leads to the first notebook
    tab.wait_for_selector(".jp-Notebook .jp-CodeCell")
    assert tab.evaluate("window.jupyterapp.shell.currentWidget.title.label") == FIRST
    tab.wait_for_function(KERNEL_IDLE)
    tab.get_by_role("menuitem", name="Run", exact=True).click()
    tab.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    finished = f"{CODE}.every(cell => cell.executionCount) || {ERRORS}.length > 0"
    tab.wait_for_function(finished, timeout=600_000)
    assert tab.evaluate(ERRORS) == []
    assert tab.evaluate(f"{CODE}.every(cell => cell.executionCount)")
