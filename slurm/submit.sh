#!/usr/bin/env bash
# Submits a recipe's job and shows what it says until it ends: submit.sh RECIPE [option of sbatch ...] -- [key=value ...]
# Ctrl-C leaves off looking; the job goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

recipe=$1
shift
options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  options+=("$1")
  shift
done
shift || true
script=slurm/$recipe.sh
if [ ! -f "$script" ]; then
  there=$(grep -l '^#SBATCH' slurm/*.sh | sed 's|slurm/||; s|\.sh$||' | paste -sd ' ')
  echo "error: RECIPE: there is no $script; there are: $there" >&2
  exit 2
fi
if ! command -v sbatch > /dev/null; then
  echo "error: there is no Slurm here (no sbatch on the PATH); on one machine: make train RECIPE=$recipe" >&2
  exit 2
fi
if [ -f slurm/cluster.env ]; then
  set -a
  # shellcheck source=/dev/null
  . slurm/cluster.env
  set +a
fi
unset RECIPE # the script's own
if ! job=$(sbatch --parsable "${options[@]}" "$script" "$@"); then
  echo "error: Slurm does not take the job, for the reason above; options of sbatch go into slurm/cluster.env" >&2
  exit 2
fi
job=${job%%;*}
output=slurm/logs/sft-$recipe-$job.out
echo "job $job is submitted; its output: $output; end it: scancel $job"
trap 'echo; echo "job $job goes on; look again: tail -F $output, make status RUN=${NAME:-$recipe-$job}"; exit 0' INT
waiting=''
until [ -e "$output" ]; do
  state=$(squeue --noheader --jobs="$job" --format='%T (%r)' 2> /dev/null) || break
  [ -n "$state" ] || break
  [ "$state" = "$waiting" ] || echo "$state"
  waiting=$state
  sleep 2
done
tail -n +1 -F "$output" 2> /dev/null &
shown=$!
while [ -n "$(squeue --noheader --jobs="$job" --states=PENDING,RUNNING,COMPLETING,CONFIGURING,REQUEUED,SUSPENDED 2> /dev/null)" ]; do
  sleep 2
done
sleep 1
kill "$shown" 2> /dev/null || true
