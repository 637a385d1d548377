# make run, make test and make lint set up .venv by themselves; a set-up that is current is left alone.
# The newest supported Python that can make an environment: its newer JAX is up to 1.4 times as fast on a CPU.
ifndef PYTHON
PYTHON := $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
endif
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart

.PHONY: run test test-slow lint soak reproduce report clean

run: $(VENV)/installed ## train the quickstart, evaluate its best checkpoint
	@echo "Training a small model on scikit-learn's digits: loading and compiling take up to a minute on two cores, and"
	@echo "training about as long. Ctrl-C stops and saves; make run then resumes."
	$(BIN)/python launch.py --config configs/quickstart.py --workdir $(RUN)
	$(BIN)/python launch.py --config configs/quickstart.py --workdir $(RUN) --mode eval --checkpoint best
	@echo
	@echo "$(RUN)/result.json     the result, with config, data fingerprint and environment"
	@echo "$(RUN)/eval.json       accuracy by class and confusion matrix of the best checkpoint"
	@echo "$(RUN)/metrics.jsonl   loss, accuracy, learning rate and speed, step by step"
	@echo "$(RUN)/tensorboard     the same for: $(BIN)/tensorboard --logdir runs"
	@echo "$(RUN)/checkpoints     the best and the latest two"

# From Python 3.12 on, counting lines costs next to nothing. On 3.11 the tests take 1.4 times as long, so only .ci/run counts.
COVERAGE = $(shell $(BIN)/python -c 'import sys; print("--cov --cov-report=term" * (sys.version_info >= (3, 12)))')

test: $(VENV)/installed ## run the tests, with line coverage (on Python 3.11: with COVERAGE=--cov)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(COVERAGE)

test-slow: $(VENV)/installed ## fault injection: kills, full disks, lost hosts, other devices, 20,000 steps
	$(BIN)/python -m pytest -m slow --numprocesses 2 --dist worksteal

soak: $(VENV)/installed ## the long form: 100 kills an optimizer, 5,000 random inputs a reader
	RESNET_JAX_SOAK_KILLS=100 $(BIN)/python -m pytest -m slow tests/fault_injection -k killed_at_chosen_moments
	RESNET_JAX_FUZZ_EXAMPLES=5000 $(BIN)/python -m pytest tests/fault_injection/test_fuzz.py tests/fault_injection/test_readers.py

reproduce: $(if $(GPU_PYTHON),,$(VENV)/installed) ## the report's figures, what this machine can do of them: PARTS=, FLAGS=
	$(or $(GPU_PYTHON),$(BIN)/python) -m reproduction.reproduce $(PARTS) $(FLAGS)

report: $(VENV)/installed ## the page of the runs in results/, with the report's claims: report/index.html
	$(BIN)/python -m reproduction.report --output report

lint: $(VENV)/installed ## ruff, mypy, which package may import which, and whether requirements.txt is current
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python .ci/check_dependencies.py

# The package itself, again whenever its C++ changes; without a compiler, it is installed without the C++.
$(VENV)/installed: $(VENV)/dependencies pyproject.toml setup.py $(wildcard resnet_jax/kernels/convolution*)
	$(BIN)/python -m pip install --no-deps --no-build-isolation --editable .
	$(BIN)/python -m pip check
	@touch $@

$(VENV)/dependencies: requirements.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 found: install one, or run make PYTHON=/path/to/python" >&2; exit 2; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version). This happens once and takes 2 to 10 minutes, more on a slow disk: pip downloads TensorFlow,"
	@echo "JAX and about 130 smaller packages, naming each, then installs them in silence for some minutes."
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-deps --requirement requirements.txt
	@touch $@

clean: ## remove .venv and the tools' caches; runs/ stays
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .coverage* *.egg-info
