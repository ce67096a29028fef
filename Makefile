# The whole life of the project in a few words. `make demo` and `make test` need nothing but Python and a package index.
PYTHON ?= python3
PROMPT ?= a red apple on a blue background
MINUTES ?= 25
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo test check format gpu-check gpu-bench bench compile-kernels tables study train-bundled train-bundled-vila-u prepare-data docs

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: setup  ## writes a picture of PROMPT from the bundled checkpoint and prints its path
	$(BIN)/diffusers-sana generate "$(PROMPT)"

test: setup  ## the whole CPU suite
	$(BIN)/pytest -n 2 --dist loadfile -m "not gpu"

check: setup  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

gpu-check: setup  ## on a GPU: every kernel against its reference, and what only a GPU can show
	$(BIN)/pytest tests/kernels tests/test_gpu.py

gpu-bench: setup  ## on a GPU, in 10 minutes: kernels, steps, autoencoder, pictures, VILA-U
	$(BIN)/python -m benchmarks.bench_gpu

bench: setup  ## models at true size on this machine, ours beside diffusers'
	$(BIN)/python -m benchmarks.bench_models

compile-kernels: setup  ## every kernel for six architectures, without a GPU: registers, shared memory, spills
	$(BIN)/python -m benchmarks.compile_kernels

tables: setup  ## the tables of docs from benchmarks/results
	$(BIN)/python -m benchmarks.tables

study: setup  ## solvers on flows with known answers: results, table, picture
	$(BIN)/python benchmarks/study_flow_solvers.py

docs: setup  ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

outputs/emoji.zip:
	$(BIN)/python -m examples.train_emoji.prepare_data --out $@

prepare-data: setup outputs/emoji.zip

train-bundled: setup outputs/emoji.zip  ## retrains diffusers_sana/checkpoints/sana-emoji within MINUTES
	$(BIN)/python -m examples.train_emoji.run --data outputs/emoji.zip --out outputs/sana-emoji --minutes $(MINUTES)

train-bundled-vila-u: setup outputs/emoji.zip  ## retrains diffusers_sana/checkpoints/vila-u-emoji within MINUTES
	$(BIN)/python -m examples.train_vila_u_emoji.run --data outputs/emoji.zip --out outputs/vila-u-emoji --minutes $(MINUTES)
