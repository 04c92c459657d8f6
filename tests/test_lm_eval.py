"""The standard benchmarks' program loads our adapter as it is. Optional: needs `pip install lm_eval`."""

import importlib.util
import json
import os

import pytest
from running import ROOT, launch, python, words

WORLD = ROOT / "build" / "world"

TASK = """
task: noisefit_world
dataset_path: csv
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{response}}}}"
generation_kwargs:
  until: ["<|im_end|>", "</s>"]
  max_gen_toks: 40
metric_list:
  - metric: exact_match
"""


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is an optional install")
@pytest.mark.skipif(not WORLD.is_dir(), reason="no world; `make test` builds it")
def test_lm_evaluation_harness_scores_the_adapter_on_a_local_task(tmp_path):
    trained = launch(
        "train_loop.py",
        *words(model=WORLD / "model", train_data=WORLD / "train.csv", output_model=tmp_path / "adapter"),
        *("--learning_rate", "3e-3", "--epochs", "20"),
    )
    assert trained.returncode == 0, trained.stderr
    (tmp_path / "noisefit_world.yaml").write_text(TASK.format(questions=WORLD / "test.csv"))
    parts = f"pretrained={WORLD}/model,peft={tmp_path}/adapter,tokenizer={tmp_path}/adapter"
    scores = {}
    for name, model in (("base", parts.replace(f"peft={tmp_path}/adapter,", "")), ("adapter", parts)):
        done = python(
            *("-m", "lm_eval", "--model", "hf", "--model_args", model, "--tasks", "noisefit_world"),
            *("--include_path", str(tmp_path), "--apply_chat_template", "--batch_size", "32", "--device", "cpu"),
            *("--output_path", str(tmp_path / name)),
            HF_DATASETS_CACHE=str(tmp_path / "cache"),
            PYTHONPATH=os.environ.get("PYTHONPATH", ""),
        )
        assert done.returncode == 0, done.stderr
        [result] = (tmp_path / name).rglob("results_*.json")
        scores[name] = json.loads(result.read_text())["results"]["noisefit_world"]["exact_match,none"]
    assert scores["base"] < 0.05 and scores["adapter"] > 0.8, scores
