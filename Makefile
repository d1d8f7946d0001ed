# Two commands do everything on a fresh machine: make train, make test.
PYTHON ?= python3
# With pip alone: on a machine with a GPU this is the CUDA build. Any torch from 2.11 to 2.13 will do: make train TORCH=torch==2.11.0
TORCH ?= torch==2.13.0
# What runs upstream's kernels on the CPU. With a torch for CUDA, which brings its own Triton, that one is taken.
TRITON ?= triton==3.8.0
MAMBA ?= mamba-ssm==2.3.2.post1
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help train report test test-kernels trust lint format clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

train: .venv/base ## the quickstart: one small model without Canon layers and with them; minutes on two cores
	$(BIN)/python src/train.py experiment=quickstart

report: .venv/base ## one page of all sweeps under logs/: verdicts, figures, tables
	$(BIN)/python src/report.py

test: .venv/dev ## all tests but the slow ones and those that need a GPU
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-kernels: .venv/kernels ## the fused kernels of fla and mamba-ssm against ours, on the CPU in Triton's interpreter
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/upstream

trust: .venv/kernels ## measure again what docs/trust.md says; minutes on two cores
	mkdir -p .pytest_cache
	$(BIN)/python -m pytest -n 2 -m "not gpu" --measure .pytest_cache/trust.json tests/components tests/checkpoints/test_official.py tests/trust/test_matrix.py --deselect tests/trust/test_matrix.py::test_the_page_speaks_of_every_model_and_property
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --measure .pytest_cache/trust-kernels.json tests/upstream
	$(BIN)/python -m tests.trust.page .pytest_cache/trust.json .pytest_cache/trust-kernels.json

lint: .venv/dev ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: .venv/dev ## rewrite files to the house style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove what runs left behind (not the environment)
	rm -rf logs data .pytest_cache .ruff_cache

.venv/base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) $(TORCH)
	$(PIP) -c constraints.txt -e .
	touch $@

.venv/dev: .venv/base
	$(PIP) -c constraints.txt -e '.[dev]'
	touch $@

# mamba-ssm: the Triton kernels alone. Its dependencies (tilelang and more) and its CUDA code are not needed, and building it without the latter
# takes both variables. Installing must not change torch: it is named, so that pip would rather fail.
.venv/kernels: .venv/dev
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) $(TRITON)
	$(PIP) -c constraints.txt $(TORCH) wheel -e '.[gpu]'
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE $(PIP) --no-deps --no-build-isolation $(MAMBA)
	touch $@
