#!/usr/bin/env bash
# The body of every job: starts one launcher on each node, forwards signals, and requeues the job if its time limit was
# near. The scripts with the sbatch headers call it: launch.sh RECIPE [key=value ...]
set -euo pipefail
umask 077 # logs contain prompts and completions
cd "$(dirname "${BASH_SOURCE[0]}")/.."

time_is_up='' stop_requested='' interrupted='' step=''
# shellcheck disable=SC2329 # called by the traps
request_save() { # once every launcher handles signals: srun loses an earlier one, and a launcher would be killed by it
  until [ "$(find "$SFT_RECIPES_LOGS" -name '.ready-*' | wc -l)" -ge "$SLURM_JOB_NUM_NODES" ]; do
    kill -0 "$step" 2> /dev/null || return 0
    sleep 1
  done
  kill -USR1 "$step" 2> /dev/null || true
}
# shellcheck disable=SC2329
request_stop() { kill -TERM "$step" 2> /dev/null || true; }
trap 'interrupted=1 time_is_up=1; echo "time limit near: graceful shutdown"; [ -z "$step" ] || request_save &' USR1
trap 'interrupted=1 stop_requested=1; echo "stop requested: graceful shutdown"; [ -z "$step" ] || request_stop' TERM INT

fail() {
  echo "error: $1" >&2
  exit 2
}

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
  echo "on each node, by one srun:"
  exec "$python" -I sft_recipes/launch/srun.py "$recipe" "$@"
fi
[ -z "${DRY_RUN:-}" ] || fail "DRY_RUN: not available inside a job. Use DRY_RUN=1 slurm/$recipe.sh outside of it"
[ -n "${SLURM_JOB_ID:-}" ] ||
  fail "Slurm: not inside a job. Use sbatch slurm/$recipe.sh, or DRY_RUN=1 slurm/$recipe.sh to print its commands"
[ -n "${SLURMD_NODENAME:-}" ] ||
  fail "Slurm: an interactive allocation cannot be requeued. Use sbatch slurm/$recipe.sh, or srun --ntasks-per-node=1 --cpu-bind=none .venv/bin/python -m sft_recipes train $recipe"
[ "${SLURM_NTASKS:-$SLURM_JOB_NUM_NODES}" -eq "$SLURM_JOB_NUM_NODES" ] ||
  fail "Slurm: found $SLURM_NTASKS tasks on $SLURM_JOB_NUM_NODES nodes, expected one per node. Use --ntasks-per-node=1"

# One task of an array may have the array's own number, and requeueing that would requeue all tasks.
job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
start=${SLURM_RESTART_COUNT:-0}
job_logs=$PWD/slurm/logs/$SLURM_JOB_NAME-$SLURM_JOB_ID
export SFT_RECIPES_LOGS="$job_logs/start-$start" SFT_RECIPES_REQUEUE="$job_logs/start-$start/requeue"
mkdir -p "$SFT_RECIPES_LOGS"
rm -f "$SFT_RECIPES_REQUEUE" "$SFT_RECIPES_LOGS"/{stop-requested,rejected,.ready-*}
ln -sfn "start-$start" "$job_logs/latest"
ln -sfn "$SLURM_JOB_NAME-$SLURM_JOB_ID" slurm/logs/latest
if [ "$start" -eq 0 ]; then
  rm -rf "$RUNS_DIR/.jobs/$SLURM_JOB_ID" # of another job with this number, on a cluster that restarted its count
fi
# Since Slurm 22.05 srun ignores sbatch's --cpus-per-task; without it a launcher and its ranks may get one core.
# Equivalent variables, or bindings to cores of the shell that called sbatch, would conflict with it.
cores=$(tr ',' '\n' <<< "$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | head -n 1)
export SRUN_CPUS_PER_TASK=$cores
unset SLURM_TRES_PER_TASK "${!SLURM_CPU_BIND@}"

command=()
quoted=$("$python" -I sft_recipes/launch/srun.py "$recipe" "$@")
eval "command=($quoted)" # quoted by python's shlex
echo "job $SLURM_JOB_ID, start $((start + 1)), $SLURM_JOB_NUM_NODES x ${SLURM_GPUS_ON_NODE:-0} GPUs, $cores cores each: $SLURM_JOB_NODELIST"
echo "logs: $SFT_RECIPES_LOGS"

"${command[@]}" &
step=$!
[ -z "$time_is_up" ] || request_save & # the signal came before the step
[ -z "$stop_requested" ] || request_stop
tail --pid="$step" -n +1 -F "$SFT_RECIPES_LOGS/node-0-$(hostname -s).txt" 2> /dev/null &
status=0
while true; do # a signal ends `wait`, not the step; 127: the step was waited for already
  interrupted='' waited=0
  wait "$step" || waited=$?
  [ "$waited" -eq 127 ] || status=$waited
  [ -n "$interrupted" ] || break
done
wait || true # for tail and request_save
[ ! -e "$SFT_RECIPES_LOGS/rejected" ] || [ "$status" -lt 128 ] || status=2 # srun killed the slower nodes

# 75: stopped with a complete checkpoint. 128 and above: killed by a signal before there was a state to save. A job that
# received a stop request is not requeued; if Slurm preempts a job, only its ranks may receive the signal.
requeue='' state=$(scontrol show job --oneliner "$job" 2> /dev/null || true)
if [ "$status" -eq 75 ] || [ "$status" -ge 128 ]; then
  requeue=$time_is_up
  [ ! -e "$SFT_RECIPES_LOGS/stop-requested" ] || requeue='' # SIGTERM to the step alone
  [ ! -e "$SFT_RECIPES_REQUEUE" ] || requeue=1              # a node was lost
  if grep -q ' PreemptTime=[0-9]' <<< "$state"; then requeue=1; fi
fi
if [ -n "$state" ] && ! grep -q " Restarts=$start " <<< "$state"; then
  requeue='' # this node lost its connection, and the job runs again without it: do not end that start
fi
resume="NAME=$(printf %q "${NAME:-$recipe-$SLURM_JOB_ID}") sbatch slurm/$recipe.sh"
if [ -n "$requeue" ] && [ -z "$stop_requested" ]; then
  echo "job $job: requeued; resumes from its latest checkpoint"
  scontrol requeue "$job" || echo "error: Slurm: job $job not requeued. Resume with $resume" >&2
elif [ "$status" -ge 128 ] && [ -z "$stop_requested" ]; then
  echo "error: srun or a launcher was killed by signal $((status - 128)); srun names the node above, later errors are" \
    "consequences. Not requeued. Resume with $resume" >&2
elif [ "$status" -eq 75 ] && grep -q " Restarts=$start " <<< "$state"; then
  echo "job $job: not requeued. Resume with $resume"
fi
exit "$status"
