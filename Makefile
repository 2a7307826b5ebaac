PYTHON ?= python3.11
export OMP_NUM_THREADS ?= 1
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup

.PHONY: setup demo test test-long test-all mutate faults faults-shapes soak gpu full-size lint check docs

setup: .venv/.ready

# torch first: its CPU build must be there before anything asks for "a" torch.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Trains, then judges against the exact target. What is there from an earlier time goes on, or is judged again.
demo: setup
	$(BIN)/python -m learner.run --config configs/demo.yaml run.dir=runs/demo
	$(BIN)/python -m learner.targets runs/demo --images 256

# The ordinary tests, two files at a time; what starts Ray one after the other.
test: setup
	$(PYTEST)

# Ordinary tests that take their time: in CI, beside those above.
test-long: setup
	$(PYTEST) -m 'long and not slow and not shapes'

# All others: longer than a minute each, the kill matrix, hosts cut off. Not the two below.
test-all: setup
	$(PYTEST) -m '(long or slow) and not shapes'

# Faults put into the code one by one, each of which tests must see (tests/mutations.py).
mutate: setup
	$(BIN)/python tests/mutations.py

# Of them those that break runs on purpose, beside their ordinary ones.
faults: setup
	$(BIN)/python -m pytest -m faults tests/faults

# The kill matrix once more, around the embedded model instead of emulated compute.
faults-shapes: setup
	$(BIN)/python -m pytest -m shapes tests/faults

# One run broken some sixty times at random.
soak: setup
	$(BIN)/python tests/faults/soak.py

# Correctness, speed and memory on one GPU, 8 minutes at most (docs/performance.md). Not of `setup`, whose torch is the
# CPU's: GPU_PYTHON is a python with a torch that finds the GPU, and what pyproject.toml names but Ray and MLflow.
GPU_PYTHON ?= $(BIN)/python
gpu:
	$(GPU_PYTHON) -m benchmarks.gpu $(GPU_FLAGS)

# The whole service once at Stable Diffusion 1.5's size with random weights, on a CPU, beside what --plan says; some 20
# minutes, 8 GB of memory and 3 GB of disk. MODEL=sdxl or sd35_medium: more of all.
full-size: setup
	$(BIN)/python -m benchmarks.full_size --model $(or $(MODEL),sd15)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

# The site of docs/ into build/site; a broken link fails (with --quiet mkdocs would count none). Open build/site/index.html.
docs: .venv/.docs
	$(BIN)/python docs/site/settings.py
	$(BIN)/python -m mkdocs build --strict

.venv/.docs: .venv/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@
