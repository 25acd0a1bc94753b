"""Resume on another number of ranks: reshard ZeRO state through DeepSpeed's universal checkpoint.

Measured by tests/strategies/test_world_sizes.py: resharding to the same number of ranks loses no bit; on another number
the run continues as before, except for the order in which gradients are summed. Other strategies load their state on
any number of ranks. Ranks whose random state was not saved, and all after resharding, begin with the run's seed, which
only affects dropout.
"""

import contextlib
import io
import logging
import shutil
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from sft_recipes.planner import rank_change
from sft_recipes.planner.plan import Plan
from sft_recipes.planner.rank_change import Ranks
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.training.callbacks import RunCallback
from sft_recipes.training.checkpoint.resume import ResumePoint

log = logging.getLogger(__name__)

_DONE = "resharded"


def prepare_checkpoint(plan: Plan, folder: RunDir, point: ResumePoint, trainer: Any) -> Path:
    """Return the directory to load: the checkpoint, or a copy resharded for these ranks.

    Collective: call on every rank. The checkpoint was verified and is not changed.

    Raises:
        SetupError: these ranks cannot resume from it.
    """
    saved = Ranks(point.record["parallelism"], point.record["world_size"])
    current = rank_change.ranks_of(plan)
    refusal = rank_change.incompatibility(saved, plan)
    if refusal is not None:
        raise SetupError(f"{point.path}: {refusal}")
    if not rank_change.needs_resharding(saved, current):
        return point.path
    log.info("resharding %s from %s to %s", point.path.name, saved, current)
    target = folder.saving / f"resharded-{point.step}"
    if trainer.accelerator.is_main_process:
        _reshard(point, target)
    while not (target / _DONE).is_file():  # no collective: a large model takes longer than its timeout
        time.sleep(0.2)
    trainer.accelerator.wait_for_everyone()
    # Read when DeepSpeed's engine is built: https://www.deepspeed.ai/docs/config-json (checkpoint options).
    trainer.accelerator.state.deepspeed_plugin.deepspeed_config["checkpoint"] = {"load_universal": True}
    trainer.add_callbacks([ReshardCallback(target, point.step)])
    return target


class ReshardCallback(RunCallback):
    """Fix the loaded ZeRO state before the first step, and remove the resharded checkpoint."""

    def __init__(self, resharded: Path, step: int):
        self.resharded = resharded
        self.optimizer_state = resharded / f"global_step{step}" / "zero" / "optimizer_state.pt"

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Fix the state, which the Trainer has just loaded."""
        groups = torch.load(self.optimizer_state, weights_only=False, mmap=True)["param_groups"]
        fix_loaded_state(self.trainer.model_wrapped.optimizer.optimizer, groups)  # torch's, inside of DeepSpeed's
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            shutil.rmtree(self.resharded.parent)


def fix_loaded_state(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    """Fix what DeepSpeed gets wrong when it loads a universal checkpoint.

    ZeRO-3 gives every parameter group the settings of the first (weight decay where there was none), and all weights
    one shared step counter, which then counts once for each of them (deepspeed 0.19.8, runtime/zero/stage3.py,
    load_hp_checkpoint_state_from_checkpoint_dir_stage3). Counters stay on the CPU, where torch's fused optimizers need
    them on the device (torch/optim/optimizer.py, _process_value_according_to_param_policy).

    Args:
        groups: the saved settings of each parameter group.
    """
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    for weight, state in optimizer.state.items():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone().to(weight.device if on_device else "cpu")


def _reshard(point: ResumePoint, target: Path) -> None:
    """Write a DeepSpeed universal checkpoint with links to all other files that the Trainer reads."""
    from deepspeed.checkpoint import ds_to_universal

    source = point.path / f"global_step{point.step}"
    target.mkdir(parents=True)
    for path in point.path.iterdir():
        if path != source and path.name != "latest":
            (target / path.name).symlink_to(path.absolute())
    # One worker: more are separate processes, which would outlive a killed rank. The missing state that is injected
    # is only needed for tensor parallelism.
    settings: dict[str, Any] = {"num_extract_workers": 1, "num_merge_workers": 1, "inject_missing_state": True}
    settings |= {"input_folder": str(source), "output_folder": str(target / source.name)}
    settings |= {"keep_temp_folder": False, "strict": True}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(Namespace(**settings))
    (target / _DONE).touch()
