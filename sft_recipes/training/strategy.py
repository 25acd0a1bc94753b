"""Checks that the prepared model has the plan's parallelism strategy and dtypes."""

from __future__ import annotations

from typing import Any

import torch

from sft_recipes.config import strategies
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import SetupError

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def check(plan: Plan, trainer: Any) -> dict[str, str]:
    """Check the strategy and return the dtypes of the prepared model and optimizer.

    Raises:
        SetupError: another strategy or another dtype than in the plan.
    """
    strategy = find_strategy(trainer)
    if strategy != plan.parallelism:
        raise SetupError(
            f"parallelism: found {strategy}, expected {plan.parallelism} as in the plan. No step was taken"
        )
    dtypes = find_dtypes(trainer)
    wrong = [
        f"{kind} found {dtypes[kind]}, expected {planned}"
        for kind, planned in plan.dtypes.items()
        if dtypes[kind] != planned
    ]
    if wrong:
        raise SetupError(f"dtypes: {'; '.join(wrong)} as in the plan. No step was taken")
    return dtypes


def check_gradients(plan: Plan, trainer: Any) -> None:
    """Check the dtype of the gradients; `check` covers DeepSpeed's, which are separate tensors.

    Raises:
        SetupError: no parameter has a gradient, or its dtype is not the plan's.
    """
    if trainer.is_deepspeed_enabled:
        return
    dtype = _join({weight.grad.dtype for weight in trainer.model.parameters() if weight.grad is not None})
    planned = plan.dtypes["gradients"]
    if dtype != planned:
        raise SetupError(
            f"gradients: found dtype {dtype or 'none'}, expected {planned} as in the plan. No step was taken"
        )


def find_strategy(trainer: Any) -> str:
    """Return the strategy of a trainer whose model is prepared, by its name in a plan."""
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    if trainer.is_deepspeed_enabled:
        engine = trainer.model_wrapped
        stage, offload = int(engine.zero_optimization_stage()), bool(engine.zero_cpu_offload())
        return strategies.running(zero_stage=stage, cpu_offload=offload).name
    model = trainer.model_wrapped
    return strategies.running(fsdp=isinstance(model, FSDPModule), ddp=isinstance(model, DistributedDataParallel)).name


def find_dtypes(trainer: Any) -> dict[str, str]:
    """Return the dtype of weights, gradients, master weights, …, by the names of `planner.memory.dtypes`."""
    parameters = list(trainer.model.named_parameters())
    trained = _join({parameter.dtype for _, parameter in parameters if parameter.requires_grad})
    frozen = [parameter for name, parameter in parameters if not parameter.requires_grad and name.endswith("weight")]
    quantized = any(type(parameter).__name__ == "Params4bit" for parameter in frozen)
    dtypes = {"weights": trained, "frozen": "nf4" if quantized else _join({parameter.dtype for parameter in frozen})}
    if trainer.is_deepspeed_enabled:
        return {**dtypes, **_deepspeed(trainer.model_wrapped), "compute": trained}
    policy = getattr(getattr(trainer.accelerator.state, "fsdp_plugin", None), "mixed_precision_policy", None)
    reduction = getattr(policy, "reduce_dtype", None)
    autocast = "bf16 autocast" if trainer.accelerator.mixed_precision == "bf16" else trained
    compute = _NAMES[policy.param_dtype] if policy is not None and policy.param_dtype else autocast
    # Autograd's gradients have their weight's dtype, and DDP reduces them in it.
    reduced = _NAMES[reduction] if reduction else trained
    return {**dtypes, "master": trained, "gradients": trained, "reduction": reduced, "compute": compute}


def _deepspeed(engine: Any) -> dict[str, str]:
    """Return the dtypes of DeepSpeed's optimizer."""
    optimizer = engine.optimizer
    gradients = getattr(optimizer, "gradient_accumulation_dtype", None) or optimizer.grad_acc_dtype
    return {
        "master": _join({master.dtype for master in masters(optimizer)}),
        "gradients": _NAMES[gradients],
        "reduction": _NAMES[engine.communication_data_type],
    }


def masters(optimizer: Any) -> list[torch.Tensor]:
    """Return this rank's partitions of DeepSpeed's fp32 master weights; the attribute depends on the ZeRO stage."""
    partitions_of_rank: list[torch.Tensor] = next(
        partitions
        for attribute in (
            "fp32_groups_flat_partition",
            "single_partition_of_fp32_groups",
            "fp32_partitioned_groups_flat",
        )
        if (partitions := getattr(optimizer, attribute, None))
    )
    return partitions_of_rank


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


def _join(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(_NAMES.get(dtype, str(dtype)) for dtype in dtypes))
