#!/usr/bin/env bash
#SBATCH --job-name=sft-tiny
#SBATCH --nodes=2                             # the cluster is tried, without a GPU, before GPUs are asked for
#SBATCH --ntasks-per-node=1                   # one launcher a node, which starts the node's ranks
#SBATCH --cpus-per-task=2
#SBATCH --mem=8G
#SBATCH --time=00:30:00
#SBATCH --requeue                             # safe: the run goes on from its newest whole checkpoint
#SBATCH --signal=B:USR1@60                    # seconds before the limit: save, go back into the queue; longer than a save takes
#SBATCH --output=slurm/logs/%x-%j.out
#SBATCH --open-mode=append                    # a job that starts again writes on
set -euo pipefail
exec "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/slurm/launch.sh" tiny "$@" # sbatch runs a copy elsewhere
