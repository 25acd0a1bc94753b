"""Translates a plan into TRL's SFTConfig."""

from trl import SFTConfig

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.run_dir import RunDir

# Fields of SFTConfig that the plan has derived.
_PLANNED = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type",
    "num_train_epochs", "warmup_steps", "weight_decay", "max_grad_norm", "max_length",
)  # fmt: skip


def make_sft_config(plan: Plan, folder: RunDir) -> SFTConfig:
    """Return the plan as TRL's SFTConfig; every value that a recipe may not set is set here, or has its default."""
    trainer = dict(plan.sections.trainer)
    interval, _ = trainer.pop("gradient_checkpointing"), trainer.pop("packing")
    every = {"every_n_layers": interval} if interval > 1 else {}
    # Gathered weights have another shape in the recomputation of a layer (https://github.com/huggingface/trl/issues/2514).
    reentrant = plan.method != "full" and plan.strategy.zero_stage == 3
    defaults = {
        "logging_first_step": True,
        "ddp_find_unused_parameters": False,
        "project": "sft-recipes",
        "disable_tqdm": True,
        "dataloader_num_workers": plan.data_workers,
        "log_level_replica": "passive",
    }
    return SFTConfig(
        **{**defaults, **trainer, **{name: getattr(plan, name) for name in _PLANNED}},
        activation_checkpointing=bool(interval),
        activation_checkpointing_kwargs={"use_reentrant": reentrant, **every} if interval else None,
        output_dir=str(folder.path),
        run_name=folder.name,
        per_device_eval_batch_size=plan.per_device_train_batch_size,
        bf16=plan.precision == "bf16",
        use_cpu=not plan.uses_gpu,
        # Under FSDP2 accelerate's default reduces gradients after the last micro-batch, and every rank would store the
        # gradients of all parameters.
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": True}} if plan.strategy.fsdp else {},
        eval_strategy="steps",
        logging_nan_inf_filter=False,  # the default replaces a NaN loss in the log, and the optimizer steps
        include_num_input_tokens_seen="non_padding",
        # The rows are already prepared, packed and masked (sft_recipes.data); the collator keeps examples separate.
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,  # the collator needs row numbers
        report_to=[],  # callbacks/trackers.py adds them; callbacks/keep_best.py removes checkpoints
    )
