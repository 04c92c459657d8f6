"""What makes a run another one: every setting but those that are free."""

from types import SimpleNamespace

import pytest

from noisefit.inputs.prompts import Example
from noisefit.run.checkpoint_files import FREE, NOTED, OF_THE_ROWS, ROWS, differences, identify_run
from noisefit.run.settings import Settings

RECORDED = Settings(model="m", train_data="t").record()


@pytest.fixture
def identify(llama_folder):
    def identify(rows=((1, 2, 3),), evaluation=(), rows_per_step=4, processes=1, precision="no", **settings):
        run = Settings(model=str(llama_folder), train_data="t")
        for name, value in settings.items():
            object.__setattr__(run, name, value)  # any value, as another one would be seen too
        examples, eval_examples = ([Example(list(row), 1) for row in part] for part in (rows, evaluation))
        launch = SimpleNamespace(num_processes=processes, mixed_precision=precision)
        return identify_run(run, examples, eval_examples, rows_per_step, launch)

    return identify


@pytest.mark.parametrize("name", RECORDED)
def test_each_setting_counts_unless_it_is_free(name, identify, llama_folder):
    value = {"model": str(llama_folder), "noise_policy": "auto"}.get(name, "another")
    found = differences(identify(), identify(**{name: value}))
    if name in FREE | OF_THE_ROWS:
        assert found == []
    else:
        assert found == [f"{name} was {RECORDED[name]} and is {value}"]
    if name in OF_THE_ROWS:
        found = differences(identify(), identify(rows=[(1, 2, 4)], **{name: value}))
        assert len(found) == 2 and f"the {ROWS} have changed" in found and found[0].startswith(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rows=[(1, 2)]), "the rows of --train_data have changed"),
        (dict(rows=[(1, 2, 3), (1, 2, 3)]), "the rows of --train_data have changed"),
        (dict(rows_per_step=8), "rows an optimizer step was 4 and is 8"),
        (dict(processes=2), "processes was 1 and is 2"),
        (dict(precision="bf16"), "mixed_precision was no and is bf16"),
    ],
    ids=str,
)
def test_so_do_rows_and_launch(change, message, identify):
    assert differences(identify(), identify(**change)) == [message]


def test_a_noise_policy_is_what_its_file_says(identify, tmp_path):
    one, copy, other = (tmp_path / name for name in ("one.json", "copy.json", "other.json"))
    one.write_text('{"selected": [0], "scales": [0.5]}')
    copy.write_text('{"scales": [0.5], "selected": [0], "noisefit_version": "another"}')
    other.write_text('{"selected": [0], "scales": [0.25]}')
    assert differences(identify(noise_policy=str(one)), identify(noise_policy=str(copy))) == []
    [found] = differences(identify(noise_policy=str(one)), identify(noise_policy=str(other)))
    assert found.startswith("noise_policy was ")


def test_rows_to_evaluate_on_are_noted_and_no_difference(identify):
    before, now = identify(), identify(evaluation=[(1, 2, 3)])
    assert differences(before, now) == [] and all(before[name] != now[name] for name in NOTED)


def test_the_order_of_tokens_and_the_border_of_the_prompt_count(identify):
    assert differences(identify(rows=[(1, 2), (3,)]), identify(rows=[(1,), (2, 3)])) != []


def test_the_weights_of_rows_count(llama_folder):
    launch = SimpleNamespace(num_processes=1, mixed_precision="no")
    settings = Settings(model=str(llama_folder), train_data="t")
    found = [identify_run(settings, [Example([1, 2], 1, weight=w)], [], 4, launch)[ROWS] for w in (1, 0.5, 0.25)]
    assert len(set(found)) == 3
