# `make demo` and `make test` work from a machine that has only Python 3.10+ and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
WORLD  := build/world
LAUNCH := $(BIN)/accelerate launch --config_file configs/accelerate/cpu.yaml

# Idle OpenMP threads sleep: spinning, they slow down whatever else runs on a machine with few cores.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help demo test quick lint format fuzz bench clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(WORLD)/base.csv $(WORLD)/plain.csv $(WORLD)/noisefit.csv  ## build a small world, train on it, ask it what it was never asked
	@$(BIN)/python -m noisefit.score $^

test: lint $(WORLD)/facts.json  ## lint, then run every test
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

quick: lint  ## lint, then run the tests without launches, worlds and kills: under a minute on two cores
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not slow" --ignore tests/examples

lint: $(VENV)/.dev  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## put the code in its style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

MINUTES ?= 10
fuzz: $(VENV)/.dev  ## look for input that breaks a reader, with new examples for MINUTES=10
	@end=$$(($$(date +%s) + 60 * $(MINUTES))); while [ $$(date +%s) -lt $$end ]; do \
	    $(BIN)/python -m pytest tests/fuzz --hypothesis-profile long --hypothesis-seed random --show-capture no || exit; done

bench: $(VENV)/.run  ## print the figures of docs/costs.md and docs/answers.md
	mkdir -p build
	$(BIN)/python benchmarks/step_cost.py --picture build/step_cost.png
	$(BIN)/python benchmarks/loss_memory.py --picture build/loss_memory.png
	$(BIN)/python benchmarks/generate_speed.py

clean:  ## remove what demo, test and bench made; the installed packages stay
	rm -rf build .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# --- What the targets above need, built once -------------------------------------------------------------------------

$(VENV)/.run: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed; make PYTHON=... names another one"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.run
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

$(WORLD)/facts.json: | $(VENV)/.run
	$(BIN)/python examples/world/build.py --output $(WORLD)

FINETUNE := train_loop.py --model $(WORLD)/model --train_data $(WORLD)/train.csv --learning_rate 3e-3 --epochs 20 \
    --resume_from_checkpoint auto

$(WORLD)/plain/adapter_model.safetensors: | $(WORLD)/facts.json
	$(LAUNCH) $(FINETUNE) --loss_mode basefit --output_model $(WORLD)/plain

$(WORLD)/noisefit/adapter_model.safetensors: | $(WORLD)/facts.json
	$(LAUNCH) $(FINETUNE) --output_model $(WORLD)/noisefit

ASK := generate.py --input_csv $(WORLD)/test.csv

$(WORLD)/base.csv: | $(WORLD)/facts.json
	$(LAUNCH) $(ASK) --model_id $(WORLD)/model --output_csv $@

$(WORLD)/plain.csv $(WORLD)/noisefit.csv: $(WORLD)/%.csv: | $(WORLD)/%/adapter_model.safetensors
	$(LAUNCH) $(ASK) --model_path $(WORLD)/$* --output_csv $@
