#!/usr/bin/env bash
# Generated from the recipe by slurm/write_headers.py; do not edit.
#SBATCH --job-name=sft-70b-lora
#SBATCH --nodes=1                             # 8 GPUs (h100-80g), forecast 50 GiB per GPU, needs at least 4
#SBATCH --ntasks-per-node=1                   # one launcher per node, which starts the node's ranks
#SBATCH --gpus-per-node=8
#SBATCH --exclusive                           # all cores and memory of the node, for 8 ranks and their data workers
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue                             # safe: the run resumes from its latest valid checkpoint
#SBATCH --signal=B:USR1@300                   # seconds before the limit: save and requeue; longer than a save takes
#SBATCH --output=slurm/logs/%x-%j.out
#SBATCH --open-mode=append                    # a requeued job continues its log
set -euo pipefail
# sbatch runs a copy of this script in another folder.
exec "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/slurm/launch.sh" 70b-lora "$@"
