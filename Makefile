PYTHON ?= python3.11
export OMP_NUM_THREADS ?= 1
BIN := .venv/bin

.PHONY: setup demo test slow faults faults-shapes soak check docs

setup: .venv/.ready

# torch first: its CPU build must be there before anything asks for "a" torch.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/python -m learner.run

# Two files at a time, Ray's one after the other.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup

slow: setup
	$(BIN)/python -m pytest -m slow

# The whole kill matrix, the driver killed at every point of its protocol, hosts cut off.
faults: setup
	$(BIN)/python -m pytest -m faults tests/faults

# Its cells once more, around the embedded model instead of emulated compute.
faults-shapes: setup
	$(BIN)/python -m pytest -m shapes tests/faults

soak: setup
	$(BIN)/python tests/faults/soak.py

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist loadgroup

# The site of docs/ into build/site; a broken link fails (with --quiet mkdocs would count none). Open build/site/index.html.
docs: .venv/.docs
	$(BIN)/python docs/site/settings.py
	$(BIN)/python -m mkdocs build --strict

.venv/.docs: .venv/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@
