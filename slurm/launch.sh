#!/usr/bin/env bash
# The body of every job: starts one launcher on each node, passes signals on, and has Slurm start the job again where its
# time was up. Called by the headers beside it: launch.sh RECIPE [key=value ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

recipe=${RECIPE:-$1}
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

if [ -n "${DRY_RUN:-}" ]; then # on a login node, without a job
  sed -n "s/^#SBATCH \([^ ]*\).*/\1/p" "slurm/$recipe.sh" | paste -sd ' ' | sed 's/^/sbatch /'
  echo "on each node, by one srun:"
  exec python3 -I sft_recipes/launching/step.py "$recipe" "$@"
fi
if [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "error: this is the body of a job: sbatch slurm/$recipe.sh, or DRY_RUN=1 slurm/$recipe.sh to see what it would do" >&2
  exit 2
fi
if [ "${SLURM_NTASKS:-$SLURM_JOB_NUM_NODES}" -ne "$SLURM_JOB_NUM_NODES" ]; then
  echo "error: Slurm: $SLURM_NTASKS tasks on $SLURM_JOB_NUM_NODES nodes; wanted one a node: --ntasks-per-node=1" >&2
  exit 2
fi

start=${SLURM_RESTART_COUNT:-0}
job_logs=$PWD/slurm/logs/$SLURM_JOB_NAME-$SLURM_JOB_ID
export SFT_RECIPES_LOGS="$job_logs/start-$start" SFT_RECIPES_REQUEUE="$job_logs/start-$start/requeue"
mkdir -p "$SFT_RECIPES_LOGS"
ln -sfn "start-$start" "$job_logs/latest"
ln -sfn "$SLURM_JOB_NAME-$SLURM_JOB_ID" slurm/logs/latest
if [ "$start" -eq 0 ]; then
  rm -rf "$RUNS_DIR/.jobs/$SLURM_JOB_ID" # of another job with this number, on a cluster that counts anew
fi
# srun has not taken sbatch's --cpus-per-task since Slurm 22.05; without it a launcher and its ranks may get one core.
cores=$(tr ',' '\n' <<< "$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | head -n 1)
export SRUN_CPUS_PER_TASK=$cores

command=()
words=$(python3 -I sft_recipes/launching/step.py "$recipe" "$@")
eval "command=($words)" # quoted by python's shlex
echo "job $SLURM_JOB_ID, start $((start + 1)), $SLURM_JOB_NUM_NODES x ${SLURM_GPUS_ON_NODE:-0} GPUs, $cores cores each: $SLURM_JOB_NODELIST"
echo "logs: $SFT_RECIPES_LOGS"

time_is_up='' ended='' interrupted='' step=''
# shellcheck disable=SC2329 # the traps call it
pass_on() { [ -z "$step" ] || kill "-$1" "$step" 2> /dev/null || true; }
trap 'interrupted=1 time_is_up=1; echo "the time is nearly up: saving"; pass_on USR1' USR1
trap 'interrupted=1 ended=1; echo "asked to end: saving"; pass_on TERM' TERM INT
"${command[@]}" &
step=$!
tail --pid="$step" -n +1 -F "$SFT_RECIPES_LOGS/node-0-$(hostname -s).txt" 2> /dev/null &
shown=$!
status=0
while true; do # a signal ends `wait`, not the step; 127 says that the step was waited for already
  interrupted='' waited=0
  wait "$step" || waited=$?
  [ "$waited" -eq 127 ] || status=$waited
  [ -n "$interrupted" ] || break
done
wait "$shown" || true

# 75 says that all is saved; a signal (128 and above) that it came before there was something to save.
if [ -n "$time_is_up" ] && [ -z "$ended" ] && { [ "$status" -eq 75 ] || [ "$status" -ge 128 ]; } || [ -e "$SFT_RECIPES_REQUEUE" ]; then
  echo "job $SLURM_JOB_ID goes back into the queue, and goes on from what it saved"
  scontrol requeue "$SLURM_JOB_ID" ||
    echo "error: Slurm does not requeue it; go on with NAME=${NAME:-$recipe-$SLURM_JOB_ID} sbatch slurm/$recipe.sh" >&2
fi
exit "$status"
