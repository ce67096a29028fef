# Common development commands. `make demo` and `make test` need nothing but Python and a package index.
# The targets for a GPU also run without an index, on the packages of the machine: `make gpu-check PY=python3`.
PYTHON ?= python3
PROMPT ?= an apple on a blue background
MINUTES ?= 25
RECIPE_MINUTES ?= 3
BIN := .venv/bin
VENV := .venv/.made
RUNTIME := .venv/.runtime
STAMP := .venv/.installed
# Python compiles the modules that it imports; pip would compile all of 22,000 for more than a minute.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
PY ?= $(BIN)/python
JOBS ?= 12
COMFYUI_PYTHON ?= $(BIN)/python
export COMFYUI_DIR
# The environment is installed without bytecode. Where Python may not write it either, as in many containers, each of
# hundreds of processes compiles all that it imports.
unexport PYTHONDONTWRITEBYTECODE
RESULTS ?= benchmarks/results
HUB := $(if $(OWNER),--owner $(OWNER)) $(if $(PUSH),--push)
CPU_INDEX := "Without an NVIDIA GPU, Linux needs 0.2 instead of 3 GB to download if PyTorch comes from its index for CPUs:" \
	"set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu."
SETUP_UNLESS_PY := $(if $(filter $(BIN)/python,$(PY)),setup)

.PHONY: setup demo test test-lowest test-versions check format host-tests test-comfyui gpu-check gpu-bench bench recipes compile-kernels warm-cache tables study train-bundled train-bundled-vila-u prepare-data docs dist hub-kernels hub-checkpoints

setup: $(STAMP)  ## .venv with what tests, checks and docs need

$(VENV):
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and \
		'Python 3.11 or newer is needed, $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12' % sys.version_info[:2])"
	@$(PYTHON) -m venv .venv
	@touch $@

$(RUNTIME): pyproject.toml constraints.txt | $(VENV)
	@echo "Installing PyTorch, diffusers and transformers into .venv, once: one to two minutes."
	@echo $(CPU_INDEX)
	@$(INSTALL) -e .
	@touch $@

$(STAMP): pyproject.toml constraints.txt | $(VENV)
	@echo "Installing the package and what tests, checks, docs and all extras need into .venv, once: about two minutes."
	@echo $(CPU_INDEX)
	@$(INSTALL) -e ".[dev]"
	@touch $(RUNTIME) $@

demo: $(RUNTIME)  ## writes an image of PROMPT from the bundled checkpoint and prints its path
	@echo "Generating on the GPU if there is one, else on the CPU: loading takes seconds, the image a second or two."
	$(BIN)/diffusers-sana generate "$(PROMPT)"

test: setup  ## the whole CPU suite
	$(BIN)/pytest -n 2 --timeout 600 --dist loadfile --no-loadscope-reorder -m "not gpu"

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

test-comfyui: $(if $(filter $(BIN)/python,$(COMFYUI_PYTHON)),setup)  ## example workflows in a real server: COMFYUI_DIR=checkout
	$(COMFYUI_PYTHON) -m tools.test_comfyui

gpu-check: $(SETUP_UNLESS_PY)  ## on a GPU: every kernel against its reference, and what only a GPU can show
	$(PY) -m pytest tests/kernels tests/test_gpu.py -n $(JOBS) --dist worksteal \
		--ignore tests/kernels/test_compile_kernels.py --ignore tests/kernels/cpu/test_int8_linear.py

gpu-bench: $(SETUP_UNLESS_PY)  ## on a GPU, in 10 minutes: kernels, steps, autoencoder, images, VILA-U; writes into RESULTS
	$(PY) -m benchmarks.bench_gpu --results $(RESULTS)

bench: setup  ## models at true size on this machine, ours beside diffusers'
	$(BIN)/python -m benchmarks.bench_models

recipes: setup  ## trains by each recipe on the bundled checkpoint for RECIPE_MINUTES; fails where a gain is not sure
	$(BIN)/python -m benchmarks.recipes --minutes $(RECIPE_MINUTES)

compile-kernels: setup  ## kernels that have changed, for six architectures, without a GPU: registers, shared memory, spills
	$(BIN)/python -m benchmarks.compile_kernels --reuse benchmarks/results/compile/kernels.json

warm-cache: $(SETUP_UNLESS_PY)  ## kernels for sm_90 as Triton's cache, without a GPU, in build/triton.tar.xz; PY with the GPU host's triton
	$(PY) -m benchmarks.warm_cache build/triton.tar.xz

tables: setup  ## the tables of docs from benchmarks/results
	$(BIN)/python -m benchmarks.tables

study: setup  ## solvers on flows with known answers: results, table, image
	$(BIN)/python benchmarks/study_flow_solvers.py

docs: setup  ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

dist: setup  ## wheel and sdist for a package index, checked, with their sizes, in dist/; publish: twine upload dist/*
	$(INSTALL) -e ".[publish]"
	$(BIN)/python -m tools.publish.dist

hub-kernels: setup  ## the operations as a kernel repository for the Hub, in build/hub; publish: OWNER=name PUSH=1
	$(BIN)/python -m tools.publish.kernels $(HUB)

hub-checkpoints: setup  ## the bundled checkpoints, in 16 and 4 bits, for the Hub, in build/hub; publish: OWNER=name PUSH=1
	$(BIN)/python -m tools.publish.checkpoints $(HUB)

outputs/emoji.zip:
	$(BIN)/python -m examples.train_emoji.prepare_data --size 128 --out $@

outputs/emoji-256.zip:
	$(BIN)/python -m examples.train_emoji.prepare_data --out $@

prepare-data: setup outputs/emoji.zip outputs/emoji-256.zip

train-bundled: setup outputs/emoji-256.zip  ## retrains everything bundled at 256 px within MINUTES
	$(BIN)/python -m examples.train_emoji.run --data outputs/emoji-256.zip --out outputs/bundled --minutes $(MINUTES)

train-bundled-vila-u: setup outputs/emoji.zip  ## retrains diffusers_sana/checkpoints/vila-u-emoji within MINUTES
	$(BIN)/python -m examples.train_vila_u_emoji.run --data outputs/emoji.zip --out outputs/vila-u-emoji --minutes $(MINUTES)
