"""Every chapter's exercises: three levels, hints, checks, solutions. `make notebooks` runs them."""

import pytest
from solutions import NOTEBOOKS, exercises


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_exercises_are_complete(path):
    found = exercises(path)
    assert {exercise.level for exercise in found} == {"Easy", "Medium", "Harder"}
    for exercise in found:
        missing = [name for name, value in exercise._asdict().items() if not value]
        assert not missing, f"exercise {exercise.number} has no {', '.join(missing)}"
        assert "assert " in exercise.check
        compile(exercise.check + "\n" + exercise.wrong, path.name, "exec")
        compile(exercise.solution, path.name, "exec")
