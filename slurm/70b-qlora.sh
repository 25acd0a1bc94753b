#!/usr/bin/env bash
#SBATCH --job-name=sft-70b-qlora
#SBATCH --nodes=1                             # 1 GPU: 55 GiB, an 80 GB card's
#SBATCH --ntasks-per-node=1                   # one launcher a node, which starts the node's ranks
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8                     # the ranks' and their data workers'
#SBATCH --mem=128G                            # not the whole node, whose other GPUs are for others
#SBATCH --time=24:00:00
#SBATCH --requeue                             # safe: the run goes on from its newest whole checkpoint
#SBATCH --signal=B:USR1@300                   # seconds before the limit: save, go back into the queue; longer than a save takes
#SBATCH --output=slurm/logs/%x-%j.out
#SBATCH --open-mode=append                    # a job that starts again writes on
set -euo pipefail
exec "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/slurm/launch.sh" 70b-qlora "$@" # sbatch runs a copy elsewhere
