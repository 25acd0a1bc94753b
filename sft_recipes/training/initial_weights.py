"""Starts a run from the last weights of another one (INIT_FROM): adapters, and fp32 master weights under ZeRO.

Otherwise the run's base model is the other run's `last/` (data/prepare.py).
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sft_recipes.runtime.errors import SetupError
from sft_recipes.training.callbacks import RunCallback
from sft_recipes.training.checkpoint import checkpoint_format, resume
from sft_recipes.training.checkpoint.checkpoint_format import CorruptCheckpointError


def verify(folder: Path, process: Any) -> None:
    """Verify checksums and dtype of the weights. Collective: call on every rank.

    Args:
        process: accelerate's state, with this rank and the number of ranks.

    Raises:
        SetupError: they are not what was saved, on all ranks.
    """
    try:
        problem = resume.verify_on_all_ranks(folder, checkpoint_format.read_commit_marker(folder), process)
    except CorruptCheckpointError as error:
        problem = str(error)
    for file in [] if problem else sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            if "BF16" in {weights.get_slice(name).get_dtype() for name in weights.keys()}:  # noqa: SIM118  no mapping
                problem = f"found bf16 in {file.name}, expected fp32 (zero1, or its last checkpoint was not saved)"
    if problem:
        raise SetupError(f"INIT_FROM: {folder}: {problem}. Restore it, or start from another run")


class MasterWeightsCallback(RunCallback):
    """Sets DeepSpeed's fp32 master weights before the first step: it makes them from the loaded 16-bit weights."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the master weights of this rank; a resumed run has loaded its own.

        Raises:
            SetupError: the files lack a trained weight.
        """
        if state.global_step:
            return
        folder = self.trainer.plan.parent.last
        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(file, "pt")) for file in sorted(folder.glob("*.safetensors"))]
            file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118  no mapping
            for name, parameter in self.trainer.model.named_parameters():
                saved = name.replace(".default.", ".")  # peft saves no name of the adapter
                if parameter.requires_grad and saved not in file_of:
                    raise SetupError(f"INIT_FROM: {folder} lacks fp32 {name}. Set parallelism=ddp or fsdp2")
                if parameter.requires_grad:
                    _set_master(parameter, file_of[saved].get_tensor(saved), args.process_index, args.world_size)


def _set_master(parameter: Any, value: torch.Tensor, rank: int, ranks: int) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if not hasattr(parameter, "ds_id"):
        safe_set_full_fp32_param(parameter, value.float())
        return
    size = parameter.ds_tensor.numel()  # of a rank's partition under ZeRO-3; the last one is padded
    padded = torch.nn.functional.pad(value.float().flatten(), (0, size * ranks - value.numel()))
    safe_set_local_fp32_param(parameter, padded[rank * size : (rank + 1) * size])
