# Two commands are enough: `make demo` and `make test`. Each makes .venv first, from pinned versions.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
MODEL ?= micro-turbo

.PHONY: demo demo-dmdr serve test test-slow test-gpu lint docs bench clean

demo: $(VENV)/ready
	FEWSTEP_RESUME_COMMAND="make demo" $(BIN)/fewstep distill micro-turbo --out $(DEMO)

demo-dmdr: $(VENV)/ready  # trains the demo's student further with a reward; the report shows both beside the teacher
	@test -d $(DEMO)/student || { echo "error: $(DEMO)/student: no student to start from; run make demo first" >&2; exit 1; }
	FEWSTEP_RESUME_COMMAND="make demo-dmdr" $(BIN)/fewstep distill micro-dmdr --out $(DEMO)-dmdr

serve: $(VENV)/ready  # web page and API of a model: make serve MODEL=runs/demo/student
	$(BIN)/fewstep serve $(MODEL)

test: $(VENV)/dev lint
	$(BIN)/python -m pytest

test-slow: $(VENV)/dev
	$(BIN)/python -m pytest -m slow

test-gpu: $(VENV)/dev  # on a machine with a GPU
	$(BIN)/python -m pytest -m gpu -n 0

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: $(VENV)/dev  # docs/recipes.md from the recipes' models, docs/reference/errors.md from the tests' table
	$(BIN)/python -m fewstep.config.reference > docs/recipes.md
	PYTHONPATH=tests $(BIN)/python -m bad_inputs > docs/reference/errors.md

bench: $(VENV)/ready
	$(BIN)/python benchmarks/distill_speed.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/zimage.py

# torch first and alone: asked for by its exact version, pip takes the CPU build where one is offered.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fewstep needs Python 3.11 or newer; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,eval,serve]'
	touch $@

$(VENV)/dev: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs build
