"""Says what a recipe may contain: its sections, their keys and types, and the error that a wrong one raises."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from sft_recipes.config.strategies import DATA_PARALLEL, STRATEGIES

PRECISIONS = ("bf16", "fp32")
QUANTIZATIONS = ("nf4",)
CONVERGED_ACCURACY = 0.9  # of tokens: what is above has not stalled, it has nothing much left to learn
STOPPING_GUARDS = ("loss_spike", "exploding_gradients", "vanishing_gradients")
ATTENTIONS = ("auto", "eager", "sdpa", "varlen", "flash_attention_2")
# Or a kernel from the Hub, which is code from elsewhere: the commit says which.
KERNEL = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}")

# The rows of the hyperparameter table hold these, under the names of the documents (recipes/sizes.yaml).
# warmup_ratio is no SFTConfig field any more; the plan turns it into whole warm-up steps.
TABLE_KEYS = (
    "learning_rate",
    "effective_batch_size",
    "num_train_epochs",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "lr_scheduler_type",
)

# What every run starts from where neither the recipe nor its row of the table says otherwise.
TRAINER_DEFAULTS: dict[str, Any] = {
    "max_length": 2048,
    "packing": True,
    "gradient_checkpointing": True,
    "logging_steps": 10,
    "eval_steps": 100,
    "save_steps": 100,
    "max_steps": -1,
    "seed": 42,
    "data_seed": 42,
}

# SFTConfig fields that a recipe may not set, because the plan works them out or the trainer's correctness rests on
# them; each with the place where the thing is said instead.
OWNED_BY_THE_PLAN: dict[str, str] = {
    "output_dir": "the run's name (NAME=)",
    "run_name": "the run's name (NAME=)",
    "per_device_train_batch_size": "batch.max_per_device_batch_size",
    "per_device_eval_batch_size": "batch.max_per_device_batch_size",
    "auto_find_batch_size": "batch.max_per_device_batch_size",
    "gradient_accumulation_steps": "derived from batch.effective_batch_size and the GPUs",
    "warmup_steps": "trainer.warmup_ratio",
    "bf16": "precision",
    "fp16": "precision",
    "use_cpu": "GPUS=0",
    "deepspeed": "parallelism",
    "fsdp": "parallelism",
    "fsdp_config": "parallelism",
    "accelerator_config": "parallelism",
    "eval_strategy": "trainer.eval_steps",
    "save_strategy": "trainer.save_steps",
    "logging_strategy": "trainer.logging_steps",
    "save_total_limit": "fixed: two whole checkpoints, weights of the three best",
    "save_only_model": "fixed: two whole checkpoints, weights of the three best",
    "load_best_model_at_end": "fixed: final/ is the best",
    "metric_for_best_model": "fixed: eval_loss",
    "greater_is_better": "fixed: eval_loss",
    "average_tokens_across_devices": "fixed: the loss is a mean over the tokens of all ranks",
    "assistant_only_loss": "fixed: the loss looks at the assistant's turns alone",
    "completion_only_loss": "fixed: the loss looks at the assistant's turns alone",
    "dataset_kwargs": "fixed: rows are prepared before the trainer starts",
    "packing_strategy": "fixed: whole examples are packed, none is cut in two",
    "eval_packing": "trainer.packing",
    "padding_free": "trainer.packing",
    "remove_unused_columns": "fixed: rows are prepared before the trainer starts",
    "train_sampling_strategy": "fixed: whole effective batches from a seeded order",
    "dataloader_drop_last": "fixed: whole effective batches from a seeded order",
    "logging_nan_inf_filter": "fixed: a loss that is no number shows as what it is",
    "include_num_input_tokens_seen": "fixed: tokens are always counted",
    "activation_checkpointing": "trainer.gradient_checkpointing",
    "activation_checkpointing_kwargs": "fixed: checkpointing is non-reentrant",
    "gradient_checkpointing_kwargs": "fixed: checkpointing is non-reentrant",
    **dict.fromkeys(
        (
            "dataset_text_field",
            "dataset_num_proc",
            "shuffle_dataset",
            "truncation_mode",
            "pad_to_multiple_of",
            "length_column_name",
            "eos_token",
            "pad_token",
        ),
        "fixed: rows are prepared before the trainer starts",
    ),
    "enable_jit_checkpoint": "fixed: a signal saves one step on all ranks",
    "ignore_data_skip": "fixed: a resumed run sees the rows that are left",
    "report_to": "the environment variable REPORT_TO",
    "model_init_kwargs": "model.*",
    "chat_template_path": "model.chat_template",
    "trust_remote_code": "model.trust_remote_code",
    "do_train": "the verb",
    "do_eval": "the verb",
    "do_predict": "the verb",
    "resume_from_checkpoint": "RESUME=1",
    "parallelism_config": "parallelism",
    "local_rank": "the launcher's",
    **dict.fromkeys(
        (
            "push_to_hub",
            "hub_token",
            "hub_private_repo",
            "hub_model_id",
            "hub_strategy",
            "hub_always_push",
            "hub_revision",
        ),
        "nothing: no run uploads anything",
    ),
}


@dataclass(frozen=True)
class Hardware:
    """The hardware that a recipe was written for, and the share of its arithmetic that forecasts count on.

    0.35 is a guess below the 0.42 to 0.48 that the best public tables reach (llm-foundry's
    scripts/train/benchmarking); nothing here has measured it.
    """

    gpus: int = 0
    nodes: int = 1
    gpu_type: str | None = None
    mfu: float = 0.35


@dataclass(frozen=True)
class Model:
    """Which model starts the run.

    `from_scratch` builds one from `architecture` with random weights and trains its tokenizer on the run's own
    training rows; otherwise `name_or_path` is a Hub name or a local folder. `open_alternative` names a model of
    the same size that needs no permission. `add_tokens` are special tokens that `chat_template` writes
    and the tokenizer lacks, as where a base model learns to chat.
    """

    name_or_path: str | None = None
    revision: str | None = None
    license: str | None = None
    open_alternative: str | None = None
    from_scratch: bool = False
    architecture: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    add_tokens: list[str] = field(default_factory=list)
    attention: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Data:
    """Which rows are trained and validated on.

    `examples`, `validation_examples` and `mean_tokens` are the source's own figures; forecasts rest on them. `revision`
    is the commit of the data set on the Hub. Several sources are a list; each has a validation loss of its own.
    `max_eval_samples` caps the examples of an evaluation, a seeded choice. `max_dropped_fraction` is the fraction of
    rows that `max_length` may leave without a supervised token, `max_overlap` the fraction of validation rows that
    may also be in training. `retention_eval` are rows of what the model could do before and should not forget: their
    loss is measured before the first step and at every evaluation, and decides nothing else.
    """

    train: str | list[str] = ""
    validation: str | list[str] | None = None
    retention_eval: str | None = None
    revision: str | None = None
    max_eval_samples: int | None = None
    validation_fraction: float = 0.05
    max_dropped_fraction: float = 0.05
    max_overlap: float = 0.0
    examples: int | None = None
    mean_tokens: int | None = None
    validation_examples: int | None = None

    def revision_of(self, source: str) -> str | None:
        """The commit to take `source` at, where it lies on the Hub: `revision` is the training data set's."""
        return self.revision if self.training[0].partition(":")[0] == source.partition(":")[0] else None

    @property
    def training(self) -> list[str]:
        """The sources of the training rows."""
        return [self.train] if isinstance(self.train, str) else self.train

    @property
    def held_out(self) -> list[str]:
        """The sources of the validation rows; none where a part of the training rows is held out."""
        return [self.validation] if isinstance(self.validation, str) else self.validation or []


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on frozen weights (arXiv:2106.09685), which are 4-bit where `quantize` says nf4 (QLoRA,
    arXiv:2305.14314). `target_modules` is `all-linear` or a list of the layers' own names."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    quantize: str | None = None


@dataclass(frozen=True)
class Batch:
    """Sizes in rows as the trainer sees them: packed rows where packing is on."""

    effective_batch_size: int | None = None
    max_per_device_batch_size: int = 1
    min_optimizer_steps: int = 20


@dataclass(frozen=True)
class Generation:
    """Generation on held-out prompts, before and after: how many to print, how many to compare exactly."""

    show: int = 3
    exact_match: int = 0
    max_new_tokens: int = 64


@dataclass(frozen=True)
class Monitor:
    """When a run's figures are a warning sign, while it trains and when it is read afterwards; each can be set.

    0.1, 10 and 1e-6 are the documents' ("4.1 Key Metrics to Track", "4.2 W&B Integration"); the others are this
    project's. A loss that is no number always stops the run.

    Attributes:
        overfitting_gap: validation loss above training loss by more than this.
        grad_norm_above: gradients explode where their norm stays above this for `window` optimizer steps.
        grad_norm_below: gradients vanish where it stays below this for `window` optimizer steps.
        loss_spike: a step's loss so many robust standard deviations (1.4826 x median deviation) above the median of
            the steps before it.
        throughput_drop: the share of its usual tokens a second that a run loses over `window` optimizer steps.
        plateau: the training loss fell by less than this share of itself since warm-up.
        data_wait: the share of a step that waits for data.
        memory_growth: the share by which memory grows while rows stay as long as they were.
        rank_lag: one rank works this share longer on a step than the others.
        window: optimizer steps.
        early_stopping_patience: evaluations without a lower validation loss after which the run ends; never where
            none.
        heartbeat_timeout_seconds: a run without a heartbeat for this long is terminated, and the rank that the others
            wait for is named; five times the longest interval so far if that is more, and more to load and to save.
        replica_check_steps: optimizer steps after which ranks under DDP compare digests of their weights, which also
            happens before each save; ranks that differ stop the run.
        stop_on: of loss_spike, exploding_gradients, vanishing_gradients, those that stop the run instead of warning.
    """

    overfitting_gap: float = 0.1
    grad_norm_above: float = 10.0
    grad_norm_below: float = 1e-6
    loss_spike: float = 10.0
    throughput_drop: float = 0.5
    plateau: float = 0.02
    data_wait: float = 0.2
    memory_growth: float = 0.1
    rank_lag: float = 0.3
    window: int = 10
    early_stopping_patience: int | None = None
    heartbeat_timeout_seconds: float = 300.0
    replica_check_steps: int = 100
    stop_on: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Recipe:
    """A page that a person reads, once it has been checked; `origins` says where each value was written."""

    name: str
    size: str
    data: Data
    model: Model
    hardware: Hardware = field(default_factory=Hardware)
    batch: Batch = field(default_factory=Batch)
    generation: Generation = field(default_factory=Generation)
    monitor: Monitor = field(default_factory=Monitor)
    lora: Lora | None = None
    parallelism: str = DATA_PARALLEL.name
    precision: str = "bf16"
    allow_out_of_range: list[str] = field(default_factory=list)
    trainer: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def method(self) -> str:
        """`full`, `lora`, or `qlora` where the frozen weights are 4-bit."""
        if self.lora is None:
            return "full"
        return "qlora" if self.lora.quantize else "lora"


SECTIONS: dict[str, type] = {
    "hardware": Hardware,
    "model": Model,
    "data": Data,
    "lora": Lora,
    "batch": Batch,
    "generation": Generation,
    "monitor": Monitor,
}
CHOICES: dict[str, tuple[str, ...]] = {
    "parallelism": tuple(STRATEGIES),
    "precision": PRECISIONS,
    "model.attention": ATTENTIONS,
    "lora.quantize": QUANTIZATIONS,
}


@cache
def trainer_fields() -> dict[str, list[str]]:
    """SFTConfig's fields and the kinds of value each takes, as written down by `python tests/unit/test_schema.py`."""
    fields: dict[str, list[str]] = json.loads(Path(__file__).with_name("trainer_fields.json").read_text())
    return fields


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean x?` for the nearest of `known`, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
