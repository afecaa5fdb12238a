"""JupyterLab as `make lab` starts it: a notebook run to its end in a browser, at smoke."""

import os
import re
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = "notebooks/09_theory.ipynb"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def lab_command(port):
    """The Makefile's own command for JupyterLab, with the options that a test needs."""
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8")
    line = re.search(r"^\t(\$\(BIN\)/jupyter lab .+?[^\\])$", recipe, re.MULTILINE | re.DOTALL)[1]
    flags = f"--no-browser --port {port} --IdentityProvider.token= --ServerApp.allow_origin=*"
    known = {"$(BIN)/": "", "$(CURDIR)": str(ROOT), "$(LAB_FLAGS)": flags, "\\\n": " "}
    for name, value in known.items():
        line = line.replace(name, value)
    return line


@pytest.fixture
def lab(tmp_path):
    """The address of a running JupyterLab at the smoke profile; its notebooks are not changed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    environment |= {"RLHF_GUIDE_PROFILE": "smoke", "RLHF_GUIDE_RUNS": str(tmp_path / "runs")}
    server = subprocess.Popen(
        f"exec {lab_command(port)}", shell=True, cwd=tmp_path, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=1)
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail("JupyterLab did not start")
        yield address
    finally:
        server.terminate()
        server.wait(30)


def test_a_notebook_runs_to_its_end(chromium, lab):
    before = (ROOT / NOTEBOOK).read_bytes()
    tab = chromium.new_page(viewport={"width": 1400, "height": 1000})
    tab.goto(f"{lab}/lab/tree/{NOTEBOOK}")
    tab.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=120_000)
    tab.get_by_role("menuitem", name="Run", exact=True).click()
    tab.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    tab.wait_for_function(
        """() => {
            const panel = window.jupyterapp.shell.currentWidget;
            const code = [...panel.content.model.cells].filter(cell => cell.type === 'code');
            return code.every(cell => cell.executionCount) ||
                code.some(cell => cell.outputs.toJSON().some(o => o.output_type === 'error'));
        }""",
        timeout=600_000,
    )
    errors = tab.evaluate(
        """() => [...window.jupyterapp.shell.currentWidget.content.model.cells]
            .filter(cell => cell.type === 'code').flatMap(cell => cell.outputs.toJSON())
            .filter(output => output.output_type === 'error').map(output => output.evalue)"""
    )
    tab.close()
    assert errors == []
    assert (ROOT / NOTEBOOK).read_bytes() == before, "the test must not save the notebook"
