# `make demo` and `make test` work on a fresh machine with Python 3.10 or later and access to PyPI.
PYTHON ?= python3
VENV ?= .venv
CACHE ?= .cache
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-quick lint format bench clean

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "mlxq needs Python 3.10 or later: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/fetch_smollm2.py $(CACHE)
	$(BIN)/mlxq convert $(CACHE)/SmolLM2-135M-Instruct.Q4_1.gguf -o demo/smollm2-4bit --bits 4 --group-size 32 --overwrite
	$(BIN)/mlxq generate demo/smollm2-4bit --prompt 'What is the capital of France?' --max-tokens 60 --temperature 0

test: lint
	$(BIN)/python examples/fetch_smollm2.py $(CACHE)
	$(BIN)/python -m pytest -n auto --dist loadfile

test-quick: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile -m 'not slow'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python examples/fetch_smollm2.py $(CACHE)
	$(BIN)/python bench/make_reference.py $(CACHE)/SmolLM2-135M-Instruct.Q4_1.gguf $(CACHE)/reference
	$(BIN)/python bench/startup.py
	$(BIN)/python bench/convert.py $(CACHE)/reference
	$(BIN)/python bench/generate.py $(CACHE)/reference
	$(BIN)/python bench/quality.py $(CACHE)/reference

clean:
	rm -rf $(VENV) build dist demo *.egg-info
