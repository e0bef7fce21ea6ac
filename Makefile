.PHONY: compare test slow contracts check oldest bundled-model clean
TEXTS ?= ../shared/data
METHODS ?= adakv,chunkkv,compactor,expected_attention,h2o,keydiff,kvzip,quest,random,scissorhands,snapkv,streaming_llm

compare:           ## compare twelve methods on the bundled model and write a report
	@scripts/setup
	.venv/bin/sparing compare --model bundled --methods $(METHODS) --samples 10 --out results/bundled

test:              ## the quick tests
	@scripts/setup dev
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 -m "not slow"

slow:              ## the other tests: clusters, whole tunings, compilations
	@scripts/setup dev
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 -m slow

contracts:         ## the contract of every method on every tiny model
	@scripts/setup dev
	SPARING_ALL_MODELS=1 OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 tests/test_contracts.py

check:             ## format, lint, types
	@scripts/setup dev
	scripts/check

oldest:            ## contract tests on the oldest supported transformers
	@scripts/setup dev
	scripts/test-oldest

bundled-model:     ## train the bundled model again from a folder of texts (about two hours)
	@scripts/setup
	.venv/bin/python -m sparing.models.recipe --texts $(TEXTS) --out runs/bundled

clean:
	rm -rf .venv .venv-oldest results runs .pytest_cache .mypy_cache .ruff_cache
