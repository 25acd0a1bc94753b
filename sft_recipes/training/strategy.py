"""Checks before the first step that strategy, dtypes and packing isolation are as planned."""

from collections.abc import Iterable
from typing import Any

import torch

from sft_recipes.config import strategies
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import SetupError
from sft_recipes.training import manifest, packing_isolation
from sft_recipes.training.callbacks import RunCallback

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class StrategyCheckCallback(RunCallback):
    """Checks the prepared model."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check the model on every rank, since each rank prepares its own."""
        trainer = self.trainer
        dtypes = check(trainer.plan, trainer)
        restore_cpu_adam_steps(trainer)
        if state.is_world_process_zero:
            manifest.update(trainer.folder, dtypes=dtypes)
        if trainer.plan.packing or getattr(trainer.data_collator, "padding_free", False):  # rows are concatenated
            packing_isolation.check(trainer.plan, trainer)


def check(plan: Plan, trainer: Any) -> dict[str, str]:
    """Check the strategy and return the dtypes of the prepared model and optimizer.

    Raises:
        SetupError: another strategy or another dtype than in the plan.
    """
    strategy = find_strategy(trainer)
    if strategy != plan.parallelism:
        raise SetupError(f"parallelism: found {strategy}, expected {plan.parallelism} as in the plan")
    dtypes = find_dtypes(trainer)
    if any(dtypes[kind] != planned for kind, planned in plan.dtypes.items()):
        raise SetupError(f"dtypes: found {dtypes}, expected {plan.dtypes} as in the plan")
    return dtypes


def find_strategy(trainer: Any) -> str:
    """Return the strategy of a trainer whose model is prepared, by its name in a plan."""
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    model = trainer.model_wrapped
    if trainer.is_deepspeed_enabled:
        stage, offload = int(model.zero_optimization_stage()), bool(model.zero_cpu_offload())
        return strategies.running(zero_stage=stage, cpu_offload=offload).name
    return strategies.running(fsdp=isinstance(model, FSDPModule), ddp=isinstance(model, DistributedDataParallel)).name


def find_dtypes(trainer: Any) -> dict[str, str]:
    """Return the dtype of weights, gradients, master weights, …, by the names of `planner.memory.dtypes`."""
    parameters = list(trainer.model.named_parameters())
    trained = _join(parameter for _, parameter in parameters if parameter.requires_grad)
    frozen = [parameter for name, parameter in parameters if not parameter.requires_grad and name.endswith("weight")]
    quantized = any(type(parameter).__name__ == "Params4bit" for parameter in frozen)
    dtypes = {"weights": trained, "frozen": "nf4" if quantized else _join(frozen)}
    if trainer.is_deepspeed_enabled:
        engine, optimizer = trainer.model_wrapped, trainer.model_wrapped.optimizer
        gradients = getattr(optimizer, "gradient_accumulation_dtype", None) or optimizer.grad_acc_dtype
        reduced = _NAMES[engine.communication_data_type]
        master = {"master": _join(masters(optimizer)), "gradients": _NAMES[gradients], "reduction": reduced}
        return {**dtypes, **master, "compute": trained}
    policy = getattr(getattr(trainer.accelerator.state, "fsdp_plugin", None), "mixed_precision_policy", None)
    autocast = "bf16 autocast" if trainer.accelerator.mixed_precision == "bf16" else trained
    # Autograd's gradients have their weight's dtype, and DDP reduces them in it.
    reduced = _NAMES.get(getattr(policy, "reduce_dtype", None), trained)
    compute = _NAMES.get(getattr(policy, "param_dtype", None), autocast)
    return {**dtypes, "master": trained, "gradients": trained, "reduction": reduced, "compute": compute}


def masters(optimizer: Any) -> list[torch.Tensor]:
    """Return this rank's partitions of DeepSpeed's fp32 master weights; the attribute depends on the ZeRO stage."""
    names = ("fp32_groups_flat_partition", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
    partitions: list[torch.Tensor] = next(found for name in names if (found := getattr(optimizer, name, None)))
    return partitions


def restore_cpu_adam_steps(trainer: Any) -> None:
    """Repeat the steps of DeepSpeed's CPU Adam up to the loaded checkpoint, on dummy tensors.

    Its bias correction is a power that it multiplies up step by step, in a variable that no checkpoint saves
    (csrc/includes/cpu_adam.h, `IncrementStep`). After a resume it would compute the power at once, which rounds
    differently, and weights would differ in their last bits. 100,000 steps take two seconds.
    """
    adam = trainer.model_wrapped.optimizer.optimizer if trainer.is_deepspeed_enabled else None
    if not hasattr(adam, "ds_opt_adam"):
        return
    steps = max((int(state["step"]) for state in adam.state.values()), default=0)
    group, dummies = adam.param_groups[0], [torch.zeros(1) for _ in range(4)]
    for step in range(1, steps + 1):
        adam.ds_opt_adam.adam_update(adam.opt_id, step, 0.0, *group["betas"], group["eps"], 0.0, True, *dummies)


def _join(tensors: Iterable[torch.Tensor]) -> str:
    """Return the dtypes of tensors."""
    return " and ".join(sorted({_NAMES.get(tensor.dtype, str(tensor.dtype)) for tensor in tensors}))
