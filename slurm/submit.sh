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
if [ -n "${DRY_RUN:-}" ]; then
  exec "$script" "$@"
fi
if [ -n "${GPUS:-}${DEVICES:-}" ]; then
  echo "error: GPUS, DEVICES: Slurm gives a job its GPUs; say NODES=, or sbatch --nodes= --gpus-per-node= $script" >&2
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
if ! job=$(sbatch --parsable ${options[@]+"${options[@]}"} "$script" "$@"); then
  echo "error: Slurm does not take the job, for the reason above; options of sbatch go into slurm/cluster.env" >&2
  exit 2
fi
job=${job%%;*}
told() { scontrol show job --oneliner "$job" 2> /dev/null | sed -n "s/.* $1=\([^ ]*\).*/\1/p"; }
output=$(told StdOut)
echo "job $job is submitted; its output: $output; end it: scancel $job"
trap 'echo; echo "job $job goes on; look again: tail -F $output, make status RUN=${NAME:-$recipe-$job}"; exit 0' INT
state() { scontrol show job --oneliner "$job" 2> /dev/null | sed -n 's/.* JobState=\([A-Z_]*\) Reason=\([^ ]*\).*/\1 (\2)/p'; }
waiting='' shown='' silent=0
# A controller that does not answer just now says nothing of the job; one that has forgotten it never will.
while [ "$silent" -lt 12 ]; do
  now=$(state)
  if [ -z "$now" ]; then silent=$((silent + 1)); else silent=0; fi
  case $now in
    COMPLETED* | FAILED* | CANCELLED* | TIMEOUT* | NODE_FAIL* | OUT_OF_MEMORY* | DEADLINE* | PREEMPTED* | BOOT_FAIL*) break ;;
  esac
  if [ -z "$shown" ] && [ -e "$output" ]; then
    tail --pid=$$ -n +1 -F "$output" 2> /dev/null &
    shown=$!
  elif [ -z "$shown" ] && [ "$now" != "$waiting" ]; then
    echo "$now"
    waiting=$now
    case $now in *"(Partition"*Limit* | *"(BadConstraints"* | *"(PartitionDown"*)
      echo "it waits until somebody changes that; take it back: scancel $job" ;;
    esac
  fi
  sleep 3
done
if [ -z "$shown" ] && [ -e "$output" ]; then # it ended between two looks
  cat "$output"
else
  sleep 2
  kill "$shown" 2> /dev/null || true
fi
echo "job $job: ${now:-Slurm no longer knows it}"
case $now in
  COMPLETED*) ;;
  FAILED*)
    code=$(told ExitCode)
    exit "$((${code%%:*} > 0 ? ${code%%:*} : 1))"
    ;;
  *) exit 1 ;;
esac
