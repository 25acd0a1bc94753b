# Every target that runs a recipe is one line over `python -m sft_recipes`; `make help` lists targets and variables.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VARIABLES := RECIPE MODEL METHOD GPUS NODES PROCESSES DEVICES DATA VALIDATION NAME RESUME ALLOW_CHANGE STRICT_VERSIONS LR SWEEP SEEDS FRACTION KEEP SLURM GPU_TYPE RUN ROWS PLOT WITH PORT PROMPT REPO LICENSE MERGED PUBLIC CARD_ONLY DRY_RUN SANITY INIT_FROM OVERFIT REPORT_TO GPU_HOUR_PRICE TASKS LIMIT EVAL_VENV ARGS RUNTIME IMAGE VARIANT MOUNTS CONTAINER_ARGS BUILD_ARGS WHEEL
ifndef MODEL
RECIPE ?= tiny
endif
comma := ,
ifneq ($(value DEVICES),)
override CUDA_VISIBLE_DEVICES := $(value DEVICES)
VARIABLES += CUDA_VISIBLE_DEVICES
ifeq ($(value GPUS),)
override GPUS := $(words $(subst $(comma), ,$(value DEVICES)))
endif
endif

# Make expands $(…) in the user's values; the raw text goes to the environment, and the shell quotes it.
$(foreach variable,$(VARIABLES),$(eval override export $(variable) := $$(value $(variable))))

VENV ?= .venv
PYTHON := $(VENV)/bin/python

# Variables become options here only; an unset or empty one is omitted. container.py runs the command in a container or in
# $(VENV), which it creates if needed; it needs only Python's standard library.
SFT = set -f; exec "$$(command -v python3 python3.12 python3.11 | head -n 1)" -I sft_recipes/launch/container.py "$(VENV)"
HARDWARE = $${GPUS:+--gpus "$$GPUS"} $${NODES:+--nodes "$$NODES"} $${PROCESSES:+--processes "$$PROCESSES"} \
	$${GPU_TYPE:+--gpu-type "$$GPU_TYPE"}
# Without RECIPE the model's size decides.
CHOSEN = $${RECIPE:+"$$RECIPE"} $${MODEL:+"--model=$$MODEL"} $${METHOD:+--method "$$METHOD"}
TRAINING = $(HARDWARE) $${INIT_FROM:+--init-from "$$INIT_FROM"} $${OVERFIT:+--overfit}
OVERRIDES = $${DATA:+"data.train=$$DATA"} $${VALIDATION:+"data.validation=$$VALIDATION"} $${ARGS:-}

.PHONY: help setup flash-attn image smoke doctor recipes recipe plan schedules inspect download sanity train sweep verify-resume diagnose report status slurm tensorboard generate merge eval setup-eval publish serve check-serving test test-unit test-fake-gpus test-strategies test-container test-slurm test-serve test-eval test-tutorial test-cuda-build chaos bench test-latest docs lint lock

help: ## print this list
	@echo 'Usage: make TARGET [VARIABLE=value ...], for example: make train RECIPE=8b GPUS=8'
	@echo
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r target text; do \
		printf '  %-15s %s\n' "$$target" "$$text"; done
	@echo
	@printf '  %s\n' 'RECIPE           recipe name, see `make recipes` (default: tiny)' \
		'MODEL            model to fine-tune instead of a recipe: a Hub name or a folder' \
		'METHOD           with MODEL: full (default), lora or qlora' \
		'DATA             training data: .jsonl, .json, .csv, .parquet, a folder, or a Hub dataset' \
		'VALIDATION       validation data (default: a seeded part of DATA)' \
		'ARGS             overrides, such as ARGS="trainer.learning_rate=1e-5 trainer.max_length=4096"' \
		'GPUS             number of GPUs, 0 for the CPU; for plan also a list: GPUS=1,2,4,8' \
		'DEVICES          GPU ids, such as DEVICES=0,2 (sets CUDA_VISIBLE_DEVICES)' \
		'PROCESSES        number of CPU processes, with GPUS=0' \
		'NODES            number of nodes, for plan and slurm' \
		'GPU_TYPE         GPU type to plan for: h100-80g, a100-40g, ..., or GiB of memory' \
		'NAME             name of the run (default: RECIPE-1, RECIPE-2, ...)' \
		'RUN              name or folder of an existing run' \
		'RESUME=1         fail unless there is an unfinished run to resume' \
		'ALLOW_CHANGE     keys that may differ from the plan of the resumed run: KEY,KEY' \
		'STRICT_VERSIONS  fail if library versions differ from those of the resumed run' \
		'LR               for sweep: learning rates, such as LR=1e-5,2e-5,5e-5 (default: three of the size class)' \
		'SWEEP            for sweep: another key, such as SWEEP=trainer.weight_decay=0.01,0.1' \
		'SEEDS            for sweep: runs of each value, 2 or more to know their spread (default: 1)' \
		'FRACTION         for sweep: epochs of each run (default: 0.25)' \
		'KEEP=1           for sweep: keep the models; SLURM=1: run as a Slurm array' \
		'SANITY=skip      train without the sanity check' \
		'INIT_FROM        name of a finished run: start a new one from its last weights (more epochs, other data)' \
		'OVERFIT=1        smoke test: train on eight rows until the loss approaches zero, else fail' \
		'REPORT_TO        trackers: tensorboard (default), wandb, mlflow, ..., none' \
		'GPU_HOUR_PRICE   price of one GPU hour, to forecast cost' \
		'TASKS LIMIT      for eval: tasks of lm-evaluation-harness (default: default); items per task' \
		'EVAL_VENV        for eval: environment of the harness, such as one with vLLM (default: .venv-eval)' \
		'PROMPT           prompt for generate (default: standard input, one per line)' \
		'REPO             for publish: repository on the Hub, OWNER/NAME; PUBLIC=1 makes it public' \
		'LICENSE          for publish: license of a model whose base model has no known one' \
		'MERGED=1         for publish: the merged model instead of the adapters' \
		'CARD_ONLY=1      for publish: write the model card, list the files, upload nothing' \
		'ROWS             for inspect: number of rows' \
		'PLOT WITH        for schedules: .png or .svg file to write, other schedules to compare' \
		'PORT             port for tensorboard and serve' \
		'RUNTIME          local, docker or podman (default: a container if GPUs are requested)' \
		'IMAGE VARIANT    image name; variant to build or run: cuda or cpu' \
		'MOUNTS           more folders to mount read-only: /data:/models' \
		'CONTAINER_ARGS   additional options of docker run or podman run; BUILD_ARGS: of build' \
		'WHEEL            for flash-attn: wheel file, or https://...#sha256=...' \
		'DRY_RUN=1        print the command instead of running it'

setup: ## create the virtual environment (.venv); other targets do it when needed
	@requirements/install.sh $(VENV)

image: ## build the container image: VARIANT IMAGE RUNTIME BUILD_ARGS
	@$(SFT) image

smoke: ## test the image in minutes, offline: VARIANT IMAGE DEVICES (ARGS=--cpu)
	@$(SFT) smoke $${ARGS:-}

flash-attn: setup ## install flash-attn outside the image: WHEEL, otherwise compile it
	@requirements/flash-attn.sh "$(VENV)"

doctor: ## check driver, GPUs, attention, network, disk, Hub: GPUS (ARGS=--json)
	@$(SFT) doctor $${GPUS:+--gpus "$$GPUS"} $${ARGS:-}

recipes: ## list the recipes
	@$(SFT) recipes

recipe: ## write recipes/NAME.yaml for a model, to edit: MODEL METHOD GPUS GPU_TYPE NAME DATA
	@export RUNTIME=local; $(SFT) recipe $(CHOSEN) $(HARDWARE) $${NAME:+--name "$$NAME"} $(OVERRIDES)

plan: ## resolve a plan, start nothing: RECIPE GPUS NODES DATA (ARGS=--explain)
	@$(SFT) plan $(CHOSEN) $(TRAINING) $(OVERRIDES)

schedules: ## table and plot of learning-rate schedules: RECIPE GPUS RUN PLOT WITH DATA
	@mkdir -p "$${RUNS_DIR:-runs}"; $(SFT) schedules $(CHOSEN) $(HARDWARE) $${RUN:+--run "$$RUN"} --plot "$${PLOT:-$${RUNS_DIR:-runs}/schedules$${RECIPE:+-$$RECIPE}.png}" \
		$${WITH:+--with "$$WITH"} $(OVERRIDES)

inspect: ## show tokens and loss mask of rows: RECIPE DATA ROWS (ARGS=--json)
	@$(SFT) inspect $(CHOSEN) $(TRAINING) $${ROWS:+--rows "$$ROWS"} $(OVERRIDES)

download: ## download model, tokenizer and data for offline runs: RECIPE DATA VALIDATION TASKS
	@[ -z "$${TASKS:-}" ] || { $(HARNESS); export RUNTIME=local; }; \
		$(SFT) download $(CHOSEN) $${TASKS:+--tasks "$$TASKS"} $(OVERRIDES)

sanity: ## run the sanity check, which train also runs: RECIPE GPUS DEVICES DATA
	@$(SFT) sanity $(CHOSEN) $(TRAINING) $(OVERRIDES)

train: ## start a run, or resume an unfinished one: RECIPE GPUS DATA NAME RESUME
	@$(SFT) train $(CHOSEN) $(TRAINING) $${NAME:+--name "$$NAME"} \
		$${RESUME:+--resume} $${ALLOW_CHANGE:+--allow-change "$$ALLOW_CHANGE"} $${STRICT_VERSIONS:+--strict-versions} $${DRY_RUN:+--dry-run} $(OVERRIDES)

sweep: ## compare learning rates by short runs: RECIPE LR SWEEP SEEDS FRACTION KEEP SLURM
	@$(SFT) sweep $(CHOSEN) $(HARDWARE) $${NAME:+--name "$$NAME"} $${LR:+--lr "$$LR"} $${SWEEP:+--values "$$SWEEP"} \
		$${SEEDS:+--seeds "$$SEEDS"} $${FRACTION:+--fraction "$$FRACTION"} $${KEEP:+--keep} $${SLURM:+--slurm} $(OVERRIDES)

verify-resume: ## repeat recorded steps of a run and compare bit for bit: RUN
	@$(SFT) verify-resume "$${RUN:?RUN is missing: the name of a run, such as tiny-1}"

diagnose: ## find problems of a run, with evidence and fix: RUN (ARGS=--json)
	@$(SFT) diagnose "$${RUN:?RUN is missing: the name of a run, such as tiny-1}" $${ARGS:-}

report: ## write an HTML report of a run: curves, samples, plan, diagnosis: RUN
	@$(SFT) report "$${RUN:?RUN is missing: the name of a run, such as tiny-1}"

status: ## state of a run: Slurm job, last metrics, time left: RUN (ARGS=--json)
	@$(SFT) status "$${RUN:?RUN is missing: the name of a run, such as tiny-1}" $${ARGS:-}

slurm: ## submit a recipe to Slurm and follow its output: RECIPE NODES NAME DATA
	@set -f; slurm/submit.sh "$$RECIPE" $${NODES:+"--nodes=$$NODES"} -- $${ARGS:-}

tensorboard: ## serve the metrics of all runs on localhost: PORT
	@$(SFT) tensorboard --logdir "$${RUNS_DIR:-runs}" --host 127.0.0.1 --port "$${PORT:-6006}"

generate: ## generate completions with a trained model: RUN PROMPT
	@$(SFT) generate "$${RUN:?RUN is missing: the name of a run, such as tiny-1}" $${PROMPT:+--prompt "$$PROMPT"}

merge: ## merge adapters into their base model: RUN
	@$(SFT) merge "$${RUN:?RUN is missing: the name of a run, such as 8b-lora-1}"

publish: ## upload a finished run to the Hub, with a model card: RUN REPO LICENSE PUBLIC
	@export RUNTIME=local; $(SFT) publish "$${RUN:?RUN is missing: the name of a run, such as tiny-1}" $${REPO:+--repo "$$REPO"} \
		$${LICENSE:+--license "$$LICENSE"} $${MERGED:+--merged} $${PUBLIC:+--public} $${CARD_ONLY:+--card-only}

# $(call environment,NAME): .venv-NAME, which sees the packages of $(VENV), with those of requirements/NAME.txt.
environment = cmp -s requirements/$(1).txt .venv-$(1)/$(1).txt || { rm -rf .venv-$(1); $(PYTHON) -m venv --without-pip .venv-$(1); \
	$(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$(echo .venv-$(1)/lib/python*/site-packages)/venv.pth"; \
	.venv-$(1)/bin/python -m pip install --quiet --no-deps --no-build-isolation --require-hashes -r requirements/$(1).txt; \
	cp requirements/$(1).txt .venv-$(1); }

serve: setup ## serve a finished run on localhost, OpenAI-compatible: RUN PORT (ARGS for the server)
	@$(call environment,serve)
	@export RUNTIME=local; $(SFT) serve "$${RUN:?RUN is missing: the name of a run, such as tiny-1}" $${PORT:+--port "$$PORT"} $${ARGS:+"--server-arguments=$$ARGS"}

check-serving: setup ## compare tokens and completions of a server with those of a run: RUN
	@$(call environment,serve)
	@export RUNTIME=local; $(SFT) check-serving "$${RUN:?RUN is missing: the name of a run, such as tiny-1}"

# EVAL_VENV is the user's own; .venv-eval is created.
HARNESS = [ -n "$${EVAL_VENV:-}" ] || $(MAKE) --no-print-directory setup-eval

eval: ## compare a run's model with its base on tasks of lm-evaluation-harness: RUN TASKS LIMIT
	@export RUNTIME=local; $(HARNESS); $(SFT) eval "$${RUN:?RUN is missing: the name of a run, such as tiny-1}" \
		$${TASKS:+--tasks "$$TASKS"} $${LIMIT:+--limit "$$LIMIT"} $${ARGS:-}

setup-eval: setup ## create the environment of eval and of download TASKS=… (.venv-eval)
	@$(call environment,eval)

# One test file per core and one thread per run: runs that share the threads of their cores slow each other manyfold.
# MAX_JOBS: compiling DeepSpeed's operators takes 1.5 GB per job, and the other core runs tests.
# tests/conftest.py sorts the files, which xdist would do by their number of tests. Ranks and data preparation, which import
# for longer than they work here, are forked with their libraries imported (tests/helpers/preload_server.py).
PYTEST = OMP_NUM_THREADS=1 MAX_JOBS=1 $(PYTHON) -m pytest --preloaded --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: setup ## unit and integration tests on the CPU (under nine minutes)
	@$(PYTEST) tests/unit tests/integration $${ARGS:-}

test-unit: setup ## unit tests only (under two minutes)
	@$(PYTEST) tests/unit $${ARGS:-}

test-eval: setup ## evaluation with the real harness, offline, in .venv-eval
	@$(HARNESS)
	@$(PYTEST) tests/environments/test_harness.py

# nvidia-smi is the fake one in tests/helpers/fake_gpus; FAKE_… variables describe its GPUs.
test-fake-gpus: setup ## tests that query GPUs, with a fake nvidia-smi: FAKE_GPUS FAKE_GPU_NAME
	@PATH="$(CURDIR)/tests/helpers/fake_gpus:$$PATH" $(PYTEST) $(addprefix tests/,integration/test_benchmarks.py integration/test_cli.py integration/test_doctor.py unit/test_suggest.py)

test-strategies: setup ## every strategy, every recipe, interrupted saves (20 minutes)
	@$(PYTEST) tests/strategies tests/chaos $${ARGS:-}

test-container: setup ## build the CPU image with podman and test it (15 minutes, needs root)
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/container

test-slurm: setup ## run the jobs on a real Slurm cluster on this machine (10 minutes, needs root)
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/slurm

test-serve: setup ## serve a run with transformers serve on the CPU and compare it
	@$(call environment,serve)
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/environments/test_serving.py

test-tutorial: setup ## every command of docs/tutorial.md, in order
	@$(call environment,serve)
	@$(HARNESS)
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/tutorial

test-cuda-build: ## compile the CUDA code without a GPU, in .venv-cuda (30 minutes, 7 GB)
	@TORCH=cuda requirements/install.sh .venv-cuda
	@.venv-cuda/bin/python -m pip install --quiet --no-deps --require-hashes -r requirements/nvcc.txt
	@OMP_NUM_THREADS=1 .venv-cuda/bin/python -m pytest tests/cuda_build

chaos: setup ## inject every failure of docs/CHAOS.md into real runs (an hour)
	@OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(PYTHON) -m chaos $${ARGS:-}

bench: setup ## benchmark training; writes benchmarks/results: (ARGS="--repeats 5")
	@$(PYTHON) benchmarks/bench.py $${ARGS:-}
	@$(PYTHON) benchmarks/readme.py

test-latest: ## recipe tests with the latest package versions, in .venv-latest
	@requirements/latest.sh .venv-latest
	@.venv-latest/bin/python -m pytest tests/unit/test_schema.py tests/unit/test_shipped_recipes.py tests/unit/test_trainer.py \
		tests/strategies/test_recipes_train.py

# In its own environment: the locked packages of the site are not needed to train.
docs: setup ## build the documentation as a site in .site/; broken links fail
	@cmp -s requirements/docs.txt .venv-docs/docs.txt || { rm -rf .venv-docs; $(PYTHON) -m venv .venv-docs; \
		.venv-docs/bin/python -m pip install --quiet --require-hashes -r requirements/docs.txt; cp requirements/docs.txt .venv-docs; }
	@NO_MKDOCS_2_WARNING=true .venv-docs/bin/python -m mkdocs build --strict

lint: setup ## ruff, mypy, shellcheck, hadolint, replaced phrases, stale reference, links of the documentation
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m mypy
	@shopt -s nullglob; if [ -x $(VENV)/bin/shellcheck ]; then \
		$(VENV)/bin/shellcheck requirements/*.sh slurm/*.sh docker/*.sh docker/portable-cxx benchmarks/*.sh benchmarks/baselines/*.sh .ci/run .ci/fresh-machine; fi
	@$(VENV)/bin/hadolint docker/Dockerfile
	@$(PYTHON) docs/scripts/check_terms.py
	@$(PYTHON) docs/scripts/write_reference.py --check
	@$(MAKE) --no-print-directory docs

lock: ## resolve requirements/requirements.in again (needs uv)
	@requirements/lock.sh
