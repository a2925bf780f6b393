# The commands of this repository. Each sets itself up: all that is needed is make and a Python from 3.11 on.
#
#   make tour     see it work: the whole story on real image files, in a temporary folder
#   make test     lint, then all tests            (make test ARGS='tests/unit -k align' for some of them)
#   make test-pythons   a quick part of the tests under every Python that is found, from 3.11 on
#   make lint     style, format and types
#   make bench    Lamina beside its peers: writes benchmarks/RESULTS.md   (make bench ARGS='--only start-up'; about 25 minutes)
#   make evidence the long suites for a chosen time: writes docs/evidence.md   (make evidence MINUTES=30)
#   make soak     the random tests for much longer, with interrupts, forks, closes, kills and hostile peers (over an hour)
#   make docs     write what pages say that is generated from the code
#   make docs-site   build the documentation site in the folder `site`, and end with an error at any broken link
#   make clean    remove what the others made
#   make help     print this

.PHONY: help tour test test-pythons lint bench evidence soak docs docs-site clean
.DEFAULT_GOAL := help

# Tests and tools start thousands of programs: without its bytecode each compiles Lamina anew, for 0.1 s of CPU.
unexport PYTHONDONTWRITEBYTECODE

# The virtual environment that everything runs in, and its programs.
VENV := .venv
PIP  := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet --quiet

help:
	@sed -n 's/^#   \(make .*\)/\1/p' Makefile

tour: $(VENV)/.run
	$(VENV)/bin/python tour/tour.py $(ARGS)

# Two workers, and each file of tests stays on one of them: its fixtures are made once.
test: lint
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

# Others than those on the path: LAMINA_PYTHONS=/place/of/python3.14:/another make test-pythons
test-pythons: $(VENV)/.made
	$(VENV)/bin/python tests/pythons.py $(ARGS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

soak: $(VENV)/.dev
	LAMINA_CRASH_STATES=1000000 LAMINA_TWINS=3000 LAMINA_STACKS=50000 LAMINA_CONCURRENT=1000000 LAMINA_FUZZ_SECONDS=300 \
	LAMINA_NBD_FUZZ=1000000 LAMINA_NBD_KILLS=400 LAMINA_NBD_SEVERAL=200 LAMINA_INTERRUPTS=all LAMINA_CLOSE_INTERRUPTS=1 LAMINA_AIO_CANCELS=1000 \
	LAMINA_CLOSE_RACES=2000 LAMINA_TRUNCATE_RACES=3000 LAMINA_FORKS=400 LAMINA_SOAK_JOBS=400 LAMINA_SOAK_BACKING=3000 \
	LAMINA_HOSTILE_SERVERS=1 LAMINA_HOSTILE_CLIENTS=5000 LAMINA_OPTION_ROUNDS=100000 LAMINA_ROOTS=20 \
	LAMINA_LAYOUT_IMAGES=200000 LAMINA_QCOW2_MACHINE=10000 LAMINA_KILLS=200 LAMINA_EXPLAIN_ROUNDS=300 \
	LAMINA_INSPECT_ROUNDS=20000 LAMINA_SOAK_TOOLS=500 LAMINA_NBD_OPERATIONS=20000 \
	$(VENV)/bin/python -m pytest tests/crash tests/faults tests/interop/test_differential.py tests/unit/test_filter_stacks.py \
	tests/unit/test_concurrency.py tests/unit/test_roots_model.py tests/unit/test_image_close.py tests/unit/test_truncate_beside.py tests/unit/test_fork.py \
	tests/conformance/test_tool_invariants*.py tests/unit/test_convert_backing.py tests/unit/test_commit_rebase.py \
	tests/unit/test_nbd_client_interrupts.py tests/attacks/test_fuzz.py \
	tests/attacks/test_options.py tests/attacks/test_qcow2_layout.py tests/interop/test_qcow2_machine.py tests/interop/test_nbd_random_operations.py \
	tests/attacks/test_nbd_server_fuzz.py tests/attacks/test_nbd_client_fuzz.py \
	tests/attacks/test_nbd_client_silent.py tests/attacks/test_nbd_server_waits.py tests/attacks/test_nbd_server_folder.py \
	tests/conformance/test_nbd_server_several.py tests/conformance/test_nbd_server_closing.py \
	tests/conformance/test_nbd_server_long.py tests/unit/test_explain_qcow2.py tests/interop/test_inspect_oslo.py $(ARGS)

bench: $(VENV)/.run
	$(VENV)/bin/python -m benchmarks.run $(ARGS)

MINUTES ?= 30
evidence: $(VENV)/.dev
	$(VENV)/bin/python -m benchmarks.evidence --minutes $(MINUTES) $(ARGS)

docs: $(VENV)/.run
	$(VENV)/bin/python docs/nbd_protocol.py
	$(VENV)/bin/python docs/qcow2_format.py
	$(VENV)/bin/python docs/manual_pages.py
	$(VENV)/bin/python -m benchmarks.page
	$(VENV)/bin/python docs/json_page.py
	$(VENV)/bin/python docs/generated_parts.py
	$(VENV)/bin/python docs/status_pictures.py

docs-site: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Three stamps inside the environment, each made from the one before: the bare environment, Lamina with what it needs
# to run, and with what it is developed with. A change of pyproject.toml makes all three anew.
$(VENV)/.made: pyproject.toml
	@for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "making $(VENV) with $$($$python --version)"; \
	        $$python -m venv --clear $(VENV) || { echo "no virtual environment: install python3-venv" >&2; exit 1; }; \
	        touch $@; exit 0; \
	    fi; \
	done; echo "no Python from 3.11 on was found: install python3.11 or newer" >&2; exit 1

$(VENV)/.run: $(VENV)/.made
	@echo "installing Lamina"
	@$(PIP) install --editable '.[cli,crypto,fast]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "installing the tools of development"
	@$(PIP) install --editable '.[dev]'
	@touch $@
