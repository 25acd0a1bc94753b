#!/usr/bin/env bash
# The body of every job: starts one launcher on each node, forwards signals, and requeues the job if its time limit was
# near. The scripts with the sbatch headers call it: launch.sh RECIPE [key=value ...]
set -euo pipefail
umask 077 # logs contain prompts and completions
cd "$(dirname "${BASH_SOURCE[0]}")/.."

time_is_up='' stop_requested='' interrupted='' step=''
# shellcheck disable=SC2329 # called by the traps
request_save() { # again until the step ends: srun loses a signal that comes before its tasks run
  sleep 1
  while kill -USR1 "$1" 2> /dev/null; do sleep 3; done
}
# shellcheck disable=SC2329
request_stop() { kill -TERM "$step" 2> /dev/null || true; }
trap 'interrupted=1 time_is_up=1; echo "time limit near: graceful shutdown"; [ -z "$step" ] || request_save "$step" &' USR1
trap 'interrupted=1 stop_requested=1; echo "stop requested: graceful shutdown"; [ -z "$step" ] || request_stop' TERM INT

status=0
run_step() { # the srun command of a phase; srun ignores USR1 until it forwards it to the tasks
  local command=() quoted waited
  quoted=$("$python" -I sft_recipes/launch/srun.py "$@") || exit
  eval "command=($quoted)" # quoted by python's shlex
  (trap '' USR1 && exec "${command[@]}") &
  step=$!
  [ -z "$time_is_up" ] || request_save "$step" & # the signal came before the step
  [ -z "$stop_requested" ] || request_stop
  if [ "$1" = train ]; then
    tail --pid="$step" -n +1 -F "$SFT_RECIPES_LOGS/node-0-$(hostname -s).txt" 2> /dev/null &
  fi
  while true; do # a signal ends `wait`, not the step; 127: the step was waited for already
    interrupted='' waited=0
    wait "$step" || waited=$?
    [ "$waited" -eq 127 ] || status=$waited
    [ -n "$interrupted" ] || break
  done
  wait || true # for tail and request_save
  step=''
}

fail() {
  echo "error: $1" >&2
  exit 2
}

if [ -n "${SWEEP_TASKS:-}" ]; then # a run of a sweep: its name and overrides
  IFS=$'\t' read -ra task <<< "$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$SWEEP_TASKS")"
  export NAME=${task[0]}
  set -- "$@" "${task[@]:1}"
fi
recipe=$1 # not RECIPE: make exports it, and a job would train the recipe of an earlier command in its shell
shift
if [ -f slurm/cluster.env ]; then
  set -a
  # shellcheck source=/dev/null
  . slurm/cluster.env
  set +a
fi
RUNS_DIR=$(realpath -m "${RUNS_DIR:-runs}")
export RUNS_DIR PYTHONPATH="$PWD" PYTHONUNBUFFERED=1
case ${RUNTIME:-local} in pyxis | apptainer)
  HF_HOME=$(realpath -m "${HF_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/huggingface}")
  export HF_HOME SFT_RECIPES_IMAGE="${IMAGE:-}" ;;
esac
# Any recent Python can print a command line; the machine's own may be older.
python=''
for candidate in .venv/bin/python python3.12 python3.11 python3.13 python3; do
  if command -v "$candidate" > /dev/null; then
    python=$candidate
    break
  fi
done

if [ -n "${DRY_RUN:-}" ] && [ -z "${SLURM_JOB_ID:-}" ]; then
  sed -n "s/^#SBATCH \([^ ]*\).*/\1/p" "slurm/$recipe.sh" | paste -sd ' ' | sed 's/^/sbatch /'
  if [ "$(sed -n 's/^#SBATCH --nodes=\([0-9]*\).*/\1/p' "slurm/$recipe.sh")" -gt 1 ]; then
    echo "on the first node:"
    "$python" -I sft_recipes/launch/srun.py prepare "$recipe" "$@"
  fi
  echo "on each node, by one srun:"
  exec "$python" -I sft_recipes/launch/srun.py train "$recipe" "$@"
fi
[ -z "${DRY_RUN:-}" ] || fail "DRY_RUN: not available inside a job. Use DRY_RUN=1 slurm/$recipe.sh outside of it"
[ -n "${SLURM_JOB_ID:-}" ] ||
  fail "Slurm: not inside a job. Use sbatch slurm/$recipe.sh, or DRY_RUN=1 slurm/$recipe.sh to print its commands"
[ -n "${SLURMD_NODENAME:-}" ] ||
  fail "Slurm: an interactive allocation cannot be requeued. Use sbatch slurm/$recipe.sh, or srun --ntasks-per-node=1 --cpu-bind=none .venv/bin/python -m sft_recipes train $recipe"
[ "${SLURM_NTASKS:-$SLURM_JOB_NUM_NODES}" -eq "$SLURM_JOB_NUM_NODES" ] ||
  fail "Slurm: found $SLURM_NTASKS tasks on $SLURM_JOB_NUM_NODES nodes, expected one per node. Use --ntasks-per-node=1"

start=${SLURM_RESTART_COUNT:-0}
job_logs=$PWD/slurm/logs/$SLURM_JOB_NAME-$SLURM_JOB_ID
export SFT_RECIPES_LOGS="$job_logs/start-$start"
mkdir -p "$SFT_RECIPES_LOGS"
ln -sfn "start-$start" "$job_logs/latest"
ln -sfn "$SLURM_JOB_NAME-$SLURM_JOB_ID" slurm/logs/latest
# Since Slurm 22.05 srun ignores sbatch's --cpus-per-task; without it a launcher and its ranks may get one core.
# Equivalent variables, or bindings to cores of the shell that called sbatch, would conflict with it.
cores=$(tr ',' '\n' <<< "$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | head -n 1)
export SRUN_CPUS_PER_TASK=$cores
unset SLURM_TRES_PER_TASK "${!SLURM_CPU_BIND@}"

echo "job $SLURM_JOB_ID, start $((start + 1)), $SLURM_JOB_NUM_NODES x ${SLURM_GPUS_ON_NODE:-0} GPUs, $cores cores each: $SLURM_JOB_NODELIST"
echo "logs: $SFT_RECIPES_LOGS"

# Two phases: `prepare` as one process, then `train` on every node. On one node `train` does both.
tasks=$SLURM_JOB_NUM_NODES
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  tasks=1
  run_step prepare "$recipe" "$@"
  [ -z "$time_is_up$stop_requested" ] || [ "$status" -ne 0 ] || status=75
fi
if [ "$status" -eq 0 ]; then
  tasks=$SLURM_JOB_NUM_NODES
  run_step train "$recipe" "$@"
fi
"$python" -I sft_recipes/launch/outcome.py "$recipe" "$RUNS_DIR/${NAME:-$recipe-$SLURM_JOB_ID}" "$tasks" "$status" \
  ${time_is_up:+time-limit} ${stop_requested:+stop-requested}
