"""Strict parameters, proven: random typos and wrong values, all refused before a kernel starts."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_guide import course
from rlhf_guide.errors import ParameterError
from rlhf_guide.parameters import FLAT_FIELDS, check_value
from rlhf_guide.sources import list_notebooks, notebook_parameters, read_notebook

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
PARAMETERS = sorted(
    {
        name
        for path in list_notebooks(NOTEBOOKS)
        for name in notebook_parameters(read_notebook(path))
        if name in FLAT_FIELDS
    }
)
CASES = 100
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WRONG_TYPES = {
    int: (1.5, "3", True, [1], float("nan")),
    float: ("1e-4", False, [0.1], float("nan"), float("inf")),
    bool: (1, "false", 0.0, [True]),
    str: (7, True, 0.5, ["embedded"], " "),
}
PYTHON_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
ANYTHING = st.one_of(
    st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.lists(st.integers())
)


def misspelt(name, chance):
    """A name with one letter lost, doubled, replaced, or swapped with the next."""
    at = chance.randrange(1, len(name) - 1)
    before, letter, after = name[:at], name[at], name[at + 1 :]
    made = chance.choice(
        [
            before + after,
            before + 2 * letter + after,
            before + chance.choice(LETTERS) + after,
            before + after[0] + letter + after[1:],
        ]
    )
    return misspelt(name, chance) if made in FLAT_FIELDS else made


def typos():
    chance = random.Random(0)
    names = [chance.choice(PARAMETERS) for _ in range(CASES)]
    return [(misspelt(name, chance), name) for name in names]


def wrong_values():
    chance = random.Random(1)
    names = [chance.choice(PARAMETERS) for _ in range(CASES)]
    return [(name, chance.choice(WRONG_TYPES[FLAT_FIELDS[name][1].type])) for name in names]


@pytest.fixture
def refusal(tmp_path, monkeypatch):
    """A function that gives a run one override and returns the words it was refused with."""

    def no_kernel(*arguments):
        pytest.fail("a kernel was about to start")

    monkeypatch.setattr(course, "_execute", no_kernel)

    def refused(name, value):
        with pytest.raises(ParameterError) as caught:
            course.run_course(
                "smoke", overrides={name: value}, run_dir=tmp_path / "run", notebooks=NOTEBOOKS
            )
        assert not (tmp_path / "run").exists()
        return str(caught.value)

    return refused


def test_a_hundred_typos_are_refused_with_the_name_that_was_meant(refusal):
    for typo, meant in typos():
        message = refusal(typo, 1)
        assert repr(typo) in message
        assert f"Did you mean {meant!r}?" in message, message


def test_a_hundred_wrong_values_are_refused_with_the_parameter_s_name_and_rule(refusal):
    for name, value in wrong_values():
        message = refusal(name, value)
        assert message.startswith(name)
        kind = FLAT_FIELDS[name][1].type
        rules = (f"takes {PYTHON_NAMES[kind]}", "it must be", "is empty")
        assert any(rule in message for rule in rules), message


def test_every_parameter_of_every_notebook_is_refused_one_step_outside_its_range(refusal):
    tried = 0
    for name in PARAMETERS:
        item = FLAT_FIELDS[name][1]
        if "low" in item.metadata:
            outside = item.metadata["low"] - (0 if item.metadata.get("open") else 1)
            assert f"{item.metadata['low']}" in refusal(name, item.type(outside))
            tried += 1
        elif "choices" in item.metadata:
            assert item.metadata["choices"][0] in refusal(name, "nobody's choice")
            tried += 1
    assert tried > len(PARAMETERS) / 2


def answer(function, *arguments):
    """What a function returns, and the words with which it refused instead."""
    try:
        return function(*arguments), ""
    except ParameterError as error:
        return None, str(error)


@given(st.sampled_from(sorted(FLAT_FIELDS)), ANYTHING)
def test_any_value_is_of_the_right_type_or_refused(name, value):
    accepted, words = answer(check_value, name, value)
    if words:
        assert words.startswith(name)
    else:
        assert type(accepted) is FLAT_FIELDS[name][1].type
        assert accepted == value


@given(st.one_of(st.text(), st.builds("{}={}".format, st.sampled_from(PARAMETERS), st.text())))
def test_any_text_on_the_command_line_is_a_setting_or_refused(text):
    parsed, words = answer(course.parse_settings, [text])
    if words:
        assert text.partition("=")[0].strip() in words
    else:
        ((name, value),) = parsed.items()
        assert type(value) is FLAT_FIELDS[name][1].type
