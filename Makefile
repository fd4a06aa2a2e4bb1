# make demo   train a small model on this machine for four minutes, and see it write
# make test   everything that is claimed, checked
# Each target sets itself up; the environment is .venv.

PYTHON ?= python3
PRESET ?= configs/pydocs.py
OUT ?= out/pydocs
ARGS ?=
BIN = .venv/bin

.PHONY: demo test lint bench clean

demo: .venv/ready data/pydocs/meta.json
	$(BIN)/python train.py $(PRESET) --out_dir=$(OUT) $(ARGS)
	$(BIN)/python evaluate.py --ckpt=$(OUT)
	$(BIN)/python sample.py --ckpt=$(OUT) --num_samples=2
	$(BIN)/python sample.py --ckpt=$(OUT) --num_samples=1 --prompt="Return a list of "
	$(BIN)/python sample.py --ckpt=$(OUT) --num_samples=1 --template="The list is sorted by ___48 and the result is returned."

test: .venv/ready-dev
	$(BIN)/python -m pytest

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/ready-dev
	$(BIN)/python -m experiments.bench

clean:
	rm -rf .venv out data/pydocs/*.bin data/pydocs/meta.json .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

data/pydocs/meta.json: .venv/ready data/pydocs/prepare.py data/writer.py data/tokenizer.py
	$(BIN)/python -m data.pydocs.prepare

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@
