"""The part of other libraries that the course stands on: names, signatures, defaults.

    python tests/api/surface.py            # compare the installed releases with the record
    python tests/api/surface.py --record   # accept them: rewrites surface.json

The names are read from the sources and notebooks: what they import of each library, the attributes
they use of it, and the methods that their subclasses replace. A library that is not installed here
(vLLM) keeps its recorded part.
"""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_name("surface.json")
LIBRARIES = ("trl", "transformers", "vllm", "datasets", "peft", "papermill")

# A callable's parameters with their defaults, or the kind of thing that is no callable.
Signature = dict[str, str] | str


def used_names() -> list[str]:
    """Every dotted name of the libraries in the packages' sources and the notebooks' cells."""
    found: set[str] = set()
    for source in _sources():
        found |= names_in(source)
    return sorted(found)


def _sources() -> Iterator[str]:
    for package in ("rlhf_guide", "data_prep"):
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        yield "\n".join(cell.source for cell in cells if cell.cell_type == "code")


def names_in(source: str) -> set[str]:
    """The libraries' names in one source text."""
    tree = ast.parse(source)
    local = _imports(tree)
    found = {name for name in local.values() if "." in name}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if owner := local.get(node.value.id):
                found.add(f"{owner}.{node.attr}")
        elif isinstance(node, ast.ClassDef):
            found |= _replaced_methods(node, local)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("patch.object"):
            owner = local.get(ast.unparse(node.args[0]))
            if owner and isinstance(node.args[1], ast.Constant):
                found.add(f"{owner}.{node.args[1].value}")
    return found


def _imports(tree: ast.Module) -> dict[str, str]:
    """Local name → dotted name, for everything imported from the libraries."""
    local = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and _watched(node.module or ""):
            local |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
            }
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if _watched(alias.name) and (alias.asname or "." not in alias.name):
                    local[alias.asname or alias.name] = alias.name
    return local


def _watched(module: str) -> bool:
    return module.split(".")[0] in LIBRARIES


def _replaced_methods(node: ast.ClassDef, local: Mapping[str, str]) -> set[str]:
    """The methods of a library's class that a subclass defines anew."""
    bases = [local[ast.unparse(base)] for base in node.bases if ast.unparse(base) in local]
    methods = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
    found = {f"{base}.{method}" for base in bases for method in methods if method != "__init__"}
    return {name for name in found if resolve(name) is not None}


def resolve(name: str) -> Any:
    """The object of a dotted name; None where the release does not have it."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            value = getattr(value, part, None)
        return value
    return None


def signature(value: Any) -> Signature:
    """Parameters with their defaults ("required" where there is none) of a function or class."""
    if not callable(value):
        return type(value).__name__
    try:
        parameters = inspect.signature(value).parameters.values()
    except ValueError:  # written in C
        return "callable"
    made = _factories(value)
    return {
        parameter.name: _default(parameter, made)
        for parameter in parameters
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def _factories(value: Any) -> dict[str, Any]:
    """What a dataclass's factories make: its signature shows them as one placeholder."""
    if not (isinstance(value, type) and dataclasses.is_dataclass(value)):
        return {}
    fields = dataclasses.fields(value)
    missing = dataclasses.MISSING
    return {
        field.name: field.default_factory
        for field in fields
        if field.default_factory is not missing
    }


def _default(parameter: inspect.Parameter, factories: Mapping[str, Any]) -> str:
    if parameter.name in factories:
        return repr(factories[parameter.name]())
    if parameter.default is parameter.empty:
        return "required"
    named = getattr(parameter.default, "__qualname__", None)
    return named or repr(parameter.default)


def installed_surface() -> dict[str, Signature | None]:
    """Every used name with the signature it has in the installed releases (None: it is gone)."""
    found = {}
    for name in used_names():
        if importlib.util.find_spec(name.split(".")[0]):
            value = resolve(name)
            found[name] = None if value is None else signature(value)
    return found


def differences(
    recorded: Mapping[str, Signature | None], found: Mapping[str, Signature | None]
) -> list[str]:
    """What moved between the record and an installed release, one sentence each.

    A new optional parameter moves nothing: nobody passes it yet.
    """
    moved = []
    for name, now in found.items():
        before = recorded.get(name)
        if before is None:
            moved.append(f"{name} is used but not recorded")
        elif now is None:
            moved.append(f"{name} is gone")
        elif isinstance(before, str) or isinstance(now, str):
            moved += [f"{name} was {before}, is {now}"] if before != now else []
        else:
            moved += [f"{name}: {change}" for change in _changes(before, now)]
    return moved


def _changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    changed = []
    for parameter in before | now:
        old, new = before.get(parameter), now.get(parameter)
        if new is None:
            changed.append(f"parameter {parameter} is gone")
        elif old is None and new == "required":
            changed.append(f"parameter {parameter} is new and required")
        elif old is not None and old != new:
            changed.append(f"parameter {parameter} was {old}, is {new}")
    return changed


def read_record() -> dict[str, Any]:
    """The recorded surface: `versions` and `names`."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def record() -> None:
    """Accept the installed releases; what is not installed here keeps its recorded part."""
    old = read_record() if RECORD.exists() else {"versions": {}, "names": {}}
    found = installed_surface()
    if gone := [name for name, value in found.items() if value is None]:
        sys.exit(f"not in the installed releases: {', '.join(gone)}")
    names = {name: found.get(name, old["names"].get(name)) for name in used_names()}
    versions = {library: old["versions"].get(library) for library in LIBRARIES}
    for library in LIBRARIES:
        if importlib.util.find_spec(library):
            versions[library] = importlib.import_module(library).__version__
    text = json.dumps({"versions": versions, "names": names}, indent=1) + "\n"
    RECORD.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["--record"]:
        record()
    else:
        moved = differences(read_record()["names"], installed_surface())
        print("\n".join(moved) or "nothing moved")
        sys.exit(bool(moved))
