# chunkgrpo: `make help` lists what there is. Every target prepares .venv first, once.
#
#   PYTHON=python3.12 make test    another interpreter (3.11 or newer)
#   TORCH_INDEX=URL make demo      PyTorch wheels from URL, e.g.
#                                  https://download.pytorch.org/whl/cu128 for CUDA 12.8
#
# On Linux without an NVIDIA driver the small CPU wheels are the default, instead of PyPI's CUDA
# ones. Where PIP_FIND_LINKS is set, wheels are expected there and no other index is added.

.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Without it mkdocs-material prints an advertisement at every build.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

ifeq ($(shell uname -s),Linux)
ifeq ($(shell command -v nvidia-smi)$(PIP_FIND_LINKS),)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
endif
endif
TORCH_OPTIONS := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: help install demo test attack mutate lint format docs docs-serve wheel bench audit sbom clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' \
		| awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

$(STAMP): pyproject.toml constraints.txt
	@[ -n "$(PYTHON)" ] && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "chunkgrpo needs Python 3.11 or newer; found: $$("$(PYTHON)" --version 2>&1 || true)." \
			"Name one with PYTHON=/path/to/python3.11 make ..." >&2; exit 1; }
	@[ -x $(BIN)/python ] || "$(PYTHON)" -m venv $(VENV)
	$(INSTALL) $(TORCH_OPTIONS) torch
	$(INSTALL) $(TORCH_OPTIONS) -e ".[dev]"
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(INSTALL) $(TORCH_OPTIONS) -e ".[dev,docs]"
	@touch $@

install: $(STAMP) ## Prepare the environment, .venv, and nothing else

demo: $(STAMP) ## Train on the built-in shapes world and show what was learned
	$(BIN)/chunkgrpo train

# Two workers of one thread each: more threads than cores would make both slower.
test: $(STAMP) ## Run the tests; core/ must be covered completely
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal \
		--cov=chunkgrpo.core --cov-report=term --cov-fail-under=100 $(PYTEST_OPTIONS)

mutate: $(STAMP) ## Break the code in one place at a time; a test must notice each
	$(BIN)/python tests/mutations/run.py

ATTACK_LOG := .attack.jsonl

attack: $(STAMP) ## Attack runs, settings, servers and disks in every known way; print the table
	@rm -f $(ATTACK_LOG)
	@CHUNKGRPO_ATTACK=full CHUNKGRPO_ATTACK_LOG=$(abspath $(ATTACK_LOG)) \
		OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal tests/attack \
		$(PYTEST_OPTIONS); code=$$?; \
		$(BIN)/python tests/attack/table.py $(ATTACK_LOG) benchmarks/results/attack.json docs/attacks.md \
		&& exit $$code

lint: $(STAMP) ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP) ## Repair what can be repaired automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DOCS_STAMP) ## Build the documentation into site/; a broken link is an error
	$(MKDOCS) build --strict

docs-serve: $(DOCS_STAMP) ## Show the documentation on http://127.0.0.1:8000 while it is written
	$(MKDOCS) serve --strict

wheel: $(STAMP) ## Build the wheel into dist/, install it somewhere else and train with it
	rm -f dist/chunkgrpo-*.whl
	$(BIN)/python -m build --wheel --no-isolation --outdir dist
	CHUNKGRPO_WHEEL="$$(echo dist/chunkgrpo-*.whl)" $(BIN)/pytest -q tests/test_wheel.py

bench: $(STAMP) ## Run the benchmarks of speed; each prints one table
	@set -e; for script in benchmarks/iteration.py benchmarks/verifier.py; do \
		echo "== $$script"; $(BIN)/python "$$script"; \
	done

# pip-audit has an environment of its own: what it needs must not change what is audited. Without
# a network it cannot be installed or cannot ask; then the check says that it did not run.
audit: $(STAMP) ## Look up known vulnerabilities of constraints.txt; says so where it could not
	@[ -x $(VENV)-audit/bin/pip-audit ] || { "$(PYTHON)" -m venv $(VENV)-audit && \
		$(VENV)-audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit; } \
		|| true
	@$(BIN)/python .ci/audit.py $(VENV)-audit/bin/pip-audit

sbom: $(STAMP) ## Write dist/sbom.json, the bill of materials (CycloneDX) of constraints.txt
	@$(BIN)/python .ci/sbom.py dist/sbom.json

clean: ## Remove the environment, caches and builds (runs/ stays)
	rm -rf $(VENV) $(VENV)-audit dist build site .coverage .coverage.* .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name '*.egg-info' -type d -prune -exec rm -rf {} +
