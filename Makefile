# Targets for Linux and macOS. `make` lists them.

PYTHON ?= python3
# What pip is given to install PyTorch. Add pip's options here to choose a build, for example
#   make env TORCH_INSTALL='torch==2.13.0 --index-url URL-OF-THE-CPU-WHEELS'
TORCH_INSTALL ?= torch==2.13.0
PYTEST_ARGS ?=
# Test processes; most of a test's time is one thread loading libraries.
WORKERS ?= 2

BIN := .venv/bin
READY := .venv/.ready

# One thread of arithmetic for each test process: more of them wait for each other.
test: export OMP_NUM_THREADS = 1

# Nothing here may use the network after `make env`, or send usage data.
export HF_HUB_OFFLINE = 1
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false
# OpenVINO's converter and NNCF report usage unless the run calls itself unattended. CI=true is the one variable that
# both read; it also keeps them from writing to ~/intel.
export CI = true
export NNCF_CI = 1

.DEFAULT_GOAL := help
.PHONY: help env demo test lint format formats docs pages bench second-opinion clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

env: $(READY) ## create .venv with the tested versions (minutes the first time, nothing afterwards)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is older than Python 3.10; choose another one with make env PYTHON=python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# Editable installs of a pyproject.toml need pip 21.3.
	$(BIN)/python -c 'import pip, sys; sys.exit(tuple(map(int, pip.__version__.split(".")[:2])) < (21, 3))' || \
		$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -c constraints.txt $(TORCH_INSTALL)
	$(BIN)/python -m pip install -c constraints.txt -e '.[openvino,onnx,train,dev]'
	touch $(READY)

demo: $(READY) ## prune, quantise and fine-tune a small real model, export it, verify it, ask it
	$(BIN)/sparseport demo

test: lint ## lint, then all tests (PYTEST_ARGS='-m "not model"' for the quick ones)
	$(BIN)/python -m pytest --timeout=1800 -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: $(READY) ## ruff, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## rewrite the sources the way `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

formats: $(READY) ## write the tables of docs/formats.md and architectures.md anew, from the tests that prove them
	SPARSEPORT_WRITE_FORMATS=1 $(BIN)/python -m pytest -q tests/e2e -k "formats or architectures"
	@# Lines that no test names are gone now; is one missing that a test names?
	$(BIN)/python -m pytest -q tests/e2e/test_formats.py tests/e2e/test_architectures.py -k "every_line or gaps"

docs: $(READY) ## build the documentation as a site into site/, which needs no network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open site/index.html"

pages: $(READY) ## write the generated parts of the documentation anew: command line, Python, errors, decisions
	$(BIN)/python -m tools.pages

second-opinion: $(READY) ## the third-party tools' files and their own dequantisation; gigabytes of environments
	$(BIN)/python benchmarks/second_opinion.py

bench: $(READY) ## run the comparisons in benchmarks/, on the finished demo
	test -d demo/onnx || $(BIN)/sparseport export --target onnx --base demo/int4 --sparse-base demo/sparse \
		--adapter demo/adapter --sub-adapter heuristic --output demo/onnx
	test -d demo/both || $(BIN)/sparseport export --target openvino --target onnx --base demo/int4 \
		--sparse-base demo/sparse --adapter demo/adapter --sub-adapter heuristic --output demo/both
	$(BIN)/python benchmarks/fidelity.py
	$(BIN)/python benchmarks/export_cost.py
	$(BIN)/python benchmarks/performance.py
	$(BIN)/python benchmarks/same_tokens.py --folder demo/both

clean: ## remove caches and build output; .venv stays
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis src/sparseport.egg-info
	find src tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +
