# make demo   the main job: a real server on the CPU answers about a video, with and without PEVLM
# make check  format, lint, types and the unit tests that are quick: the inner loop
# make test   format, lint, types and all tests
# make soak   many clients at once and every disturbance, ten minutes (make test has two of them)
# make fuzz   ten thousand broken files and a thousand broken requests (make test has few of them)
# make mutants  a fault at a time in the code: the tests must see each; writes docs/mutants.md
# make docs   the pages in docs/ as a site
# make bench  everything that a GPU has to measure, in ten minutes (benchmarks/all.sh)
# make accuracy   all results, tables and figures of the small video model, in a quarter of an hour
# All install what they need first, into .venv. PYTHON=... names another interpreter than python3;
# ARGS=... goes to pytest or to the demo.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install check test soak fuzz mutants docs lint demo bench accuracy clean

install: $(INSTALLED)

# Touched last, so that an installation that failed half-way starts again.
$(INSTALLED): pyproject.toml tests/cpu_platform/pyproject.toml .ci/install
	@PYTHON="$(PYTHON)" .ci/install
	@touch $@

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# One thread a process: the processes are as many as the cores.
check: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 8 --dist worksteal \
		-m "not server and not slow" --hypothesis-profile fast $(ARGS)

test: lint
	$(BIN)/pytest $(ARGS)

soak: install
	$(BIN)/pytest -s tests/server/test_soak.py --soak-seconds 600 $(ARGS)

fuzz: install
	$(BIN)/pytest -s tests/media/test_fuzz.py tests/server/test_fuzz.py \
		--fuzz-files 10000 --fuzz-requests 1000 $(ARGS)

# ARGS="layout: observe:" runs the parts of these names.
mutants: install
	cd tests && ../$(BIN)/python -m support.mutants $(ARGS)

# Builds offline, strictly, into build/docs.
docs: install
	$(BIN)/mkdocs build --quiet

demo: install
	$(BIN)/python benchmarks/demo.py $(ARGS)

bench: install
	benchmarks/all.sh $(ARGS)

accuracy: install
	$(BIN)/python benchmarks/accuracy/evaluate.py
	$(BIN)/python benchmarks/accuracy/sweep.py
	$(BIN)/python benchmarks/accuracy/attention_scores.py
	$(BIN)/python benchmarks/accuracy/latency.py
	$(BIN)/python benchmarks/accuracy/tables.py
	$(BIN)/python benchmarks/accuracy/figures.py

# .venv stays: it takes minutes to build.
clean:
	rm -rf .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -r {} +
