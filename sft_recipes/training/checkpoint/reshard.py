"""Load a checkpoint on other ranks than those that saved it: reshard ZeRO state, add random states for new ranks.

Measured by tests/strategies/test_world_sizes.py: to the same number of ranks the conversion loses no bit; to another
number the run continues as it would have, except for the order in which gradients are summed.
"""

from __future__ import annotations

import contextlib
import hashlib
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

_DONE = "resharded.json"
_STATE = ("fp32", "exp_avg", "exp_avg_sq")  # DeepSpeed's names for what a universal checkpoint has of each weight
_MODULUS = 2**62  # sums of integers of 64 bits wrap
# The converter writes every number twice: cut into pieces, then put together.
_TIMES_THE_CHECKPOINT = 2
# Slower than a network disk that anybody would train on; the other ranks wait no longer than this takes.
_BYTES_PER_SECOND_AT_LEAST = 20e6


def taken_over(plan: Plan, folder: RunDir, point: ResumePoint, trainer: Any) -> Path:
    """The folder that this start loads: the checkpoint itself, or one beside it that was cut for these ranks. All ranks
    take part; the checkpoint has been verified, and is never changed.

    Raises:
        SetupError: these ranks cannot go on from it, or the disk has no room.
    """
    saved = Ranks(point.record["parallelism"], point.record["world_size"])
    now = rank_change.ranks_of(plan)
    refused = rank_change.refusal(saved, plan)
    if refused is not None:
        raise SetupError(f"{point.path}: {refused}")
    if saved.world_size == now.world_size:
        return point.path
    trainer.say(f"{point.path.name} was saved by {saved}, this start is {now}: its state is taken over")
    converted = None
    if rank_change.converts(saved, now):
        converted = _convert(point, folder.saving / f"resharded-{point.step}", trainer.accelerator)
        # Read when DeepSpeed's engine is built: https://www.deepspeed.ai/docs/config-json (checkpoint options).
        trainer.accelerator.state.deepspeed_plugin.deepspeed_config["checkpoint"] = {"load_universal": True}
    trainer.add_callbacks([TakeOver(point, converted)])
    return converted or point.path


class TakeOver(TrainerCallback):
    """Once everything has been loaded and before the first step: random numbers, and what DeepSpeed leaves wrong."""

    def __init__(self, point: ResumePoint, converted: Path | None):
        self.point = point
        self.converted = converted
        self.trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A rank whose random numbers the checkpoint has goes on with them, the Trainer loads them later; another one
        begins a stream of its own, the same each time that this is done. They decide where dropout falls alone."""
        words = f"{args.seed} {self.point.step} {args.process_index}"
        set_seed(int.from_bytes(hashlib.sha256(words.encode()).digest()[:4], "big"))
        if self.converted is not None:
            optimizer = self.trainer.model_wrapped.optimizer.optimizer  # torch's, which DeepSpeed's wraps
            mend(optimizer, read_json(self.converted / _DONE)["groups"])
            check(optimizer, self.converted / f"global_step{self.point.step}", self.trainer.accelerator)
            self.trainer.accelerator.wait_for_everyone()
            if state.is_world_process_zero:
                shutil.rmtree(self.converted)


def mend(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    """Puts right what DeepSpeed's loading of a universal checkpoint leaves wrong in the optimizer that it wraps.

    Under ZeRO-3 it gives every group the settings of the first, weight decay where there was none, and all weights one
    and the same step counter, which then counts once for each of them (deepspeed 0.19.8, runtime/zero/stage3.py,
    load_hp_checkpoint_state_from_checkpoint_dir_stage3). And it leaves counters on the CPU, where torch's fused
    optimizers want them beside the weights (torch/optim/optimizer.py, _process_value_according_to_param_policy).

    Args:
        groups: the settings of each group when it was saved.
    """
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update(saved)
    beside = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    for weight, state in optimizer.state.items():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone().to(weight.device if beside else "cpu")


def check(optimizer: torch.optim.Optimizer, universal: Path, accelerator: Any) -> None:
    """Counts every bit of weights and moments over all ranks, in the files and in the optimizer that loaded them.

    The sums do not depend on how the state is cut up: padding is zero and adds nothing.

    Raises:
        RuntimeError: the ranks do not hold what was saved.
    """
    rank, ranks = accelerator.process_index, accelerator.num_processes
    trained = sorted(file.parent for file in (universal / "zero").rglob("exp_avg.pt"))
    files = [folder / f"{name}.pt" for folder in trained[rank::ranks] for name in _STATE]
    saved = sum(_bits(torch.load(file, weights_only=True)) for file in files)
    held = sum(
        _bits(weight) + sum(_bits(state[name]) for name in _STATE[1:]) for weight, state in optimizer.state.items()
    )
    both = torch.tensor([saved % _MODULUS, held % _MODULUS], dtype=torch.int64, device=accelerator.device)
    saved, held = (one % _MODULUS for one in accelerator.reduce(both, "sum").tolist())
    if saved != held:
        raise RuntimeError(f"{universal}: the ranks do not hold the state that was saved; nothing was trained")


def _convert(point: ResumePoint, target: Path, accelerator: Any) -> Path:
    """A universal checkpoint of DeepSpeed's, with all else that the Trainer reads; made by rank 0, awaited by the
    others without a collective, whose time limit a large model would outlast."""
    from accelerate.utils import broadcast_object_list

    source = point.path / f"global_step{point.step}"
    needed = _TIMES_THE_CHECKPOINT * sum(file.stat().st_size for file in source.iterdir())
    free = [shutil.disk_usage(point.path).free]
    broadcast_object_list(free)
    if free[0] < needed:
        raise SetupError(
            f"{point.path}: cutting it for {accelerator.num_processes} ranks takes {needed / GIB:.1f} GiB beside it, "
            f"{free[0] / GIB:.1f} are free; make room, or go on with {point.record['world_size']} ranks"
        )
    if accelerator.is_main_process:
        shutil.rmtree(target, ignore_errors=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _write(source, target)
    else:
        _await(target / _DONE, 600 + needed / _BYTES_PER_SECOND_AT_LEAST)
    accelerator.wait_for_everyone()
    return target


def _write(source: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    target.mkdir(parents=True)
    for path in source.parent.iterdir():
        if path != source and path.name != "latest":
            (target / path.name).symlink_to(path.absolute())
    # One worker: several are processes of their own, which would outlive a rank that is killed. The state that the
    # converter misses, and is told to do without, is what it needs for tensor parallelism.
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
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        ds_to_universal.main(settings)
    write_json(target / _DONE, {"groups": _groups(target / source.name)})


def _groups(universal: Path) -> list[dict[str, Any]]:
    """The settings of each of the optimizer's groups, as they were saved."""
    state = torch.load(universal / "zero" / "optimizer_state.pt", weights_only=False, mmap=True)
    return [{key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]]


def _await(file: Path, seconds: float) -> None:
    """Waits until rank 0 has written a file.

    Raises:
        TimeoutError: it has not.
    """
    until = time.monotonic() + seconds
    while not file.is_file():
        if time.monotonic() > until:
            raise TimeoutError(f"{file.parent} was not there after {seconds:.0f} seconds")
        time.sleep(0.2)


def _bits(content: Any) -> int:
    """The sum of a tensor's numbers, each read as an integer; a universal checkpoint's may lie in a dictionary."""
    tensor = content["param"] if isinstance(content, dict) else content
    return int(tensor.detach().contiguous().view(torch.int32).sum(dtype=torch.int64))
