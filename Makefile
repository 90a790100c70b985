# make train [RECIPE=name] [ARGS='key=value ...']   set up .venv, train a recipe to the end
# make test                                         set up .venv, lint, types, tests
# make setup | build | lint | types | clean
#
# FA3_TRAIN_CUDA=auto|0|1 says whether the CUDA kernels are built; see tools/setup.sh.

VENV ?= .venv
RECIPE ?= quickstart
ARGS ?=
TESTS ?= tests
BIN := $(abspath $(VENV))/bin
# DeepSpeed compiles its CPU op with the environment's ninja.
export PATH := $(BIN):$(PATH)
# Test processes share the cores: threads that spin while waiting would stall each other.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: train test setup build lint types clean

train:
	@tools/setup.sh $(VENV)
	@$(BIN)/python -m fa3_train recipe=$(RECIPE) $(ARGS)

test:
	@tools/setup.sh $(VENV) dev
	@$(MAKE) --no-print-directory lint types
	$(BIN)/python -m pytest -n 2 --dist loadfile -rs $(TESTS)

setup:
	@tools/setup.sh $(VENV) dev

build:
	@FA3_TRAIN_CUDA=1 tools/setup.sh $(VENV)

lint:
	$(BIN)/ruff check .

types:
	$(BIN)/mypy

clean:
	rm -rf build .venv runs .pytest_cache .mypy_cache .ruff_cache
