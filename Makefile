# `make demo` and `make test` work on a fresh machine with Python 3.10 or later and access to PyPI.
PYTHON ?= python3
VENV ?= .venv
CACHE ?= .cache
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-quick clang lint format bench bench-quality clean

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "mlxq needs Python 3.10 or later: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/fetch_smollm2.py $(CACHE)
	$(BIN)/mlxq convert $(CACHE)/SmolLM2-135M-Instruct.Q4_1.gguf --recipe portable -o demo/smollm2 -o demo/smollm2.gguf --overwrite
	$(BIN)/mlxq verify demo/smollm2 demo/smollm2.gguf
	$(BIN)/mlxq generate demo/smollm2 --prompt 'What is the capital of France?' --max-tokens 60 --temperature 0

test: lint clang
	$(BIN)/python examples/fetch_smollm2.py $(CACHE)
	$(BIN)/python -m pytest -n auto --dist loadfile

# The checker that runs Metal kernels on a CPU (tests/metal_on_cpu) needs clang 19; Debian and Ubuntu have it.
# Elsewhere, or where this may not install it, its tests are skipped by name; where CI is set they fail.
clang:
	@if [ "$$(uname)" = Linux ] && command -v apt-get >/dev/null \
	    && ! { command -v clang++-19 && command -v llvm-symbolizer-19; } >/dev/null; then \
	  [ "$$(id -u)" = 0 ] && sudo= || sudo='sudo -n'; \
	  { $$sudo apt-get update -qq; $$sudo apt-get install -y -qq --no-install-recommends clang-19 llvm-19 >/dev/null; } \
	    || echo 'clang-19 and llvm-19 could not be installed: Metal kernels are not checked'; \
	fi

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
	$(BIN)/python bench/gguf_files.py $(CACHE)/reference --gguf $(CACHE)/SmolLM2-135M-Instruct.Q4_1.gguf
	$(BIN)/python bench/encoders.py $(CACHE)/reference
	$(BIN)/python bench/quality_gguf.py $(CACHE)/reference

# Calibration against its peers, which takes an hour or more; interrupted, it goes on where it was. TEXT is a file, or python;
# QUALITY holds further options: --only, --calib, --width, --seed, --with-gptq.
TEXT ?= python
bench-quality: $(STAMP)
	$(BIN)/python examples/fetch_smollm2.py $(CACHE)
	$(BIN)/python bench/quality_calibrated.py $(CACHE)/SmolLM2-135M-Instruct.Q4_1.gguf --text $(TEXT) --scratch $(CACHE)/quality $(QUALITY)

clean:
	rm -rf $(VENV) $(CACHE)/metal_on_cpu build dist demo *.egg-info
