# Recipes use relative paths only: the folder's name may hold spaces.
PYTHON := .venv/bin/python
TESTS ?= test
PYTEST_ARGS ?=
DEMO_ARGS ?=
RESULTS_ARGS ?=
CHECKED := python test benchmark contrib scripts

.DEFAULT_GOAL := help
.PHONY: help bootstrap demo results check findings test test-all test-flags test-versions test-front-ends test-load-generators
.PHONY: test-dynamo test-transfers lint format clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-20s %s\n", $$1, $$2 }' Makefile

bootstrap: ## build or update .venv (the targets below do it by themselves)
	@bash scripts/bootstrap.sh

demo: bootstrap ## stock SGLang against Kairos on real servers, on this machine (DEMO_ARGS=…)
	@$(PYTHON) -m benchmark.experiments.demo $(DEMO_ARGS)

results: bootstrap ## every simulated figure: docs/results/simulated.md (RESULTS_ARGS=…)
	@$(PYTHON) -m benchmark.experiments.results_simulated $(RESULTS_ARGS)

check: bootstrap ## the inner loop: lint, types, sentences, imports, unit tests that start no process (1.5 min)
	@CHECKED="$(CHECKED)" bash scripts/check.sh $(PYTEST_ARGS)

test: lint ## lint, then unit, simulator, end-to-end and fault tests (TESTS=…, PYTEST_ARGS=…)
	@bash scripts/pytest.sh -m "not slow" $(TESTS) $(PYTEST_ARGS)

test-all: lint ## the same with the slow ones
	@bash scripts/pytest.sh $(TESTS) $(PYTEST_ARGS)

test-dynamo: bootstrap ## NVIDIA Dynamo's workers with Kairos, on the SGLang that it pins (5 min)
	@bash scripts/beside.sh dynamo
	@bash scripts/pytest.sh test/e2e/test_dynamo.py $(PYTEST_ARGS)

test-flags: bootstrap ## SGLang's scheduling flags, all of them (an hour; KAIROS_FLAGS_SEED=…, PYTEST_ARGS="-k …")
	@bash scripts/pytest.sh test/e2e/test_flags.py $(PYTEST_ARGS)

test-versions: lint ## every supported SGLang: seams, patches, identity (20 min; KAIROS_TEST_VERSIONS="0.5.19 …")
	@bash scripts/versions.sh $(PYTEST_ARGS)

test-front-ends: bootstrap ## real gateways before a pair; KAIROS_WRITE_TABLES=1 writes docs/front_ends.md (10 min)
	@bash scripts/beside.sh front-ends
	@bash scripts/pytest.sh test/e2e/test_front_ends.py $(PYTEST_ARGS)

test-load-generators: bootstrap ## GuideLLM, aiperf, inference-perf and bench_serving on real pairs (6 min; installs 7 GB)
	@bash scripts/beside.sh load-generators
	@bash scripts/pytest.sh test/e2e/test_load_generators.py $(PYTEST_ARGS)

test-transfers: bootstrap ## NIXL, mooncake_tcp, KV checksums, prefill_complete (30 min; KAIROS_TEST_VERSIONS=…)
	@bash scripts/transfers.sh $(PYTEST_ARGS)

findings: bootstrap ## what we found in other projects, run anew (up to 15 min; downloads packages, not in CI)
	@bash scripts/findings.sh

lint: bootstrap ## ruff and mypy
	@$(PYTHON) -m ruff check $(CHECKED)
	@$(PYTHON) -m ruff format --check $(CHECKED)
	@$(PYTHON) -m mypy

format: bootstrap ## let ruff rewrite what it can
	@$(PYTHON) -m ruff check --fix $(CHECKED)
	@$(PYTHON) -m ruff format $(CHECKED)

clean: ## remove out/ and the caches
	@rm -rf out build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache python/*.egg-info
	@find $(CHECKED) -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## remove .venv as well
	@rm -rf .venv
