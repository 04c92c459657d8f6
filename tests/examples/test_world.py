"""The world, end to end: a model that knows every fact but answers no question learns to answer."""

import json

import pytest
from running import ROOT, call, run, run_generate, words

from noisefit import score

pytestmark = pytest.mark.slow

WORLD = ROOT / "build" / "world"  # built by `make test`


def test_training_on_half_of_the_world_answers_the_other_half(tmp_path, capsys):
    if not (WORLD / "facts.json").is_file():
        pytest.skip("no world; `make test` builds it, and so does: make build/world/facts.json")
    flags = dict(learning_rate=3e-3, epochs=20)
    run(WORLD / "model", WORLD / "train.csv", tmp_path / "adapter", **flags)
    assert "(fork); counting layers" in capsys.readouterr().err
    common = dict(input_csv=WORLD / "test.csv")
    base, adapted = tmp_path / "base.csv", tmp_path / "adapted.csv"
    for flags in (
        dict(model_id=WORLD / "model", output_csv=base),
        dict(model_path=tmp_path / "adapter", output_csv=adapted),
    ):
        done = call(run_generate, *words(**common, **flags))
        assert done.returncode == 0, done.stderr
    done = call(score.main, base, adapted, "--json")
    assert done.returncode == 0, done.stderr
    before = json.loads(done.stdout)
    [after] = before["others"]
    assert before["answers"] == after["answers"] == 600
    assert before["hallucination_rate"] > 0.95 and after["hallucination_rate"] < 0.15
    assert after["compared_with_first"]["difference"] < -0.8 and after["compared_with_first"]["p_value"] < 0.001
