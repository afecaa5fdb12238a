"""What the package must never do: run foreign code, read pickles, keep a token. And the wheel."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("rlhf_guide", "data_prep")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
RUNS_TEXT = {"eval", "exec", "compile", "os.system", "os.popen", "runpy.run_path"}
READS_PICKLES = {"torch.load", "pickle.load", "pickle.loads", "joblib.load", "pandas.read_pickle"}


def calls(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_module_runs_text_as_code_or_reads_pickles(path):
    for call in calls(path):
        name = ast.unparse(call.func)
        assert name not in RUNS_TEXT | READS_PICKLES, f"line {call.lineno}: {name}"
        for option in call.keywords:
            given = f"{option.arg}={ast.unparse(option.value)}"
            wrong = ("trust_remote_code=True", "shell=True", "allow_pickle=True")
            assert given not in wrong, f"line {call.lineno}: {given}"


def test_models_are_downloaded_as_safetensors_only():
    source = (ROOT / "rlhf_guide" / "models.py").read_text(encoding="utf-8")
    (patterns,) = [
        ast.literal_eval(node.value)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "patterns"
    ]
    assert "*.safetensors" in patterns
    assert not [p for p in patterns if p.endswith((".bin", ".pt", ".pth", ".pkl", ".py", "*"))]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel as `pip install` builds it, from a copy of what it is built of."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", *PACKAGES):
        (folder / name).symlink_to(ROOT / name)
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('dist'))"
    subprocess.run([sys.executable, "-c", build], cwd=folder, check=True, capture_output=True)
    (built,) = (folder / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_every_file_of_the_packages(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *PACKAGES],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\n")
    missing = [name for name in tracked if name and (ROOT / name).exists() and name not in inside]
    assert not missing, "add them to [tool.setuptools.package-data]"


def test_the_installed_wheel_answers_outside_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = (
        "import sys, rlhf_guide, data_prep.embedded as data\n"
        "from rlhf_guide.cli import main\n"
        "assert rlhf_guide.__file__.startswith(sys.argv[1]), rlhf_guide.__file__\n"
        "assert data.load_prompts('evaluation')\n"
        "sys.exit(main(['parameters', '--profile', 'smoke']))"
    )
    # -P and the folder: the checkout, which an editable install names, comes after the wheel.
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, str(tmp_path / "site")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "dpo_beta" in done.stdout
