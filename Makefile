# make train   sets everything up in .venv and trains the embedded model on one sample
# make test    sets everything up in .venv and runs the tests, in two processes (TEST_PROCESSES=0: one)
# Flags pass through ARGS:   make train ARGS="--max-steps 5 --output-dir runs/x"

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ARGS   ?=
# Two processes of tests fill two cores; engines that share one GPU would be short of its memory.
TEST_PROCESSES ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo 0 || echo 2)

.PHONY: setup train test check bench clean

setup:
	@PYTHON="$(PYTHON)" VENV="$(VENV)" bash scripts/setup.sh

train: setup
	@$(BIN)/python -m polymath_fast.train $(ARGS)

test: setup
	@PYTHON="$(PYTHON)" VENV="$(VENV)" bash scripts/setup.sh test
	@$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal $(ARGS)

check: setup
	@PYTHON="$(PYTHON)" VENV="$(VENV)" bash scripts/setup.sh test
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

bench: setup
	@PYTHON="$(PYTHON)" VENV="$(VENV)" bash scripts/setup.sh bench
	@$(BIN)/python -m benchmarks.run all $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info
