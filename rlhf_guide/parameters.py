"""Strict parameters: flat names, types and ranges, checked before anything heavy is loaded.

A flat name is `<section>_<field>`, as in `dpo_beta`, or a field of the profile itself, as in
`seed`: papermill passes parameters as flat names.
"""

import difflib
import math
from dataclasses import Field, fields, is_dataclass
from typing import Any

from .errors import ParameterError
from .settings import Profile


def flat_fields() -> dict[str, tuple[str | None, Field]]:
    """Every flat parameter name with its section (None = the profile itself) and its field."""
    flat: dict[str, tuple[str | None, Field]] = {}
    for item in fields(Profile):
        if is_dataclass(item.type):
            for inner in fields(item.type):
                flat[f"{item.name}_{inner.name}"] = (item.name, inner)
        elif item.name != "name":
            flat[item.name] = (None, item)
    return flat


FLAT_FIELDS = flat_fields()


def parameter_names() -> dict[str, type]:
    """Every name that `load_profile` takes, with its type."""
    return {name: item.type for name, (_, item) in FLAT_FIELDS.items()}


def parameter_value(profile: Profile, name: str) -> Any:
    """The value of a flat parameter name in a profile."""
    section, item = FLAT_FIELDS[name]
    return getattr(getattr(profile, section) if section else profile, item.name)


def nearest(name: str, valid: Any) -> str:
    """A sentence with the nearest valid name, or nothing when none is near."""
    found = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""


def check_value(name: str, value: Any) -> Any:
    """The value of a flat parameter, with its type and range checked (int counts as float)."""
    item = FLAT_FIELDS[name][1]
    if item.type is float and type(value) is int:
        value = float(value)
    if type(value) is not item.type:
        raise ParameterError(
            f"{name} takes {_in_words(item.type)}, not {value!r} ({type(value).__name__})."
            + _how_to_write(item.type, value)
        )
    _check_range(name, value, item.metadata)
    return value


def _in_words(kind: type) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]


def _how_to_write(kind: type, value: Any) -> str:
    """Advice for the usual slip: YAML 1.1 and shells turn numbers and booleans into text."""
    if not isinstance(value, str):
        return ""
    if kind is bool and value.lower() in ("true", "false", "yes", "no", "0", "1"):
        return f" It arrived as text: write {value} without quotes (papermill: -y, not -p)."
    try:
        float(value)
    except ValueError:
        return ""
    if kind is float:
        mantissa, *exponent = value.strip().lower().split("e")
        text = "e".join([mantissa if "." in mantissa else f"{mantissa}.0", *exponent])
        return f" YAML reads {value} as text: write {text}."
    return f" It arrived as text: write {value} without quotes." if kind is int else ""


def _check_range(name: str, value: Any, rule: Any) -> None:
    """Refuse a value outside its choices or its range; NaN is outside every range."""
    if "choices" in rule and value not in rule["choices"]:
        words = ", ".join(rule["choices"])
        raise ParameterError(f"{name} is {value!r}; it must be one of {words}.")
    if "low" not in rule:
        if isinstance(value, str) and not value.strip():
            raise ParameterError(f"{name} is empty; leave it out to keep the profile's value.")
        return
    low, high = rule["low"], rule["high"]
    inside = low < value <= high if rule.get("open") else low <= value <= high
    if not inside or not math.isfinite(value):
        least = f"above {low}" if rule.get("open") else f"at least {low}"
        most = "" if math.isinf(high) else f" and at most {high}"
        raise ParameterError(f"{name} is {value!r}; it must be {least}{most}.")
