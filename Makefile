# make demo   trains a small model on real text with its activations swapped and partly rebuilt
# make test   lint, types and tests; what .ci/run calls
# make bench-smoke   the benchmark harness on tiny shapes on the CPU: fresh rows and their table, in two minutes
#
# All make an environment in .venv first. Stamp files keep a second run from installing anything again.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Test processes side by side, each with one thread and a half of the tests in order: what a file shares stays in one.
JOBS ?= 2

BIN := $(VENV)/bin
# Of the packages a quarter is ever imported: Python compiles what is, when it is, and keeps that whatever the
# environment says, since tests start Python many times.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile
export PYTHONDONTWRITEBYTECODE :=
# Compiles what tests need of PyTorch while pip works at the rest, which would be twice, in two test processes at once.
WARM := $(BIN)/python -W ignore -c 'import torch._dynamo, torch._inductor.compile_fx, torch.export' 2>/dev/null
NATIVE := $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.hpp)

.PHONY: demo test bench-smoke clean

demo: $(VENV)/.installed
	$(BIN)/python examples/train_text.py --compare

# All of it runs even when a part fails, so that one run tells everything.
test: $(VENV)/.installed-dev
	@status=0; \
	echo "== mypy, in the background"; $(BIN)/python -m mypy & types=$$!; \
	echo "== ruff";   $(BIN)/python -m ruff check . || status=1; \
	echo "== sizes";  $(BIN)/python -m tests.house.sizes || status=1; \
	echo "== pytest"; $(BIN)/python -m pytest -n $(JOBS) --dist worksteal || status=1; \
	wait $$types || status=1; \
	exit $$status

# Shows that every contender runs and how rows look; the times of shapes this small mean nothing.
bench-smoke: $(VENV)/.installed
	@rm -f out/bench_smoke.jsonl
	OMP_NUM_THREADS=1 $(BIN)/memo bench run --run smoke --out out/bench_smoke.jsonl --device cpu \
	  --geometry tiny --blocks 2 --lengths 256,512 --steps 2 --budget-from selective \
	  --contenders kernels,unwrapped,selective,memo-auto,checkpoint,save_on_cpu
	OMP_NUM_THREADS=1 $(BIN)/memo bench run --run smoke-longest --out out/bench_smoke.jsonl --device cpu \
	  --geometry tiny --blocks 2 --lengths 256,512 --rehearse --contenders checkpoint,memo-auto
	OMP_NUM_THREADS=1 $(BIN)/memo bench run --run smoke-real --out out/bench_smoke.jsonl --device cpu \
	  --geometry tiny --blocks 2 --confirm smoke-longest --contenders checkpoint,memo-auto
	OMP_NUM_THREADS=1 $(BIN)/memo bench run --run smoke-step --out out/bench_smoke.jsonl --device cpu --scope step \
	  --geometry tiny --lengths 256 --steps 1 --contenders unwrapped,memo-auto
	$(BIN)/memo bench table out/bench_smoke.jsonl --run smoke
	$(BIN)/memo bench table out/bench_smoke.jsonl --run smoke-longest --confirmed smoke-real
	$(BIN)/memo bench table out/bench_smoke.jsonl --run smoke-step

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "memo-runtime needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	         "Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
# First and alone, so that nothing below pulls another torch.
	$(PIP) '$(TORCH)'
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(NATIVE)
	$(PIP) --editable '.[hf]' '$(TORCH)'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml setup.py $(NATIVE)
	@$(WARM) & $(PIP) --editable '.[dev]' '$(TORCH)'; status=$$?; wait; exit $$status
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist *.egg-info solver/memo_solver/_search.so memo_runtime/native/_core.so memo_runtime/allocator/_alloc_*.so
