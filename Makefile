# `make quickstart` and `make test` are all the set-up there is. Everything lands in .venv and runs/.
PYTHON ?= python3
SCALE ?= tiny
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart test cluster-tools soak lint format clean

quickstart: $(VENV)/.installed  ## install, train a small MoBA model on real text, evaluate it, write the report
	$(BIN)/moba train recipe=quickstart out=runs/quickstart
	$(BIN)/moba export checkpoint=runs/quickstart out=runs/quickstart/hf
	$(BIN)/moba eval checkpoint=runs/quickstart out=runs/quickstart loss.tokens=32768 ruler.samples=4
	@echo "Report: runs/quickstart/report.html"

test: $(VENV)/.installed-dev  ## lint, types and the test suite
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@sh tests/cluster-tools.sh --in-ci
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

cluster-tools:  ## as root: Debian's packages for the tests of SLURM and of several hosts, else skipped
	sh tests/cluster-tools.sh

soak: $(VENV)/.installed-dev  ## 2,000 steps on two processes, 300 kills: minutes, and not part of `make test`
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak
	LONGMOBA_KILLS=300 $(BIN)/python -m pytest tests/train/test_saver.py

lint: $(VENV)/.installed-dev  ## style and types only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch comes first and exactly: a range would let pip fetch a newer CUDA build beside it.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "longmoba needs Python 3.10 or newer: make PYTHON=python3.12 quickstart")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	touch $@

study-%: $(VENV)/.installed  ## make study-parity SCALE=h200: a claim of the paper, repeated (moba study list)
	$(BIN)/moba study $* scale=$(SCALE)

clean:  ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info
