#!/usr/bin/env bash
#SBATCH --job-name=sft-8b
#SBATCH --nodes=1                             # 8 GPUs: 36 GiB of each; fewer than 4 do not hold it
#SBATCH --ntasks-per-node=1                   # one launcher a node, which starts the node's ranks
#SBATCH --gpus-per-node=8
#SBATCH --exclusive                           # all of the node's cores and memory: 8 ranks and their data workers
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue                             # safe: the run goes on from its newest whole checkpoint
#SBATCH --signal=B:USR1@600                   # seconds before the limit: save, go back into the queue; longer than a save takes
#SBATCH --output=slurm/logs/%x-%j.out
#SBATCH --open-mode=append                    # a job that starts again writes on
set -euo pipefail
exec "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/slurm/launch.sh" 8b "$@" # sbatch runs a copy elsewhere
