# make demo   everything on real physics: data, training, export, evaluation with a report   (some forty minutes, 2 cores)
# make test   the tests, test-all   with the longest; make lint   format, lint, types; they install what is missing
# make test-cpp   builds the controller in C++ and runs it; needs cmake and a C++ compiler
# make test-robosuite   the tests of the second simulator, in an environment of its own: it wants numpy below 2
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ROBOSUITE_VENV := .venv-robosuite
DATA ?= data/metaworld
RUN ?= runs/kairos_tiny
# Reduced runs add their settings here; `make demo-small` shows how.
GENERATE_ARGS ?=
TRAIN_ARGS ?=
EXPORT_ARGS ?=
EVAL_ARGS ?=
# Threads that spin for long while they wait make a busy machine many times slower.
export GOMP_SPINCOUNT ?= 20000

.PHONY: demo demo-small test test-all test-cpp test-robosuite lint format clean
.DELETE_ON_ERROR:

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e '.[sim,pusht,export,serve,formats,remote,ray,finetune,dev]'
	@# The server's tests drive it with openpi's own client, whose wish for numpy below 2 is older than its code.
	$(BIN)/pip install --quiet --no-deps 'openpi-client==0.1.2'
	touch $@

$(ROBOSUITE_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(ROBOSUITE_VENV)
	$(ROBOSUITE_VENV)/bin/pip install --quiet --upgrade pip
	$(ROBOSUITE_VENV)/bin/pip install --quiet -e '.[robosuite]' 'pytest>=9'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m worldmodel.data generate metaworld $(DATA) $(GENERATE_ARGS)
	$(BIN)/python train.py experiment=kairos_tiny $(TRAIN_ARGS)
	test -f $(RUN)/artefact/manifest.json || $(BIN)/python -m export build checkpoint=$(RUN) out=$(RUN)/artefact data=$(DATA) $(EXPORT_ARGS)
	$(BIN)/python eval.py checkpoint=$(RUN) closed_loop=true $(EVAL_ARGS)

demo-small: ## The same commands at a size that takes minutes; its figures mean nothing.
	$(MAKE) demo DATA=data/small RUN=runs/small \
		GENERATE_ARGS="--tasks drawer-close-v3 button-press-topdown-v3 drawer-open-v3 --episodes 4 --heldout-episodes 2 --heldout-task-episodes 2" \
		TRAIN_ARGS="data.root=data/small run_dir=runs/small phases.tokeniser.steps=10 phases.understanding.steps=6 phases.locate.steps=6 phases.compositor.steps=4 phases.synthesis.steps=4 phases.behaviour.steps=20 phases.policy.steps=6 phases.policy.batch_size=16" \
		EXPORT_ARGS="observations=1 ticks=2 clips=16 latency_ticks=20 paths=[policy]" \
		EVAL_ARGS="max_clips=8 missing_clips=4 trials=1 baseline_steps=50"

test: $(VENV)/.installed ## Files of tests run side by side, each test on one thread.
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not exhaustive"

test-all: $(VENV)/.installed ## With those that repeat a long run on other numbers of processes.
	$(BIN)/python -m pytest

test-cpp: $(VENV)/.installed
	@command -v $${CXX:-g++} >/dev/null || command -v clang++ >/dev/null || { echo 'test-cpp needs a C++ compiler (CXX, g++ or clang++)' >&2; exit 1; }
	$(BIN)/python -m pytest tests/test_cpp.py

test-robosuite: $(ROBOSUITE_VENV)/.installed
	$(ROBOSUITE_VENV)/bin/python -m pytest tests/test_robosuite.py

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache
