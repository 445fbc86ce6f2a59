# Rocyard's one entry point: `make help`.
#
#   PYTHON  the Python that makes the virtual environment
#   VENV    the virtual environment; one of yours is used as it is, and a torch in it is left alone
#   SEEDS   seeds of `make soak`; how many of `make sim`
#   SEED    of `make chaos`, which also takes SECONDS of load and OUT, a folder for its report
#   ARGS    arguments for what is run, such as ARGS='--simulate 4x8:mi300x'
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BENCH ?= http
# One more than there are CPUs: tests wait as well as work. Four at most: each worker may start a whole cluster.
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ $$n -gt 3 ] && n=3; echo $$((n + 1)))
# File by file, in the order of tests/conftest.py: by the number of its tests, a file of one long test would come last.
PARALLEL := -n $(JOBS) --dist loadfile --no-loadscope-reorder

BIN := $(VENV)/bin
STAMPS := $(VENV)/.rocyard
CODE := $(patsubst %/,%,$(sort $(dir $(wildcard manager/*.py plugins/*.py rocyard/*.py autoscaler/*.py benchmarks/*.py))))
LINTED := $(CODE) $(wildcard examples tests)
HAS_TORCH := import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)
TORCH_FOLDER := import importlib.util as u, os; s = u.find_spec("torch"); print(os.path.dirname(os.path.dirname(s.origin)) if s and s.origin else "")
PACKAGES := import sysconfig; print(sysconfig.get_path("purelib"))
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

.DEFAULT_GOAL := help
.PHONY: run demo test lint sim soak chaos load coverage bench clean help
.SILENT:
.SUFFIXES:

run: $(STAMPS)/base  ## start a whole cluster on this machine (ARGS=… goes to `rocyard up`)
	exec $(BIN)/rocyard up $(ARGS)

demo: $(STAMPS)/demo  ## digits as tasks, then a load for which nodes come and go (ARGS=--quick: only the digits)
	exec $(BIN)/rocyard demo $(ARGS)

test: lint  ## lint, types and all tests (ARGS=… goes to pytest)
	exec $(BIN)/python -m pytest $(PARALLEL) $(ARGS)

lint: $(STAMPS)/test  ## ruff and mypy
	echo "checking style and types"
	$(BIN)/python -m ruff check --quiet $(LINTED)
	$(BIN)/python -m ruff format --quiet --check $(LINTED) || { echo "run: $(BIN)/python -m ruff format $(LINTED)"; exit 1; }
	$(BIN)/python -m mypy --strict --no-error-summary $(CODE)

sim: $(STAMPS)/test  ## histories of bad luck on a virtual clock, each with its seed (SEEDS=2000; SEED=17 replays one)
	SEED=$(SEED) SEEDS=$(SEEDS) $(BIN)/python -m pytest -q -s --timeout 0 tests/sim/test_store_sim.py -k every_history $(ARGS)

soak: $(STAMPS)/test  ## random deaths of schedulers and Dask workers, with other seeds (SEEDS="2 3 4")
	for seed in $(or $(SEEDS),2 3 4 5 6); do \
	  echo "seed $$seed"; $(BIN)/python -m pytest -q tests/integration/test_soak.py --soak-seed $$seed || exit 1; done

chaos: $(STAMPS)/test  ## faults on real processes under load, and the verdict (SEED=1 SECONDS=60 OUT=folder for the report)
	exec $(BIN)/python -m tests.chaos --seed $(or $(SEED),1) --seconds $(or $(SECONDS),60) $(if $(OUT),--out $(OUT))

load: $(STAMPS)/load  ## 20 s of load on the API of a cluster of its own (ARGS='--users 50 --run-time 60s' goes to locust)
	exec $(BIN)/python tests/load/run.py $(ARGS)

coverage: $(STAMPS)/test  ## which lines the tests of the parts run, those of started processes too; fails under the threshold
	rm -f .coverage .coverage.*
	$(BIN)/python -m pytest $(PARALLEL) --cov $(ARGS) tests/unit tests/contract tests/sim tests/integration

bench: $(STAMPS)/bench  ## one benchmark: BENCH=http ARGS=--json
	exec $(BIN)/python benchmarks/$(BENCH).py $(ARGS)

clean:  ## remove .venv and what tools left here (never a VENV of yours, never the cluster's data)
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name .git -prune -o -name .venv -prune -o -type d -name __pycache__ -print | xargs rm -rf
	echo "removed .venv and caches; the data of clusters is untouched"

help:  ## this list
	sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-13s %s\n", $$1, $$2 }'

# A virtual environment. A torch that PYTHON has is made visible in it, instead of installing another.
$(STAMPS)/venv:
	if [ ! -x $(BIN)/python ]; then \
	  $(PYTHON) -c '$(NEW_ENOUGH)' || { echo "Rocyard needs Python 3.11 or newer: make PYTHON=python3.12 …"; exit 1; }; \
	  echo "making $(VENV)"; \
	  $(PYTHON) -m venv $(VENV) || { rm -f $(BIN)/python; echo "on Debian and Ubuntu: apt install python3-venv"; exit 1; }; \
	  torch=$$($(PYTHON) -c '$(TORCH_FOLDER)'); \
	  if [ -n "$$torch" ]; then \
	    echo "using the torch of $(PYTHON), in $$torch"; \
	    echo "$$torch" > "$$($(BIN)/python -c '$(PACKAGES)')/rocyard-torch.pth"; \
	  fi; \
	fi
	$(BIN)/python -c '$(NEW_ENOUGH)' || { echo "$(VENV) has a Python older than 3.11"; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null
	mkdir -p $(STAMPS)
	touch $@

# $(call install,EXTRAS,STAMP,WITH_TORCH): installs this tree, editable, and marks it done.
define install
extras='$(1)'; \
if [ -n '$(3)' ]; then \
  if $(BIN)/python -c '$(HAS_TORCH)'; then echo "torch is in $(VENV): left as it is"; \
  else extras="$$extras,torch"; echo "torch is not in $(VENV): taking the default build (for ROCm, install yours there first)"; fi; \
fi; \
echo "installing rocyard$${extras:+[$$extras]} into $(VENV) (a minute or two, once)"; \
$(BIN)/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt -e ".$${extras:+[$$extras]}" && \
touch $(STAMPS)/base $(STAMPS)/$(2)
endef

NEEDS := $(STAMPS)/venv pyproject.toml constraints.txt

$(STAMPS)/base: $(NEEDS)
	$(call install,,base,)

$(STAMPS)/demo: $(NEEDS)
	$(call install,demo,demo,torch)

$(STAMPS)/test: $(NEEDS)
	$(call install,test,test,torch)

$(STAMPS)/load: $(NEEDS)
	$(call install,load,load,)

$(STAMPS)/bench: $(NEEDS)
	$(call install,bench,bench,)
