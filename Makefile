# Common development commands. `make demo` and `make test` need nothing but Python and a package index.
# The targets for a GPU also run without an index, on the packages of the machine: `make gpu-check PY=python3`.
PYTHON ?= python3
PROMPT ?= a red apple on a blue background
MINUTES ?= 25
BIN := .venv/bin
STAMP := .venv/.installed
PY ?= $(BIN)/python
JOBS ?= 12
RESULTS ?= benchmarks/results
SETUP_UNLESS_PY := $(if $(filter $(BIN)/python,$(PY)),setup)

.PHONY: setup demo test test-lowest test-versions check format host-tests gpu-check gpu-bench bench compile-kernels tables study train-bundled train-autoencoder train-transformer train-bundled-vila-u prepare-data docs

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: setup  ## writes an image of PROMPT from the bundled checkpoint and prints its path
	$(BIN)/diffusers-sana generate "$(PROMPT)"

test: setup  ## the whole CPU suite
	$(BIN)/pytest -n 2 --dist loadfile -m "not gpu"

test-lowest: setup  ## import, generate and quantize with the oldest versions of pyproject.toml
	$(BIN)/python -m tools.test_versions lowest --smoke

test-versions: setup  ## tests that depend on versions, with the oldest ones and with a GPU host's; downloads 5 GB
	$(BIN)/python -m tools.test_versions lowest gpu-host gpu-host-overlay

check: setup  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

host-tests: setup  ## the hosts' own tests on our classes, see tools/host_tests/README.md: DIFFUSERS=checkout TRANSFORMERS=sources
	$(BIN)/pip install --quiet --disable-pip-version-check parameterized pytest-timeout requests-mock
	CLASSES=$(CLASSES) $(BIN)/python -m tools.host_tests.run $(if $(DIFFUSERS),--diffusers $(DIFFUSERS)) \
		$(if $(TRANSFORMERS),--transformers $(TRANSFORMERS))

gpu-check: $(SETUP_UNLESS_PY)  ## on a GPU: every kernel against its reference, and what only a GPU can show
	$(PY) -m pytest tests/kernels tests/test_gpu.py -n $(JOBS) --dist worksteal \
		--ignore tests/kernels/test_compile_kernels.py --ignore tests/kernels/cpu/test_int8_linear.py

gpu-bench: $(SETUP_UNLESS_PY)  ## on a GPU, in 10 minutes: kernels, steps, autoencoder, images, VILA-U; writes into RESULTS
	$(PY) -m benchmarks.bench_gpu --results $(RESULTS)

bench: setup  ## models at true size on this machine, ours beside diffusers'
	$(BIN)/python -m benchmarks.bench_models

compile-kernels: setup  ## every kernel for six architectures, without a GPU: registers, shared memory, spills
	$(BIN)/python -m benchmarks.compile_kernels

tables: setup  ## the tables of docs from benchmarks/results
	$(BIN)/python -m benchmarks.tables

study: setup  ## solvers on flows with known answers: results, table, image
	$(BIN)/python benchmarks/study_flow_solvers.py

docs: setup  ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

outputs/emoji.zip:
	$(BIN)/python -m examples.train_emoji.prepare_data --out $@

outputs/emoji-256.zip:
	$(BIN)/python -m examples.train_emoji.prepare_data --size 256 --out $@

prepare-data: setup outputs/emoji.zip outputs/emoji-256.zip

train-bundled: setup outputs/emoji.zip  ## retrains diffusers_sana/checkpoints/sana-emoji within MINUTES
	$(BIN)/python -m examples.train_emoji.run --data outputs/emoji.zip --out outputs/sana-emoji --minutes $(MINUTES)

train-autoencoder: setup outputs/emoji-256.zip  ## goes on with the autoencoder for 256 px for MINUTES, in three phases
	$(BIN)/python -m examples.train_emoji.autoencoder --data outputs/emoji-256.zip --out outputs/autoencoder \
		--minutes $(MINUTES) --save-state

train-transformer: setup outputs/emoji-256.zip  ## goes on with the transformer for 256 px for MINUTES, on the kept autoencoder
	$(BIN)/python -m examples.train_emoji.transformer --data outputs/emoji-256.zip --vae examples/train_emoji/state/autoencoder \
		--out outputs/sana-emoji-256 --minutes $(MINUTES)

train-bundled-vila-u: setup outputs/emoji.zip  ## retrains diffusers_sana/checkpoints/vila-u-emoji within MINUTES
	$(BIN)/python -m examples.train_vila_u_emoji.run --data outputs/emoji.zip --out outputs/vila-u-emoji --minutes $(MINUTES)
