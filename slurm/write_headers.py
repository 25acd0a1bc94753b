"""Write slurm/RECIPE.sh, the sbatch header of each recipe, from its plan.

PYTHONPATH=. .venv/bin/python slurm/write_headers.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from sft_recipes.config import loader
from sft_recipes.launch.topology import plan_topology
from sft_recipes.planner import plan as plans
from sft_recipes.planner import suggest
from sft_recipes.planner.plan import Plan
from sft_recipes.planner.save_time import SLOW_DISK_BYTES_PER_SECOND
from sft_recipes.runtime.paths import REPOSITORY
from sft_recipes.runtime.units import GIB

_GPUS_OF_A_NODE = 8
_CORES_PER_GPU = 8


def sbatch_script(recipe: str) -> str:
    """Return the content of slurm/RECIPE.sh."""
    loaded = loader.load(recipe)
    plan = plans.resolve(loaded, plan_topology(loaded))
    fewest = suggest.smallest_gpu_count(loaded, plan.gpu_type) if plan.gpus else None
    options = "".join(
        (f"#SBATCH --{option}".ljust(46) + f"# {why}" if why else f"#SBATCH --{option}") + "\n"
        for option, why in _options(plan, fewest)
    )
    return f"""#!/usr/bin/env bash
# Generated from the recipe by slurm/write_headers.py; do not edit.
{options}set -euo pipefail
# sbatch runs a copy of this script in another folder.
exec "${{SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}/slurm/launch.sh" {recipe} "$@"
"""


def _options(plan: Plan, fewest: int | None) -> Iterator[tuple[str, str]]:
    """Yield each sbatch option and its comment."""
    one_launcher = ("ntasks-per-node=1", "one launcher per node, which starts the node's ranks")
    yield f"job-name=sft-{plan.recipe}", ""
    if plan.gpus:
        gpus_per_node, memory = plan.gpus // plan.nodes, (plan.memory_bytes_per_gpu or {"total": 0})["total"] / GIB
        size = f"{plan.gpus} GPU{'s' if plan.gpus > 1 else ''} ({plan.gpu_type}), forecast {memory:.0f} GiB per GPU"
        yield f"nodes={plan.nodes}", size + (f", needs at least {fewest}" if plan.gpus > 1 else "")
        yield one_launcher
        yield f"gpus-per-node={gpus_per_node}", ""
        if gpus_per_node == _GPUS_OF_A_NODE:
            yield "exclusive", f"all cores and memory of the node, for {gpus_per_node} ranks and their data workers"
            yield "mem=0", ""
        else:
            # Six times the forecast, or the page cache of the bf16 weights, at least 64 GiB.
            forecast = (plan.host_bytes_per_node or {"total": 0})["total"]
            gib = 32 * max(2, round(max(6 * forecast, 2 * (plan.parameters or 0)) / GIB / 32))
            yield f"cpus-per-task={_CORES_PER_GPU * gpus_per_node}", "for the ranks and their data workers"
            yield f"mem={gib}G", "a part of the node, whose other GPUs are for other jobs"
    else:
        yield "nodes=2", "tests the cluster without a GPU"
        yield one_launcher
        yield "cpus-per-task=2", ""
        yield "mem=8G", ""
    yield f"time={'24:00:00' if plan.gpus else '00:30:00'}", ""
    yield "requeue", "safe: the run resumes from its latest valid checkpoint"
    # 1.5 times a save on a slow disk, in steps of five minutes; on the CPU one minute.
    save = (plan.checkpoint_bytes or 0) / plan.nodes / SLOW_DISK_BYTES_PER_SECOND
    seconds = 300 * max(1, math.ceil(1.5 * save / 300)) if plan.gpus else 60
    yield f"signal=B:USR1@{seconds}", "seconds before the limit: save and requeue; longer than a save takes"
    yield "output=slurm/logs/%x-%j.out", ""
    yield "open-mode=append", "a requeued job continues its log"


def main() -> None:
    """Write the script of every recipe."""
    for recipe in loader.names():
        file = REPOSITORY / "slurm" / f"{recipe}.sh"
        file.write_text(sbatch_script(recipe), encoding="utf-8")
        file.chmod(0o755)


if __name__ == "__main__":
    main()
