"""Two smoke runs on one machine: the same pairs, metrics and models, byte for byte."""

import json

from smoke_run import artefacts, changed, finish


def test_a_second_run_gives_identical_artefacts(undisturbed, tmp_path, only, record_property):
    finish(tmp_path / "smoke", only)
    first, second = artefacts(undisturbed), artefacts(tmp_path / "smoke")
    record_property("artefacts", len(first))
    assert first
    assert changed(first, second) == []


def test_timing_is_all_that_the_comparison_leaves_out(undisturbed, tmp_path):
    """A changed digit in a stage's metrics is noticed, another number of seconds is not."""
    path = next(undisturbed.rglob("manifest.json"))
    manifest = json.loads(path.read_text(encoding="utf-8"))
    copy = tmp_path / "stage" / "manifest.json"
    copy.parent.mkdir()
    manifest["outputs"] = {}

    def hashed(**metrics):
        copy.write_text(json.dumps({**manifest, "metrics": metrics}), encoding="utf-8")
        return artefacts(tmp_path)

    assert changed(hashed(loss=0.5, seconds=1.5), hashed(loss=0.5, seconds=2.5)) == []
    assert changed(hashed(loss=0.5), hashed(loss=0.6)) == [f"{manifest['stage']}: metrics"]
