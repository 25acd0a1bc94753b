# The front door. Every target that runs a recipe is one line over `python -m sft_recipes`; `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VARIABLES := RECIPE GPUS NODES PROCESSES DEVICES DATA VALIDATION NAME RESUME ALLOW_CHANGE STRICT_VERSIONS GPU_TYPE RUN ROWS HTML PLOT WITH PORT PROMPT DRY_RUN SANITY REPORT_TO GPU_HOUR_PRICE ARGS RUNTIME IMAGE VARIANT MOUNTS CONTAINER_ARGS BUILD_ARGS WHEEL
RECIPE ?= tiny

# Make expands $(…) in what the user typed; the raw text goes to the environment, and the shell quotes it.
$(foreach variable,$(VARIABLES),$(eval override export $(variable) := $$(value $(variable))))

VENV ?= .venv
PYTHON := $(VENV)/bin/python

# One definition of how variables become options; an unset or empty one is left out. Whether a verb runs in a container
# or in $(VENV), which is made when needed, is decided by the module below; Python's standard library is enough for it.
SFT = set -f; exec "$$(command -v python3 python3.12 python3.11 | head -n 1)" -I sft_recipes/launch/container.py "$(VENV)"
HARDWARE = $${GPUS:+--gpus "$$GPUS"} $${NODES:+--nodes "$$NODES"} $${PROCESSES:+--processes "$$PROCESSES"} \
	$${GPU_TYPE:+--gpu-type "$$GPU_TYPE"}
OVERRIDES = $${DATA:+"data.train=$$DATA"} $${VALIDATION:+"data.validation=$$VALIDATION"} $${ARGS:-}

.PHONY: help setup flash-attn image smoke doctor recipes plan schedules inspect download sanity train verify-resume diagnose report status slurm tensorboard generate merge test test-fake-gpus test-strategies test-container test-slurm test-cuda-build chaos bench test-latest lint lock

help: ## this list
	@echo 'Variables stand behind the target: make train RECIPE=8b GPUS=8'
	@echo
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r target text; do \
		printf '  %-15s %s\n' "$$target" "$$text"; done
	@echo
	@printf '%s\n' 'RECIPE      a name from `make recipes` (default: tiny)' \
		'GPUS        GPUs over all nodes; 0 is the CPU (default: what the recipe or the machine has); plan compares 1,2,4,8' \
		'DEVICES     which GPUs, by id: 0,2' \
		'PROCESSES   ranks on the CPU, with GPUS=0' \
		'NODES GPU_TYPE  hardware to plan for: GPU_TYPE=h100-80g, a100-40g, ... or GiB' \
		'DATA        your data: a .jsonl, .json, .csv or .parquet file, a folder, or a Hub name' \
		'VALIDATION  data to validate on (default: a seeded part of DATA)' \
		'NAME        the name of the run (default: RECIPE-1, RECIPE-2, ...)' \
		'RESUME=1    an error where there is no run to go on with; ALLOW_CHANGE=KEY,... goes on with a changed plan' \
		'STRICT_VERSIONS=1    an error where the libraries are not those that the run was trained with' \
		'ROWS HTML   how many rows inspect shows; a page to write them to' \
		'PLOT WITH   a .png or .svg to draw learning rates to; other schedules: WITH=polynomial,...' \
		'SANITY=skip starts a run that nothing has tried' \
		'REPORT_TO   tensorboard (default), wandb, tensorboard,wandb or none; PORT of make tensorboard' \
		'GPU_HOUR_PRICE  what an hour of one GPU costs: forecasts are in money too' \
		'RUN PROMPT  a run (name or folder), and what to ask it' \
		'RUNTIME     docker, podman or local (default: a container where GPUs are asked for and an engine is there)' \
		'IMAGE       the image to take or build; VARIANT=cuda or cpu; MOUNTS=/data:/models for it to read' \
		'CONTAINER_ARGS BUILD_ARGS  more options of docker or podman: to run, to build' \
		'DRY_RUN=1   print the command that would start the ranks, or the container' \
		'ARGS        key=value overrides: ARGS="trainer.learning_rate=1e-3 trainer.max_length=256"'

setup: ## make the virtual environment (.venv); every target below does it when needed
	@requirements/install.sh $(VENV)

image: ## build the image: VARIANT=cuda or cpu, RUNTIME, IMAGE (its name), BUILD_ARGS
	@$(SFT) image

smoke: ## prove the image before hours are spent in it, with the network off: VARIANT IMAGE RUNTIME DEVICES (ARGS=--cpu)
	@$(SFT) smoke $${DEVICES:+--devices "$$DEVICES"} $${ARGS:-}

flash-attn: setup ## install flash-attn outside the image: WHEEL=a file, or URL#sha256=…; else it is compiled, for how long is said first
	@requirements/flash-attn.sh "$(VENV)"

doctor: ## is this machine fit: driver, GPUs, attention, links, memory, disk, Hub, versions: GPUS (ARGS=--json)
	@$(SFT) doctor $${GPUS:+--gpus "$$GPUS"} $${ARGS:-}

recipes: ## the recipes in a table
	@$(SFT) recipes

plan: ## settle every number of a run, start nothing: RECIPE GPUS NODES GPU_TYPE DATA ARGS (ARGS=--explain, ARGS=--json)
	@$(SFT) plan "$$RECIPE" $(HARDWARE) $(OVERRIDES)

schedules: ## learning-rate curves for the recipe's own steps, a table and a plot: RECIPE GPUS RUN PLOT WITH DATA ARGS
	@mkdir -p "$${RUNS_DIR:-runs}"; $(SFT) schedules "$$RECIPE" $(HARDWARE) $${RUN:+--run "$$RUN"} --plot "$${PLOT:-$${RUNS_DIR:-runs}/schedules-$$RECIPE.png}" \
		$${WITH:+--with "$$WITH"} $(OVERRIDES)

inspect: ## what the loss will see, before any GPU is taken: RECIPE DATA VALIDATION ROWS HTML ARGS (ARGS=--json)
	@$(SFT) inspect "$$RECIPE" $(HARDWARE) $${ROWS:+--rows "$$ROWS"} $${HTML:+--html "$$HTML"} $(OVERRIDES)

download: ## bring model, tokenizer and data from the Hub; the run then needs no network: RECIPE DATA VALIDATION ARGS
	@$(SFT) download "$$RECIPE" $(OVERRIDES)

sanity: ## try a run on a few rows in minutes, before hours are spent; train does it by itself: RECIPE GPUS DEVICES DATA ARGS
	@$(SFT) sanity "$$RECIPE" $(HARDWARE) $${DEVICES:+--devices "$$DEVICES"} $(OVERRIDES)

train: ## the run; goes on with an unfinished one: RECIPE GPUS DEVICES PROCESSES DATA VALIDATION NAME RESUME ALLOW_CHANGE ARGS
	@$(SFT) train "$$RECIPE" $(HARDWARE) $${DEVICES:+--devices "$$DEVICES"} $${NAME:+--name "$$NAME"} \
		$${RESUME:+--resume} $${ALLOW_CHANGE:+--allow-change "$$ALLOW_CHANGE"} $${STRICT_VERSIONS:+--strict-versions} $${DRY_RUN:+--dry-run} $(OVERRIDES)

verify-resume: ## proves that a run resumes exactly: takes recorded steps of it again and compares bits: RUN
	@$(SFT) verify-resume "$${RUN:?RUN is missing: the name of a run, such as tiny-1}"

diagnose: ## what is wrong with a run, on what evidence, and the line to change: RUN (ARGS=--json)
	@$(SFT) diagnose "$${RUN:?RUN is missing: the name of a run, such as tiny-1}" $${ARGS:-}

report: ## a page on a run: curves, samples, plan, diagnosis: RUN
	@$(SFT) report "$${RUN:?RUN is missing: the name of a run, such as tiny-1}"

status: ## where a run stands: its Slurm job, last figures, time left: RUN (ARGS=--json)
	@$(SFT) status "$${RUN:?RUN is missing: the name of a run, such as tiny-1}" $${ARGS:-}

slurm: ## submit a recipe to Slurm and follow its output: RECIPE NODES NAME DATA ARGS (slurm/README.md)
	@set -f; slurm/submit.sh "$$RECIPE" $${NODES:+"--nodes=$$NODES"} -- $${ARGS:-}

tensorboard: ## serve the figures of all runs, on this machine alone: PORT
	@$(SFT) tensorboard $${PORT:+--port "$$PORT"}

generate: ## let what was trained answer: RUN PROMPT
	@$(SFT) generate "$${RUN:?RUN is missing: the name of a run, such as tiny-1}" $${PROMPT:+--prompt "$$PROMPT"}

merge: ## adapters and the model that they were trained on as one model: RUN
	@$(SFT) merge "$${RUN:?RUN is missing: the name of a run, such as 8b-lora-1}"

# A file of tests a core, each run on one thread: two runs that share their cores' threads slow each other manyfold.
# MAX_JOBS: a compiler of DeepSpeed's operators takes 1.5 GB, and the other core has tests.
PYTEST = OMP_NUM_THREADS=1 MAX_JOBS=1 $(PYTHON) -m pytest --numprocesses 2 --dist loadfile

# In the order of their names, which has the slow ones at the beginning and in the middle: xdist's own has them last.
test: setup ## the tests, on the CPU, in under nine minutes (ARGS='-m needs_compiler': those that compile)
	@$(PYTEST) --no-loadscope-reorder tests/unit tests/integration $${ARGS:-}

# nvidia-smi is the fake one in tests/helpers/fake_gpus; its FAKE_… variables describe the GPUs.
test-fake-gpus: setup ## the tests that look at GPUs, as on a machine with GPUs: FAKE_GPUS FAKE_GPU_NAME FAKE_GPU_DRIVER ...
	@PATH="$(CURDIR)/tests/helpers/fake_gpus:$$PATH" $(PYTEST) $(addprefix tests/,integration/test_benchmarks.py integration/test_cli.py integration/test_doctor.py unit/test_suggest.py)

test-strategies: setup ## the matrix: every engine follows one process, every recipe trains three steps; runs killed while they save (about twenty minutes)
	@$(PYTEST) tests/strategies tests/chaos

test-container: setup ## build the CPU image with podman, run the smoke test in it, try ids, signals and secrets (a quarter of an hour)
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/container

test-slurm: setup ## the shipped jobs on a real Slurm of several nodes, made and cut off on this machine (needs root)
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/slurm

test-cuda-build: ## compile for GPUs without one, in its own .venv-cuda: Triton kernels, DeepSpeed's operators, flash-attn (needs g++, Python's headers, 7 GB of disk; about half an hour)
	@TORCH=cuda requirements/install.sh .venv-cuda
	@.venv-cuda/bin/python -m pip install --quiet --no-deps --require-hashes -r requirements/nvcc.txt
	@OMP_NUM_THREADS=1 .venv-cuda/bin/python -m pytest tests/cuda_build

chaos: setup ## harm real runs in every way of docs/CHAOS.md, which this writes: kills at every file operation, at random (an hour)
	@OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(PYTHON) -m chaos $${ARGS:-}

bench: setup ## measure whole training here, into benchmarks/results and benchmarks/README.md: ARGS="--repeats 5"
	@$(PYTHON) benchmarks/bench.py $${ARGS:-}
	@$(PYTHON) benchmarks/readme.py

test-latest: ## the recipes' tests with the newest versions that the index has, in a .venv-latest of their own
	@requirements/latest.sh .venv-latest
	@.venv-latest/bin/python -m pytest tests/unit/test_schema.py tests/unit/test_shipped_recipes.py tests/unit/test_trainer.py \
		tests/strategies/test_recipes_train.py

lint: setup ## ruff, mypy, shellcheck, hadolint
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m mypy
	@shopt -s nullglob; if [ -x $(VENV)/bin/shellcheck ]; then \
		$(VENV)/bin/shellcheck requirements/*.sh slurm/*.sh docker/*.sh docker/portable-cxx benchmarks/*.sh benchmarks/peers/*.sh .ci/run .ci/fresh-machine; fi
	@$(VENV)/bin/hadolint docker/Dockerfile

lock: ## resolve requirements/requirements.in anew (needs uv)
	@requirements/lock.sh
