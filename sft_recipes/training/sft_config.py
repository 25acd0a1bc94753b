"""Translates a plan into TRL's SFTConfig."""

from __future__ import annotations

import importlib.util
from typing import Any

from trl import SFTConfig

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import RunDir


def make_sft_config(plan: Plan, folder: RunDir) -> SFTConfig:
    """Return the plan as TRL's SFTConfig; every value that a recipe may not set is set here.

    Raises:
        SetupError: the recipe needs kernels that are not installed.
    """
    trainer = dict(plan.sections.trainer)
    if trainer.get("use_liger_kernel") and importlib.util.find_spec("liger_kernel") is None:
        raise SetupError(
            "trainer.use_liger_kernel: liger-kernel is not installed. Install it into the virtual environment, or "
            "remove the key: TRL's kernel also computes logits at supervised positions only"
        )
    for planned in ("max_length", "packing", "gradient_checkpointing"):
        trainer.pop(planned)
    return SFTConfig(
        **{
            "optim": "adamw_torch_fused",
            "logging_first_step": True,
            "ddp_find_unused_parameters": False,
            "project": "sft-recipes",
            "disable_tqdm": True,
            "log_level": "error",
            "log_level_replica": "error",
            "dataloader_pin_memory": plan.uses_gpu,
            **trainer,
        },
        output_dir=str(folder.path),
        run_name=folder.name,
        per_device_train_batch_size=plan.per_device_train_batch_size,
        per_device_eval_batch_size=plan.per_device_train_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        learning_rate=plan.learning_rate,
        lr_scheduler_type=plan.lr_scheduler_type,
        num_train_epochs=plan.num_train_epochs,
        warmup_steps=plan.warmup_steps,
        weight_decay=plan.weight_decay,
        max_grad_norm=plan.max_grad_norm,
        max_length=plan.max_length,
        bf16=plan.precision == "bf16",
        use_cpu=not plan.uses_gpu,
        **_checkpointing_arguments(plan.sections.trainer["gradient_checkpointing"], plan),
        accelerator_config=_accelerator_config(plan),
        eval_strategy="steps",
        save_strategy="steps",
        save_total_limit=None,  # callbacks/keep_best.py decides: the Trainer would delete by date
        logging_strategy="steps",
        logging_nan_inf_filter=False,  # the default replaces a NaN loss in the log, and the optimizer steps
        include_num_input_tokens_seen="non_padding",
        average_tokens_across_devices=True,
        # The rows are already prepared, packed and masked (sft_recipes.data); the collator keeps examples separate.
        packing=False,
        padding_free=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to=[],  # callbacks/trackers.py adds them
    )


def _checkpointing_arguments(enabled: bool, plan: Plan) -> dict[str, Any]:
    """Return the activation checkpointing arguments, by the name that the installed transformers uses.

    Non-reentrant, except for adapters under ZeRO-3: gathered weights have another shape in the recomputation of a layer
    (https://github.com/huggingface/trl/issues/2514).
    """
    name = (
        "activation_checkpointing"
        if "activation_checkpointing" in SFTConfig.__dataclass_fields__
        else "gradient_checkpointing"
    )
    # TRL checkpoints by default, and reads its default from the old name: set it too.
    disabled = {"gradient_checkpointing": False} if name == "activation_checkpointing" else {}
    reentrant = plan.method != "full" and plan.strategy.zero_stage == 3
    return {name: enabled, **disabled, **({f"{name}_kwargs": {"use_reentrant": reentrant}} if enabled else {})}


def _accelerator_config(plan: Plan) -> dict[str, Any]:
    """Reduce-scatter gradients at every micro-batch under FSDP2: accelerate's default waits for the last one, and every
    rank would store the gradients of all parameters."""
    return {"gradient_accumulation_kwargs": {"sync_each_batch": True}} if plan.strategy.fsdp else {}
