#!/usr/bin/env bash
# Generated from the recipe by slurm/write_headers.py; do not edit.
#SBATCH --job-name=sft-tiny
#SBATCH --nodes=2                             # tests the cluster without a GPU
#SBATCH --ntasks-per-node=1                   # one launcher per node, which starts the node's ranks
#SBATCH --cpus-per-task=2
#SBATCH --mem=8G
#SBATCH --time=00:30:00
#SBATCH --requeue                             # safe: the run resumes from its latest valid checkpoint
#SBATCH --signal=B:USR1@60                    # seconds before the limit: save and requeue; longer than a save takes
#SBATCH --output=slurm/logs/%x-%j.out
#SBATCH --open-mode=append                    # a requeued job continues its log
set -euo pipefail
# sbatch runs a copy of this script in another folder.
exec "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/slurm/launch.sh" tiny "$@"
