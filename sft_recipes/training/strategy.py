"""Looks at the engine and the dtypes that a run really got, and stops it where they are not its plan's."""

from __future__ import annotations

from typing import Any

import torch

from sft_recipes.config import strategies
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import SetupError

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def shard_on_the_cpu(plan: Plan) -> None:
    """Has accelerate use FSDP2 over gloo too, for a plan without GPUs.

    Accelerate looks at FSDP's settings only where the processes are MULTI_GPU and makes DDP of MULTI_CPU, in silence
    (accelerate/state.py, AcceleratorState). torch's fully_shard itself works over gloo. Called once the process group
    is there and before the trainer is built.
    """
    from accelerate import DistributedType, PartialState

    if plan.strategy.fsdp and not plan.uses_gpu:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def reduce_in_fp32(accelerator: Any, plan: Plan) -> None:
    """Has FSDP2 compute in bf16 and sum gradients in fp32; accelerate's own policy sums them in bf16 too."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plan.precision == "bf16":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def check(plan: Plan, trainer: Any) -> dict[str, str]:
    """The dtypes that the prepared model, optimizer and engine have, if they and the engine are the plan's.

    Raises:
        SetupError: another engine, or another dtype.
    """
    found = name(trainer)
    if found != plan.parallelism:
        raise SetupError(
            f"the run got the engine {found} where the plan has parallelism {plan.parallelism}; nothing was trained"
        )
    got = dtypes(trainer)
    wrong = [f"{kind} in {got[kind]}, planned {wanted}" for kind, wanted in plan.dtypes.items() if got[kind] != wanted]
    if wrong:
        raise SetupError(f"the run got other dtypes than its plan: {'; '.join(wrong)}; nothing was trained")
    return got


def check_gradients(plan: Plan, trainer: Any) -> None:
    """Looks at the gradients themselves, beside their weights; DeepSpeed keeps its own, looked at above.

    Raises:
        SetupError: there are none, or they are in another dtype.
    """
    if trainer.is_deepspeed_enabled:
        return
    found = _one({weight.grad.dtype for weight in trainer.model.parameters() if weight.grad is not None})
    if found != plan.dtypes["gradients"]:
        raise SetupError(
            f"the run got gradients in {found or 'no dtype'}, planned {plan.dtypes['gradients']}; nothing was trained"
        )


def name(trainer: Any) -> str:
    """The engine that carries a trainer whose model is prepared, by its name in a plan."""
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    if trainer.is_deepspeed_enabled:
        engine = trainer.model_wrapped
        stage, offload = int(engine.zero_optimization_stage()), bool(engine.zero_cpu_offload())
        return strategies.running(zero_stage=stage, cpu_offload=offload).name
    model = trainer.model_wrapped
    return strategies.running(fsdp=isinstance(model, FSDPModule), ddp=isinstance(model, DistributedDataParallel)).name


def dtypes(trainer: Any) -> dict[str, str]:
    """What each kind of number is held in, by the names of `planner.memory.dtypes`."""
    parameters = list(trainer.model.named_parameters())
    trained = _one({parameter.dtype for _, parameter in parameters if parameter.requires_grad})
    frozen = [parameter for name, parameter in parameters if not parameter.requires_grad and name.endswith("weight")]
    quantized = any(type(parameter).__name__ == "Params4bit" for parameter in frozen)
    found = {"weights": trained, "frozen": "nf4" if quantized else _one({parameter.dtype for parameter in frozen})}
    if trainer.is_deepspeed_enabled:
        return {**found, **_deepspeed(trainer.model_wrapped), "compute": trained}
    policy = getattr(getattr(trainer.accelerator.state, "fsdp_plugin", None), "mixed_precision_policy", None)
    reduction = getattr(policy, "reduce_dtype", None)
    autocast = "bf16 autocast" if trainer.accelerator.mixed_precision == "bf16" else trained
    compute = _NAMES[policy.param_dtype] if policy is not None and policy.param_dtype else autocast
    # Autograd's gradients have their weight's dtype, and DDP sums them as they are.
    summed = _NAMES[reduction] if reduction else trained
    return {**found, "master": trained, "gradients": trained, "reduction": summed, "compute": compute}


def _deepspeed(engine: Any) -> dict[str, str]:
    """Of DeepSpeed's optimizer."""
    optimizer = engine.optimizer
    gradients = getattr(optimizer, "gradient_accumulation_dtype", None) or optimizer.grad_acc_dtype
    return {
        "master": _one({master.dtype for master in masters(optimizer)}),
        "gradients": _NAMES[gradients],
        "reduction": _NAMES[engine.communication_data_type],
    }


def masters(optimizer: Any) -> list[torch.Tensor]:
    """This rank's partitions of DeepSpeed's master copy; which attribute holds them depends on the stage."""
    found: list[torch.Tensor] = next(
        partitions
        for attribute in (
            "fp32_groups_flat_partition",
            "single_partition_of_fp32_groups",
            "fp32_partitioned_groups_flat",
        )
        if (partitions := getattr(optimizer, attribute, None))
    )
    return found


def count_up_again(trainer: Any) -> None:
    """Brings DeepSpeed's Adam on the CPU to where it stood when the loaded checkpoint was saved.

    Its bias correction is a power that it multiplies up step by step, in a number of its own that no checkpoint
    holds (csrc/includes/cpu_adam.h, `IncrementStep`). Behind a resume it would take the power at once, which rounds
    otherwise, and weights would differ in their last bits. Here it counts its steps again, on weights that are thrown
    away: 100,000 in two seconds.
    """
    adam = trainer.model_wrapped.optimizer.optimizer if trainer.is_deepspeed_enabled else None
    if not hasattr(adam, "ds_opt_adam"):
        return
    taken = max((int(state["step"]) for state in adam.state.values()), default=0)
    group, nothing = adam.param_groups[0], [torch.zeros(1) for _ in range(4)]
    for step in range(1, taken + 1):
        adam.ds_opt_adam.adam_update(adam.opt_id, step, 0.0, *group["betas"], group["eps"], 0.0, True, *nothing)


def _one(found: set[torch.dtype]) -> str:
    return " and ".join(sorted(_NAMES.get(dtype, str(dtype)) for dtype in found))
