# make demo   train a small model on this machine for four minutes, and see it write
# make test   everything that is claimed, checked
# Each target sets itself up; the environment is .venv, made from $(PYTHON). One that you name and
# that has torch (conda, CUDA) is used itself, and gets what it lacks: make demo PYTHON=python

PYTHON ?= python3
PRESET ?= configs/pydocs.py
OUT ?= out/pydocs
ARGS ?=

HAS_TORCH = from importlib.metadata import version as v; x, y, *_ = v("torch").split("."); \
  print((int(x), int(y)) >= (2, 9))
ifneq ($(origin PYTHON),file)
OWN := $(filter True,$(shell $(PYTHON) -c '$(HAS_TORCH)' 2> /dev/null))
endif
RUN = $(if $(OWN),$(PYTHON),.venv/bin/python)
READY = $(if $(OWN),own,.venv/ready)
PACKAGES = sed -n '/^torch=/d; s/==.*//p' requirements.txt

.PHONY: demo test lint bench clean own own-dev

demo: $(READY) data/pydocs/meta.json
	$(RUN) train.py $(PRESET) --out_dir=$(OUT) $(ARGS)
	$(RUN) evaluate.py --ckpt=$(OUT)
	$(RUN) sample.py --ckpt=$(OUT) --num_samples=2
	$(RUN) sample.py --ckpt=$(OUT) --num_samples=1 --prompt="Return a list of "
	$(RUN) sample.py --ckpt=$(OUT) --num_samples=1 --template="The list is sorted by ___48 and the result is returned."

test: $(READY)-dev
	$(RUN) -m pytest -n auto --maxprocesses=8 --dist loadfile --no-loadscope-reorder

lint: $(READY)-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: $(READY)-dev
	$(RUN) -m experiments.bench

clean:  # what a command makes again; your models, in out, stay
	rm -rf .venv data/pydocs/*.bin data/pydocs/meta.json .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

data/pydocs/meta.json: data/pydocs/prepare.py data/writer.py data/tokenizer.py | $(READY)
	$(RUN) -m data.pydocs.prepare

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	.venv/bin/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

own:
	$(PYTHON) -m pip install --quiet $$($(PACKAGES))

own-dev: own
	$(PYTHON) -m pip install --quiet $$($(PACKAGES) requirements-dev.txt)
