#!/usr/bin/env bash
# Submits a recipe's job and prints its output until it ends: submit.sh RECIPE [sbatch option ...] -- [key=value ...]
# Ctrl-C ends the printing; the job continues.
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
  available=$(grep -l '^#SBATCH' slurm/*.sh | sed 's|slurm/||; s|\.sh$||' | paste -sd ' ')
  echo "error: RECIPE: $script not found. Available: $available" >&2
  exit 2
fi
if [ -n "${DRY_RUN:-}" ]; then
  exec "$script" "$@"
fi
if [ -n "${GPUS:-}${DEVICES:-}" ]; then
  echo "error: GPUS, DEVICES: Slurm selects the GPUs of a job. Set NODES, or use sbatch --nodes= --gpus-per-node= $script" >&2
  exit 2
fi
if ! command -v sbatch > /dev/null; then
  echo "error: Slurm: sbatch is not on PATH. On one machine use make train RECIPE=$recipe" >&2
  exit 2
fi
if [ -f slurm/cluster.env ]; then
  set -a
  # shellcheck source=/dev/null
  . slurm/cluster.env
  set +a
fi
if ! job=$(sbatch --parsable ${options[@]+"${options[@]}"} "$script" "$@"); then
  echo "error: Slurm: sbatch rejected the job for the reason above. Set sbatch options in slurm/cluster.env" >&2
  exit 2
fi
job=${job%%;*}
job_field() { scontrol show job --oneliner "$job" 2> /dev/null | sed -n "s/.* $1=\([^ ]*\).*/\1/p"; }
output=$(job_field StdOut)
echo "job $job submitted; output: $output; cancel it: scancel $job"
trap 'echo; echo "job $job continues; follow it: tail -F $output, make status RUN=${NAME:-$recipe-$job}"; exit 0' INT
job_state() { scontrol show job --oneliner "$job" 2> /dev/null | sed -n 's/.* JobState=\([A-Z_]*\) Reason=\([^ ]*\).*/\1 (\2)/p'; }
printed_state='' tail_pid='' unanswered=0
# A busy controller does not answer for a while; one that no longer knows the job never answers again.
while [ "$unanswered" -lt 12 ]; do
  state=$(job_state)
  if [ -z "$state" ]; then unanswered=$((unanswered + 1)); else unanswered=0; fi
  case $state in
    COMPLETED* | FAILED* | CANCELLED* | TIMEOUT* | NODE_FAIL* | OUT_OF_MEMORY* | DEADLINE* | PREEMPTED* | BOOT_FAIL*) break ;;
  esac
  if [ -z "$tail_pid" ] && [ -e "$output" ]; then
    tail --pid=$$ -n +1 -F "$output" 2> /dev/null &
    tail_pid=$!
  elif [ -z "$tail_pid" ] && [ "$state" != "$printed_state" ]; then
    echo "$state"
    printed_state=$state
    case $state in *"(Partition"*Limit* | *"(BadConstraints"* | *"(PartitionDown"*)
      echo "pending until an administrator changes the partition; cancel it: scancel $job" ;;
    esac
  fi
  sleep 3
done
if [ -z "$tail_pid" ] && [ -e "$output" ]; then # the job ended between two checks
  cat "$output"
else
  sleep 2
  kill "$tail_pid" 2> /dev/null || true
fi
echo "job $job: ${state:-unknown to Slurm}"
case $state in
  COMPLETED*) ;;
  FAILED*)
    code=$(job_field ExitCode)
    exit "$((${code%%:*} > 0 ? ${code%%:*} : 1))"
    ;;
  *) exit 1 ;;
esac
