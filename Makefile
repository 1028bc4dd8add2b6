# make search    the main job on bundled data, from nothing but Python 3.11+ to a report
# make check     format, lint, types, import order and the fast tests
# make test      check and the slow tests: what CI runs
# make coverage  docs/coverage.md: the classification models of torchvision, with Torch-Pruning beside, and of timm
# make kernels   compiles the sparse kernels in place (needs g++ or clang++; the install does it too where it can)
# make bench-kernels  docs/benchmarks/kernels.md and training.md: sparse layers against the best dense runtime, and training
# make han       docs/benchmarks/han.md: LeNet-300-100 and LeNet-5 as in Han et al. (2015), and runs/han/report.html
# make schemes   docs/benchmarks/schemes.md: accuracy against latency for channels, zeros and blocks; skips what is finished
# make results   the tables of docs/results.md; skips what docs/results has a record of (options: python -m experiments.studies.results --help)

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11

# One thread a test process: with several, they would fight over the same cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: install search check test coverage kernels bench-kernels han schemes results clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py $(wildcard pruning/kernels/csrc/*)
	@python=; for name in $(CANDIDATES); do \
	  if "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$name; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "Secateur needs Python 3.11 or newer; found none of: $(CANDIDATES)" >&2; exit 1; \
	fi; \
	if [ ! -x $(BIN)/python ]; then echo "creating $(VENV) with $$($$python --version)"; "$$python" -m venv $(VENV); fi
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[dev]"
	@touch $@

search: $(INSTALLED)
	$(BIN)/secateur search digits

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) -m "not slow and not bench and not gpu"

test: check
	$(PYTEST) -m "slow and not bench and not gpu"

coverage: $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e ".[coverage-benchmark]"
	$(BIN)/python -m experiments.studies.coverage

kernels: $(INSTALLED)
	$(BIN)/python setup.py build_ext --inplace

bench-kernels: kernels
	$(BIN)/python -m experiments.studies.bench_kernels
	$(BIN)/python -m experiments.studies.bench_training

han: $(INSTALLED)
	$(BIN)/python -m experiments.studies.han --page docs/benchmarks/han.md

schemes: kernels
	$(BIN)/python -m experiments.studies.schemes

results: $(INSTALLED)
	$(BIN)/python -m experiments.studies.results

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
