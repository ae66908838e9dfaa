# The verbs of this house. Each works from a fresh clone: the first that needs .venv builds it, later ones reuse it.
# Choose an interpreter with PYTHON=python3.12, another environment with VENV=path.

VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
NEWEST := build/venv-newest

# No questions, no chatter: what pip prints is an error or worth reading. CI has no stdin to answer from.
export PIP_NO_INPUT := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP_INSTALL := -m pip install --quiet --progress-bar off

# Arithmetic in one thread a process: with more, two test workers on two cores fight for them.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

# Tests that share something dear, such as a running server, stay in one test worker.
SPREAD := -n $(JOBS) --dist loadgroup

# The first interpreter that is new enough and can make environments (Debian's needs the python3-venv package).
# Trying each matters: a name on the path may be a shim that only says it is not there.
define make_venv
"$(1)/bin/python" -m pip --version >/dev/null 2>&1 || { \
	found=; \
	for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python); do \
		"$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' </dev/null >/dev/null 2>&1 \
			&& { found=$$python; break; }; \
	done; \
	test -n "$$found" || { echo "No Python 3.11 or newer with venv found; set PYTHON=path/to/python3." >&2; exit 1; }; \
	"$$found" -m venv "$(1)"; \
}
endef

.PHONY: help demo test test-browser lint format docs test-newest clean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

$(VENV)/.installed: pyproject.toml constraints-cpu.txt
	@$(call make_venv,$(VENV))
	@echo "Installing speculens into $(VENV); this takes a minute or two, once."
	@"$(BIN)/python" $(PIP_INSTALL) --constraint constraints-cpu.txt --editable '.[dev]'
	@touch $@

demo: $(VENV)/.installed ## describe pictures with and without a drafter, on the CPU, and write a page
	@"$(BIN)/speculens" demo

test: $(VENV)/.installed ## run the tests
	@$(PYTEST) "$(BIN)/python" -m pytest $(SPREAD) --durations=15 $(ARGS)

# Apart from `test`: it needs a browser. Without one the tests are skipped, and say what to install.
test-browser: $(VENV)/.installed ## test the page of the server in headless Chromium
	@"$(BIN)/python" -c 'import selenium' 2>/dev/null || \
		"$(BIN)/python" $(PIP_INSTALL) --constraint constraints-cpu.txt --editable '.[dev,browser]'
	@$(PYTEST) "$(BIN)/python" -m pytest tests/browser $(ARGS)

lint: $(VENV)/.installed ## check rules, format and types
	@"$(BIN)/ruff" check .
	@"$(BIN)/ruff" format --check .
	@"$(BIN)/mypy"

format: $(VENV)/.installed ## format, and mend what can be mended by a rule
	@"$(BIN)/ruff" format .
	@"$(BIN)/ruff" check --fix .

docs: $(VENV)/.installed ## check the docs: links, paths, commands and options as the CLI has them
	@"$(BIN)/python" -m pytest --quiet tests/test_docs.py

# Resolved anew on every call, or it would soon not be the newest.
test-newest: ## run the tests with the newest transformers that pyproject.toml allows
	@$(call make_venv,$(NEWEST))
	@echo "Installing the newest allowed versions into $(NEWEST)."
	@"$(NEWEST)/bin/python" $(PIP_INSTALL) --upgrade --upgrade-strategy eager \
		"$$(grep '^torch==' constraints-cpu.txt)" --editable '.[dev]'
	@"$(NEWEST)/bin/python" -m pip list | grep -E '^(transformers|torch|huggingface_hub) '
	@$(PYTEST) "$(NEWEST)/bin/python" -m pytest $(SPREAD) --durations=15 $(ARGS)

clean: ## remove caches and build products; .venv stays
	@rm -rf build dist demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find src tests testbed benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
