"""Resume on another number of ranks: reshard ZeRO state, and give new ranks random states.

Measured by tests/strategies/test_world_sizes.py: resharding to the same number of ranks loses no bit; on another number
the run continues as before, except for the order in which gradients are summed.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from sft_recipes.planner import rank_change
from sft_recipes.planner.plan import Plan
from sft_recipes.planner.rank_change import Ranks
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import RunDir, read_json, write_json
from sft_recipes.runtime.units import GIB
from sft_recipes.training.checkpoint.resume import ResumePoint

log = logging.getLogger(__name__)

_DONE = "resharded.json"
_STATE = ("fp32", "exp_avg", "exp_avg_sq")  # DeepSpeed's names for a weight's state in a universal checkpoint
_MODULUS = 2**62  # sums of int64 wrap
# The converter writes all state twice: split into fragments, then merged.
_DISK_FACTOR = 2
_MIN_BYTES_PER_SECOND = 20e6  # slower than any network disk used for training; bounds the wait of the other ranks


def prepare_checkpoint(plan: Plan, folder: RunDir, point: ResumePoint, trainer: Any) -> Path:
    """Return the directory to load: the checkpoint, or a copy resharded for these ranks.

    Collective: call on every rank. The checkpoint was verified and is not changed.

    Raises:
        SetupError: these ranks cannot resume from it, or the disk is too small.
    """
    saved = Ranks(point.record["parallelism"], point.record["world_size"])
    current = rank_change.ranks_of(plan)
    refusal = rank_change.incompatibility(saved, plan)
    if refusal is not None:
        raise SetupError(f"{point.path}: {refusal}")
    if saved.world_size == current.world_size:
        return point.path
    log.info("resharding %s from %s to %s", point.path.name, saved, current)
    resharded = None
    if rank_change.needs_resharding(saved, current):
        resharded = _reshard(point, folder.saving / f"resharded-{point.step}", trainer.accelerator)
        # Read when DeepSpeed's engine is built: https://www.deepspeed.ai/docs/config-json (checkpoint options).
        trainer.accelerator.state.deepspeed_plugin.deepspeed_config["checkpoint"] = {"load_universal": True}
    trainer.add_callbacks([ReshardCallback(point, resharded)])
    return resharded or point.path


class ReshardCallback(TrainerCallback):
    """Seed random states of new ranks, and fix and verify loaded ZeRO state, before the first step."""

    def __init__(self, point: ResumePoint, resharded: Path | None):
        self.point = point
        self.resharded = resharded
        self.trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seed this rank reproducibly; if the checkpoint has its random state, the Trainer loads that later.

        Random states only affect dropout.
        """
        seed = f"{args.seed} {self.point.step} {args.process_index}"
        set_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big"))
        if self.resharded is not None:
            optimizer = self.trainer.model_wrapped.optimizer.optimizer  # torch's, inside of DeepSpeed's
            fix_loaded_state(optimizer, read_json(self.resharded / _DONE)["groups"])
            verify_loaded_state(optimizer, self.resharded / f"global_step{self.point.step}", self.trainer.accelerator)
            self.trainer.accelerator.wait_for_everyone()
            if state.is_world_process_zero:
                shutil.rmtree(self.resharded)


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
        group.update(saved)
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    for weight, state in optimizer.state.items():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone().to(weight.device if on_device else "cpu")


def verify_loaded_state(optimizer: torch.optim.Optimizer, universal: Path, accelerator: Any) -> None:
    """Compare sums of all bits of weights and moments over all ranks: in the files, and in the optimizer.

    The sums do not depend on the sharding: padding is zero and adds nothing.

    Raises:
        RuntimeError: the ranks do not hold what was saved.
    """
    rank, ranks = accelerator.process_index, accelerator.num_processes
    weights = sorted(file.parent for file in (universal / "zero").rglob("exp_avg.pt"))
    files = [weight / f"{name}.pt" for weight in weights[rank::ranks] for name in _STATE]
    saved = sum(_sum_bits(torch.load(file, weights_only=True)) for file in files)
    loaded = sum(
        _sum_bits(weight) + sum(_sum_bits(state[name]) for name in _STATE[1:])
        for weight, state in optimizer.state.items()
    )
    sums = torch.tensor([saved % _MODULUS, loaded % _MODULUS], dtype=torch.int64, device=accelerator.device)
    saved, loaded = (total % _MODULUS for total in accelerator.reduce(sums, "sum").tolist())
    if saved != loaded:
        raise RuntimeError(
            f"{universal}: resharding failed: the loaded state is not the saved one; nothing was trained"
        )


def _reshard(point: ResumePoint, target: Path, accelerator: Any) -> Path:
    """Write a DeepSpeed universal checkpoint with all other files that the Trainer reads.

    Rank 0 writes it. The others wait without a collective, whose timeout a large model would exceed.
    """
    from accelerate.utils import broadcast_object_list

    source = point.path / f"global_step{point.step}"
    required = _DISK_FACTOR * sum(file.stat().st_size for file in source.iterdir())
    free = [shutil.disk_usage(point.path).free]
    broadcast_object_list(free)
    if free[0] < required:
        raise SetupError(
            f"{point.path}: not enough disk space to reshard it for {accelerator.num_processes} ranks: found "
            f"{free[0] / GIB:.1f} GiB, expected {required / GIB:.1f} GiB. Free space, or use "
            f"{point.record['world_size']} ranks"
        )
    if accelerator.is_main_process:
        shutil.rmtree(target, ignore_errors=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _write(source, target)
    else:
        _wait_for(target / _DONE, 600 + required / _MIN_BYTES_PER_SECOND)
    accelerator.wait_for_everyone()
    return target


def _write(source: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    target.mkdir(parents=True)
    for path in source.parent.iterdir():
        if path != source and path.name != "latest":
            (target / path.name).symlink_to(path.absolute())
    # One worker: more are separate processes, which would outlive a killed rank. The missing state that is injected
    # is only needed for tensor parallelism.
    settings = Namespace(
        input_folder=str(source),
        output_folder=str(target / source.name),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with (
        Path(os.devnull).open("w") as null,
        contextlib.redirect_stdout(null),
        contextlib.redirect_stderr(null),
    ):
        ds_to_universal.main(settings)
    write_json(target / _DONE, {"groups": _read_groups(target / source.name)})


def _read_groups(universal: Path) -> list[dict[str, Any]]:
    """Return the saved settings of each parameter group."""
    state = torch.load(universal / "zero" / "optimizer_state.pt", weights_only=False, mmap=True)
    return [{key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]]


def _wait_for(file: Path, seconds: float) -> None:
    """Wait until rank 0 has written a file.

    Raises:
        TimeoutError: it has not.
    """
    deadline = time.monotonic() + seconds
    while not file.is_file():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{file.parent} was not written within {seconds:.0f} s")
        time.sleep(0.2)


def _sum_bits(content: Any) -> int:
    """Sum a tensor's elements as integers; a universal checkpoint may hold the tensor in a dict."""
    tensor = content["param"] if isinstance(content, dict) else content
    return int(tensor.detach().contiguous().view(torch.int32).sum(dtype=torch.int64))
