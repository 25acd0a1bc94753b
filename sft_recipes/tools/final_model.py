"""Find the model of a finished run: `final/`, or for adapters the merged model."""

from __future__ import annotations

from pathlib import Path

from sft_recipes.planner import plan as plans
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import RunDir


def find(folder: RunDir, merged: bool = False) -> Path:
    """Return the folder of a finished run's model.

    Args:
        merged: the merged model of a run that trained adapters.

    Raises:
        SetupError: the run is not finished, has no adapters to merge, has not merged them, or their base is gone.
    """
    plan, state = plans.read(folder.plan), folder.state()
    name = "config.json" if plan.method == "full" else "adapter_config.json"
    if state != "finished" or not (folder.final / name).is_file():
        fix = f"Run `make train NAME={folder.name}` with its recipe to resume it"
        raise SetupError(f"RUN: {folder.path} is {state}, expected a finished run with a model in final/. {fix}")
    if not merged:
        return folder.final
    if plan.method == "full":
        raise SetupError(f"MERGED: {folder.name} has no adapters: full fine-tuning. Remove MERGED")
    if not (folder.merged / "config.json").is_file():
        from sft_recipes.training import lora

        lora.find_base_folder(plan, folder)
        raise SetupError(f"RUN: {folder.name} has adapters: found no merged/. Run `make merge RUN={folder.name}` first")
    return folder.merged
