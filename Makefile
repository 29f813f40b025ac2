# Every target does its own set-up first; it is redone when pyproject.toml or the script changes.

.DEFAULT_GOAL := help
.PHONY: help setup check test fleet torture demo bench paper clean
.DELETE_ON_ERROR:

BIN := .venv/bin
READY := .venv/.ready

# Wall-clock limits in seconds, far above what a run takes: they end a run that hangs.
CHECK_LIMIT := 900
ENGINE_LIMIT := 4200
ENGINE_TEST_LIMIT := 600

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## .venv with vLLM's CPU build, NIXL, this package and the development tools

$(READY): pyproject.toml scripts/setup.sh
	@scripts/setup.sh
	@touch $@

check: $(READY) ## format, lint, strict types, import contracts, tests without engines
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy --strict
	$(BIN)/lint-imports --no-logo
	timeout --foreground --kill-after=10 $(CHECK_LIMIT) \
		$(BIN)/pytest -m "not engine and not gpu and not long and not fleet" --session-timeout=$(CHECK_LIMIT)

test: check ## the whole test suite: check, then the tests that start real vLLM engines
	timeout --foreground --kill-after=30 $(ENGINE_LIMIT) \
		$(BIN)/pytest -m "(engine or long) and not gpu and not fleet" --durations=25 --timeout=$(ENGINE_TEST_LIMIT) --session-timeout=$(ENGINE_LIMIT)

fleet: $(READY) ## several hosts: network namespaces with a raylet in each (root; Ray in an environment of its own)
	scripts/fleet.sh

torture: $(READY) ## 20,000 worlds of the server's side over pretended engines (RUNS=N for another number)
	$(BIN)/python tests/torture/torture.py --runs $(or $(RUNS),20000)

demo: $(READY) ## two vLLM instances on the CPU, a server, and 40 requests that flow between them
	$(BIN)/taichi demo

bench: $(READY) ## what deciding and simulating cost (pytest-benchmark); serving: benchmarks/overhead.py, moves.py, leaks.py
	$(BIN)/pytest benchmarks -s
	PYTHON=$(CURDIR)/$(BIN)/python scripts/compile.sh
	PYTHONPATH=build/compiled $(BIN)/pytest benchmarks/test_simulating.py -s

paper: $(READY) ## docs/paper.md from simulation; TRACE=FILE is the CSV of arXiv summarization lengths
	$(BIN)/python scripts/paper.py $(TRACE)

clean: ## remove .venv, caches and build outputs
	rm -rf .venv .venv.log build dist .benchmarks .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find src tests scripts -type d -name __pycache__ -prune -exec rm -rf {} +
