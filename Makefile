# bagssl. Every target works on a fresh checkout: what is missing is set up first, into .venv.
# Another interpreter for the set-up: make PYTHON=/path/to/python3
# PyTorch in the lock's version from its own index, without CUDA's 3 GB: make TORCH=cpu (or another of uv's --torch-backend)

PYTHON ?= python3
TORCH ?=
BIN := .venv/bin
LOCK := requirements.lock
READY := .venv/.ready

# .venv/.ready names the checkout whose complete environment this is. Without it (an interrupted set-up), in a
# folder that was moved, or when its interpreter is gone, the environment is made anew; one that is older than
# the lock is brought up to date.
SOUND := $(shell [ "`cat $(READY) 2>/dev/null`" = "`pwd`" ] && $(BIN)/python -c '' 2>/dev/null && echo yes)

# Wheels of hundreds of megabytes need patience; figures in notebooks need the notebook's own backend.
export UV_HTTP_TIMEOUT ?= 300
unexport MPLBACKEND VIRTUAL_ENV CONDA_PREFIX PYTHONHOME

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help reproduce test test-all test-lowest test-browser lab notebooks docs lint lock clean unsound

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

reproduce: $(READY)  ## every notebook with the profile smoke, on the embedded data, into results/smoke
	@$(BIN)/bagssl reproduce --profile smoke --jobs 2

# One thread in each of several processes: on small tensors that is faster than threads, and processes whose threads
# wait for each other by spinning bring a machine to a halt.
NBVAL := --nbval --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg --nbval-cell-timeout 600
test: $(READY)  ## pytest over tests/ and nbval over notebooks/, in one session, file by file on all cores
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:cacheprovider -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder \
		$(NBVAL) notebooks tests

# The notebooks once more, their models too, with the instructions of an old processor: other sums, the same verdicts.
test-all: $(READY)  ## everything: as test, with the long tests, then the browser; two hours on two cores
	@BAGSSL_FUZZ=nightly OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:cacheprovider -n logical --maxprocesses 8 --dist loadfile \
		--no-loadscope-reorder -m "not browser" $(NBVAL) notebooks tests
	@store=`mktemp -d`; trap 'rm -rf "$$store"' EXIT; BAGSSL_RUNS=$$store ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 \
		MKL_ENABLE_INSTRUCTIONS=SSE4_2 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:cacheprovider -n logical --maxprocesses 8 \
		--dist loadfile $(NBVAL) notebooks
	@$(MAKE) test-browser

# What pyproject.toml lets in is what was seen to work; nbval is left out, as other versions draw other pixels.
test-lowest: $(READY)  ## the tests with the lowest versions that pyproject.toml allows, in .venv-lowest; half an hour
	@$(BIN)/uv pip compile pyproject.toml --extra test --resolution lowest-direct --quiet -o .venv/lowest.txt
	@$(BIN)/python -m venv --clear --without-pip .venv-lowest
	@$(BIN)/uv pip install --python .venv-lowest/bin/python --quiet -r .venv/lowest.txt
	@OMP_NUM_THREADS=1 PYTHONPATH="`pwd`" .venv-lowest/bin/python -m pytest -p no:cacheprovider -n logical --maxprocesses 8 \
		--dist loadfile --no-loadscope-reorder tests

# Debian's or the reader's own browser: what Playwright would download is neither needed nor asked for.
test-browser: $(READY)  ## JupyterLab in a headless Chromium, all notebooks or NOTEBOOK=00_tour; screenshots: results/browser
	@for name in "$$CHROMIUM" chromium chromium-browser google-chrome; do command -v "$$name" >/dev/null && exit; done; \
		if [ `id -u` = 0 ] && command -v apt-get >/dev/null; then \
			apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium >/dev/null && exit; fi; \
		echo "bagssl: no browser found: install Chromium (Debian: apt install chromium) or Chrome, or name one by CHROMIUM=" >&2; exit 1
	@$(BIN)/python -m pytest -p no:cacheprovider -m browser $(if $(NOTEBOOK),-k "$(NOTEBOOK) or the_lab") tests/test_browser.py

# Root, in a container, is not refused: the address that JupyterLab prints has a token.
lab: $(READY)  ## JupyterLab, opened at the tour; with options: make lab LAB=--no-browser
	@$(BIN)/jupyter lab --ServerApp.root_dir=notebooks --LabApp.default_url=/lab/tree/00_tour.ipynb \
		$(if $(filter 0,$(shell id -u)),--allow-root) $(LAB)

notebooks: $(READY)  ## execute the committed notebooks again (profile smoke) and normalise them
	@$(BIN)/bagssl notebooks

docs: $(READY)  ## pages of the code and the notebooks: build/docs/index.html
	@$(BIN)/bagssl docs

lint: $(READY)  ## ruff
	@$(BIN)/ruff check --no-cache .

# Pins that still fit are kept; make lock UPGRADE=--upgrade takes the newest versions.
lock: $(READY)  ## resolve requirements.lock again from pyproject.toml
	@$(BIN)/uv pip compile pyproject.toml --extra test --extra setup --universal --python-version 3.11 \
		--fork-strategy fewest --generate-hashes --custom-compile-command "make lock" --quiet $(UPGRADE) -o $(LOCK)

clean:  ## remove .venv and what tools leave behind; data/ and results/ stay
	@rm -rf .venv .venv-lowest *.egg-info build .pytest_cache .hypothesis .ruff_cache
	@find bagssl tests notebooks \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# uv and setuptools come from the lock, by pip and with hashes; uv then installs exactly the lock, and
# setuptools builds what has no wheel: before the rest and by a plain path, as it takes a $ in a path for a variable;
# uv keeps the wheel. Compiled bytecode spares each kernel seconds at its start.
# Where nothing may be written to the home folder uv's cache is one that goes when the set-up is done.
UV_CACHE := $(shell cache="$${UV_CACHE_DIR:-$${XDG_CACHE_HOME:-$$HOME/.cache}/uv}"; there="$$cache"; \
	while [ ! -e "$$there" ]; do there=`dirname "$$there"`; done; \
	if [ -w "$$there" ]; then echo "$$cache"; else echo "$${TMPDIR:-/tmp}/bagssl-uv-`id -u`"; fi)
$(READY): export UV_CACHE_DIR := $(UV_CACHE)
$(READY): $(LOCK) pyproject.toml $(if $(SOUND),,unsound)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "bagssl: '$(PYTHON)' is not Python 3.11 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "bagssl: '$(PYTHON)' has no venv: on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
	@echo "bagssl: setting up .venv (about $(if $(filter cpu,$(TORCH)),0.5,3) GB to download the first time)"
	@if [ -n "$(SOUND)" ]; then rm $(READY); else $(PYTHON) -m venv --clear .venv; fi
	@awk '/^[^ ]/ {keep = /^(uv|setuptools)==/} keep' $(LOCK) > .venv/bootstrap.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps \
		-r .venv/bootstrap.txt
	@awk '/^[^ ]/ {keep = /^antlr4-python3-runtime==/} keep' $(LOCK) > .venv/built.txt
	@plain=`mktemp -d` && ln -s "`pwd`/.venv" "$$plain/venv" && \
		$(BIN)/uv pip install --python "$$plain/venv/bin/python" --quiet --require-hashes --no-deps \
		--no-build-isolation --target "$$plain/built" -r .venv/built.txt && rm -rf "$$plain"
	@awk '/^[^ ]/ {keep = "$(TORCH)" == "" || !/^(torch|torchvision|triton|nvidia-.*|cuda-.*)==/} keep' $(LOCK) \
		> .venv/locked.txt
	@$(BIN)/uv pip sync --python $(BIN)/python --quiet --require-hashes --no-build-isolation \
		--compile-bytecode .venv/locked.txt
	@[ -z "$(TORCH)" ] || $(BIN)/uv pip install --python $(BIN)/python --quiet --compile-bytecode \
		--torch-backend "$(TORCH)" `awk '/^(torch|torchvision)==/ {print $$1}' $(LOCK)` || { echo "bagssl: TORCH=$(TORCH) \
	needs the index of PyTorch, which is not PyPI; where that cannot be reached: make, without TORCH" >&2; exit 2; }
	@$(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps --no-build-isolation -e .
	@case "$$UV_CACHE_DIR" in */bagssl-uv-*) rm -rf "$$UV_CACHE_DIR";; esac
	@pwd > $(READY)

unsound:
