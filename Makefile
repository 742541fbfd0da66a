# make demo    install into .venv, pretrain on the built-in clips, show what came out (CPU: minutes)
# make test    install into .venv, run the test suite
# make help    the other targets
#
# Settings: RESULTS=FILE  PYTHON=python3.12  VENV=.venv  TORCH=torch==2.13.0  TORCH_ARGS="--index-url URL"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_ARGS ?=
TRITON ?= triton==3.6.0
BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RUN := PATH="$(BIN):$$PATH" DS_BUILD_OPS=0 OMP_WAIT_POLICY=passive
DEMO ?= runs/demo
STAMP := $(VENV)/.installed
CPP := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint typecheck smoke bench bench-full clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

install: $(STAMP)  ## create .venv and install: torch first, then the project for development

# torch goes first, so that nothing below resolves to another build of it.
$(STAMP): setup.py pyproject.toml constraints.txt $(CPP)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt "setuptools<81" wheel $(TORCH_ARGS) $(TORCH)
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) install --quiet $(TRITON)
	DS_BUILD_OPS=0 $(PIP) install --quiet -c constraints.txt ninja deepspeed
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

demo: install  ## pretrain KDC-MAE on synthetic clips, evaluate it, put it all on one page
	rm -rf $(DEMO)
	$(RUN) deepspeed --log_level error kdcmae_fast/pretrain.py --ds_config configs/zero2.json \
		--output $(DEMO)
	$(RUN) kdcmae retrieve --checkpoint $(DEMO)/model --num-clips 100 --output $(DEMO)/retrieval
	$(RUN) kdcmae inpaint --checkpoint $(DEMO)/model --num-clips 100 --output $(DEMO)/inpainting
	$(RUN) kdcmae localize --checkpoint $(DEMO)/model --num-clips 50 --video 1 \
		--output $(DEMO)/localization
	$(RUN) kdcmae report $(DEMO) --output $(DEMO)/report.html
	@echo "Look at: $(DEMO)/report.html (in a browser)  $(DEMO)/loss.png  $(DEMO)/inpainting/"

test: install  ## the test suite (CPU, 10 to 15 minutes on two cores)
	$(RUN) $(BIN)/python -m pytest tests

test-slow: install  ## the long multi-process tests that `make test` leaves out
	$(RUN) $(BIN)/python -m pytest tests -m slow

lint: install  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: install  ## mypy on the package and, apart from it, on the ops
	$(BIN)/mypy kdcmae_fast
	cd kernels && $(BIN)/mypy --config-file ../pyproject.toml --namespace-packages .

smoke: install  ## a short DeepSpeed run on two processes
	rm -rf runs/smoke
	$(RUN) deepspeed --log_level error --num_gpus 2 kdcmae_fast/pretrain.py --ds_config configs/zero2.json \
		--output runs/smoke train.steps=4 train.log_every=1 train.checkpoint_every=2 \
		ds.train_micro_batch_size_per_gpu=4 data.num_workers=0

bench: install  ## the benchmark suite at toy shapes
	$(RUN) $(BIN)/python -m pytest benchmarks --benchmark-only

RESULTS ?= benchmarks/results/cpu-$(shell date +%F).jsonl
bench-full: install  ## the real shapes: rows to benchmarks/results, report to runs/bench
	$(RUN) $(BIN)/python -m pytest benchmarks -q --benchmark-only --full --results $(RESULTS)
	$(RUN) kdcmae bench report $(RESULTS) --output runs/bench

clean:  ## remove build products and runs, keep .venv
	rm -rf build dist runs *.egg-info kdcmae_fast/_C*.so .pytest_cache .mypy_cache .ruff_cache
