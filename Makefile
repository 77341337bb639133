# compress: one command each. `make demo` and `make test` work on a machine with nothing but Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
# Torch first, so that nothing else pulls in another build of it. TORCH_INDEX names another package index, if any.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
export PYTHONSAFEPATH = 1

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES = $(shell git ls-files '*.py' 2>/dev/null)

.PHONY: install demo check quick test fuzz faults slow kill readers engines readers-table formats cubins cpu-kernels gpu bench real prune-results gallery lint types wheel wheel-check docs demo-model clean kquants

demo: $(VENV)/demo
	$(BIN)/compress demo

# A minute on 2 cores: lint, types, and `make quick`. The first time takes longer, for types have nothing to go on from.
check: $(VENV)/dev
	$(MAKE) --no-print-directory -j2 lint types quick

# Floors, the spec, the numerics that take no seconds, and one run from end to end: quantized, packed, loaded.
quick: $(VENV)/test
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n auto -m "not slow and not gpu" tests/house/test_floors.py \
		tests/spec tests/numerics tests/test_api.py::test_three_lines --ignore tests/numerics/test_gptq_floats.py \
		--deselect tests/numerics/test_knapsack.py::test_thousands_of_weights_take_seconds $(ARGS)

# A process per core, each with one thread: threads of several processes that wait for each other cost more than they gain.
test: $(VENV)/test
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n auto -m "not slow and not gpu" $(ARGS)

# Every parser against 20,000 texts of each kind; tests/bad_input prints the table of what is refused, and how.
fuzz: $(VENV)/test
	COMPRESS_FUZZ=20000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto tests/house/test_fuzz.py $(ARGS)
	$(BIN)/python tests/bad_input

# A dozen faults, planted one at a time into a copy of the sources: each must fail a test.
faults: $(VENV)/test
	$(BIN)/python -m pytest -q -n auto -m slow -rP tests/house/test_planted_faults.py $(ARGS)

slow: $(VENV)/test $(VENV)/eval
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m slow $(ARGS)

# Kills, signals, power cuts, full disks: every kind of pass, at every moment; ends with a table of the kills.
kill: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/kill $(ARGS)

# A reader in an environment of its own, which is built first: AutoGPTQ reads what it and what we have packed.
readers: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m slow tests/evaluate/readers/test_environment.py \
		tests/evaluate/readers/test_interchange.py tests/evaluate/readers/test_readers.py $(ARGS)

# Engines, each in an environment of its own, which is built first (vLLM's has 3 GB): llama.cpp, mlx-lm and vLLM read what we have
# packed, and catch planted faults; an hour on 2 cores.
engines: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow -rP tests/evaluate/readers/test_llama_cpp.py tests/evaluate/readers/test_mlx.py \
		tests/evaluate/readers/test_paris.py tests/evaluate/readers/test_planted_faults.py $(ARGS)

# Schemes x formats x readers x four kinds of model, into docs/readers.md; an hour on 2 cores. What was seen is kept in
# build/readers.json, so that it can be stopped and run again. CELLS="vllm awq*,mlx *" takes some.
readers-table: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/readers_table.py $(if $(CELLS),--cells "$(CELLS)") $(ARGS)

# Every width, symmetry and format on some models: make formats MODELS="A B" ARGS=--gptqmodel
formats: $(VENV)/test
	$(BIN)/python tests/benchmarks/formats.py $(MODELS) $(ARGS)

# Compiled CUDA kernels, anew from their sources; make cubins ARGS=--check tells whether that is needed.
cubins: $(VENV)/test
	$(BIN)/python -m compress.kernels.cuda.build $(ARGS)

# The library of CPU kernels that is shipped, anew from its sources; make cpu-kernels ARGS=--check tells whether that is needed.
# Sanitizers, NEON by qemu, and a build where none is shipped: `make slow ARGS=tests/kernels/test_simd.py`.
cpu-kernels: $(VENV)/test
	$(BIN)/python -m compress.kernels.cpu.build $(ARGS)

# On a machine with a GPU, in 8 minutes: tests of every kernel, of calibration and gradients, and the shape table, to build/gpu.md;
# needs no network and installs nothing. Status 6 where there is no GPU.
gpu:
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) -P tests/gpu/run.py $(ARGS)

bench: $(VENV)/test
	$(BIN)/python tests/benchmarks/stream.py $(ARGS)
	$(BIN)/python tests/benchmarks/sweep.py $(ARGS)

# Every method on a real language model, which is fetched once: to recipes/real.md and recipes/real.json. ROWS="gptq-* source" takes
# some, PEERS=1 adds other tools (hours); MODEL=DIR, TEXT=FILE, ALSO=FILE and CALIBRATE=FILE take others than the default ones.
real: $(VENV)/real
	$(BIN)/python tests/benchmarks/real --rows "$(ROWS)" $(if $(PEERS),--peers) --iters $(or $(ITERS),200) \
		--model "$(MODEL)" --text "$(TEXT)" --also "$(ALSO)" --calibrate "$(CALIBRATE)" $(ARGS)

# Pruning and recovery on trained models, to recipes/pruning.md and build/prune.json; hours on 2 cores. What was measured is kept, so
# it can be stopped and run again. ROWS="tiny-* smol-2:4*" takes some.
prune-results: $(VENV)/real
	$(BIN)/python tests/benchmarks/prune_results.py $(if $(ROWS),--rows "$(ROWS)") $(ARGS)

# Every recipe of recipes/ on the real model, into its header; an hour on 2 cores. What was measured is kept.
gallery: $(VENV)/real
	$(BIN)/python tests/benchmarks/gallery.py $(if $(ROWS),--rows "$(ROWS)") $(ARGS)

# GGUF files beside llama-quantize's, which is built once (long): to recipes/kquants.md. What was measured is kept; ARGS=--anew
# measures it again. ROWS="wide-* smol-source" takes some.
kquants: $(VENV)/real
	$(BIN)/python tests/benchmarks/kquants.py $(if $(ROWS),--rows "$(ROWS)") $(ARGS)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# By links that make one package of the three folders, as it is installed; what mypy knew of it the last time is kept.
types: $(VENV)/dev
	rm -rf build/types && mkdir -p build/types/compress
	ln -s $(abspath compress)/* $(abspath passes kernels recipes) build/types/compress
	cd build/types && $(abspath $(BIN))/mypy --config-file $(abspath pyproject.toml) --python-executable $(abspath $(BIN)/python) \
		--cache-dir $(abspath build)/mypy -p compress

wheel: $(VENV)/dev
	rm -rf dist build/lib
	$(BIN)/python -m build --wheel --no-isolation --outdir dist . > /dev/null

# The wheel by itself: what it holds, installed where nothing else is, and used.
wheel-check: wheel
	$(BIN)/python -m pytest -q tests/house/wheel_check.py

# Pages of docs/, and those that are made from the code, to build/docs; warnings are errors.
docs: $(VENV)/docs
	$(BIN)/python -P -m sphinx -W --keep-going -n -q -d build/doctrees docs build/docs

# The embedded model anew, from the sources of the CPython that runs this; about 20 minutes on 2 idle cores.
demo-model: $(VENV)/demo
	$(BIN)/python -m compress.demo.make_model

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	touch $@

$(VENV)/demo: $(VENV)/torch pyproject.toml setup.py
	$(PIP) --editable ".[readers]"
	touch $@

$(VENV)/test: $(VENV)/torch pyproject.toml setup.py
	$(PIP) --editable ".[readers,test]"
	touch $@

$(VENV)/dev: $(VENV)/test
	$(PIP) "setuptools>=77" wheel --editable ".[readers,test,dev]"
	touch $@

# Everything at once, for CI: an installation of its own for each target would solve and build again.
install: $(VENV)/torch
	$(PIP) "setuptools>=77" wheel --editable ".[readers,test,dev,docs]"
	touch $(VENV)/demo $(VENV)/test $(VENV)/dev $(VENV)/docs

$(VENV)/docs: $(VENV)/torch pyproject.toml setup.py
	$(PIP) --editable ".[readers,docs]"
	touch $@

$(VENV)/eval: $(VENV)/torch pyproject.toml setup.py
	$(PIP) --editable ".[readers,eval]"
	touch $@

$(VENV)/real: $(VENV)/torch pyproject.toml setup.py
	$(PIP) --editable ".[readers,real]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
