#!/usr/bin/env bash
# The body of every job: starts one launcher on each node, passes signals on, and has Slurm start the job again where its
# time was up. Called by the headers beside it: launch.sh RECIPE [key=value ...]
set -euo pipefail
umask 077 # logs hold answers, and prompts
cd "$(dirname "${BASH_SOURCE[0]}")/.."

time_is_up='' ended='' interrupted='' step=''
# shellcheck disable=SC2329 # the traps call them
have_saved() { # once every launcher hears: srun loses a signal that comes before, and a launcher is ended by it
  until [ "$(find "$SFT_RECIPES_LOGS" -name '.hears-*' | wc -l)" -ge "$SLURM_JOB_NUM_NODES" ]; do
    kill -0 "$step" 2> /dev/null || return 0
    sleep 1
  done
  kill -USR1 "$step" 2> /dev/null || true
}
# shellcheck disable=SC2329
have_ended() { kill -TERM "$step" 2> /dev/null || true; }
trap 'interrupted=1 time_is_up=1; echo "the time is nearly up: saving"; [ -z "$step" ] || have_saved &' USR1
trap 'interrupted=1 ended=1; echo "asked to end: saving"; [ -z "$step" ] || have_ended' TERM INT

fail() {
  echo "error: $1" >&2
  exit 2
}

recipe=$1 # never RECIPE: make exports it, and a job would train what its shell was last told
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
# Any python of today will do to write a command line; the machine's own may be older.
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
[ -z "${DRY_RUN:-}" ] || fail "DRY_RUN: this is a job already; show what it would do without one: DRY_RUN=1 slurm/$recipe.sh"
[ -n "${SLURM_JOB_ID:-}" ] ||
  fail "this is the body of a job: sbatch slurm/$recipe.sh, or DRY_RUN=1 slurm/$recipe.sh to see what it would do"
[ -n "${SLURMD_NODENAME:-}" ] ||
  fail "an allocation by hand is no job that starts again: sbatch slurm/$recipe.sh, or srun --ntasks-per-node=1 --cpu-bind=none .venv/bin/python -m sft_recipes train $recipe"
[ "${SLURM_NTASKS:-$SLURM_JOB_NUM_NODES}" -eq "$SLURM_JOB_NUM_NODES" ] ||
  fail "Slurm: $SLURM_NTASKS tasks on $SLURM_JOB_NUM_NODES nodes; wanted one a node: --ntasks-per-node=1"

# One task of an array may have the whole array's number, and all of them would be put back into the queue by it.
job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
start=${SLURM_RESTART_COUNT:-0}
job_logs=$PWD/slurm/logs/$SLURM_JOB_NAME-$SLURM_JOB_ID
export SFT_RECIPES_LOGS="$job_logs/start-$start" SFT_RECIPES_REQUEUE="$job_logs/start-$start/requeue"
mkdir -p "$SFT_RECIPES_LOGS"
rm -f "$SFT_RECIPES_REQUEUE" "$SFT_RECIPES_LOGS"/{asked-to-end,refused,.hears-*}
ln -sfn "start-$start" "$job_logs/latest"
ln -sfn "$SLURM_JOB_NAME-$SLURM_JOB_ID" slurm/logs/latest
if [ "$start" -eq 0 ]; then
  rm -rf "$RUNS_DIR/.jobs/$SLURM_JOB_ID" # of another job with this number, on a cluster that counts anew
fi
# srun has not taken sbatch's --cpus-per-task since Slurm 22.05; without it a launcher and its ranks may get one core.
# What says the same in other words, or binds to cores of the shell that called sbatch, would stand against it.
cores=$(tr ',' '\n' <<< "$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | head -n 1)
export SRUN_CPUS_PER_TASK=$cores
unset SLURM_TRES_PER_TASK "${!SLURM_CPU_BIND@}"

command=()
words=$("$python" -I sft_recipes/launch/srun.py "$recipe" "$@")
eval "command=($words)" # quoted by python's shlex
echo "job $SLURM_JOB_ID, start $((start + 1)), $SLURM_JOB_NUM_NODES x ${SLURM_GPUS_ON_NODE:-0} GPUs, $cores cores each: $SLURM_JOB_NODELIST"
echo "logs: $SFT_RECIPES_LOGS"

"${command[@]}" &
step=$!
[ -z "$time_is_up" ] || have_saved & # it came before there was somebody to tell
[ -z "$ended" ] || have_ended
tail --pid="$step" -n +1 -F "$SFT_RECIPES_LOGS/node-0-$(hostname -s).txt" 2> /dev/null &
status=0
while true; do # a signal ends `wait`, not the step; 127 says that the step was waited for already
  interrupted='' waited=0
  wait "$step" || waited=$?
  [ "$waited" -eq 127 ] || status=$waited
  [ -n "$interrupted" ] || break
done
wait || true # for what shows, and for what would have told
[ ! -e "$SFT_RECIPES_LOGS/refused" ] || [ "$status" -lt 128 ] || status=2 # srun ended the nodes that were not so quick

# 75 says that all is saved, a signal (128 and above) that it came before there was something to save. A job that was
# asked to end stays ended; one that Slurm preempts may hear of it in its ranks alone, in its grace time.
again='' now=$(scontrol show job --oneliner "$job" 2> /dev/null || true)
if [ "$status" -eq 75 ] || [ "$status" -ge 128 ]; then
  again=$time_is_up
  [ ! -e "$SFT_RECIPES_LOGS/asked-to-end" ] || again='' # by a SIGTERM to the step alone
  [ ! -e "$SFT_RECIPES_REQUEUE" ] || again=1            # a node was lost
  if grep -q ' PreemptTime=[0-9]' <<< "$now"; then again=1; fi
fi
if [ -n "$now" ] && ! grep -q " Restarts=$start " <<< "$now"; then
  again='' # this node was cut off, and the job has begun anew without it: that start is not to be ended
fi
by_hand="NAME=$(printf %q "${NAME:-$recipe-$SLURM_JOB_ID}") sbatch slurm/$recipe.sh"
if [ -n "$again" ] && [ -z "$ended" ]; then
  echo "job $job goes back into the queue, and goes on from what it saved"
  scontrol requeue "$job" || echo "error: Slurm does not requeue it; go on with $by_hand" >&2
elif [ "$status" -ge 128 ] && [ -z "$ended" ]; then
  echo "error: srun or a launcher was ended by signal $((status - 128)); of a launcher, srun names the node above, and what" \
    "the others say comes of that; go on with $by_hand" >&2
fi
exit "$status"
