"""The schema of a recipe: sections, keys, types, defaults."""

from __future__ import annotations

import difflib
import json
import re
import string
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from sft_recipes.config.strategies import DATA_PARALLEL, STRATEGIES

PRECISIONS = ("bf16", "fp32")
QUANTIZATIONS = ("nf4",)
CONVERGED_ACCURACY = 0.9  # token accuracy above which a flat loss is convergence, not a plateau
STOPPING_GUARDS = ("loss_spike", "exploding_gradients", "vanishing_gradients")
ATTENTIONS = ("auto", "eager", "sdpa", "varlen", "flash_attention_2")
# Targets of data.columns.
COLUMN_TARGETS = ("system", "prompt", "completion", "messages", "conversations", "tools", "chat_template_kwargs")
# Template variables that are set for each row; chat_template_kwargs may not.
RESERVED_TEMPLATE_VARIABLES = frozenset(("messages", "tools", "add_generation_prompt"))
# Or a kernel from the Hub, which is code: pinned by its commit.
KERNEL = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}")

# Keys of the hyperparameter table (recipes/sizes.yaml), named as in the SFT guide.
# SFTConfig no longer has warmup_ratio; the plan computes warm-up steps from it.
TABLE_KEYS = (
    "learning_rate",
    "effective_batch_size",
    "num_train_epochs",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "lr_scheduler_type",
)

# Defaults for what neither the recipe nor its size class sets.
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

# OVERFIT=1, a smoke test: the loss on a handful of rows approaches zero, or the run fails.
OVERFIT = "OVERFIT=1"
OVERFIT_LOSS = 0.1  # per token
OVERFIT_SETTINGS: dict[str, Any] = {
    "data.overfit_rows": 8,
    "data.validation": None,
    "data.retention_eval": None,
    "data.examples": None,
    "trainer.max_steps": 200,
    "trainer.eval_steps": 50,
    "trainer.save_steps": 200,
}

# SFTConfig fields that a recipe may not set, because the plan derives them or correctness depends on them; each with
# the key or variable to set instead, or why it is fixed.
OWNED_BY_THE_PLAN: dict[str, str] = {
    "output_dir": "NAME=",
    "run_name": "NAME=",
    "per_device_train_batch_size": "batch.max_per_device_batch_size",
    "per_device_eval_batch_size": "batch.max_per_device_batch_size",
    "auto_find_batch_size": "batch.max_per_device_batch_size",
    "gradient_accumulation_steps": "batch.effective_batch_size",
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
    "save_total_limit": "fixed: the two latest checkpoints, weights of the three best",
    "save_only_model": "fixed: the two latest checkpoints, weights of the three best",
    "load_best_model_at_end": "fixed: final/ is the best",
    "metric_for_best_model": "fixed: eval_loss",
    "greater_is_better": "fixed: eval_loss",
    "average_tokens_across_devices": "fixed: the loss is a mean over the tokens of all ranks",
    "assistant_only_loss": "fixed: only assistant turns are in the loss",
    "completion_only_loss": "fixed: only assistant turns are in the loss",
    "dataset_kwargs": "fixed: rows are prepared before the trainer starts",
    "packing_strategy": "fixed: examples are packed without splitting them",
    "eval_packing": "trainer.packing",
    "padding_free": "trainer.packing",
    "remove_unused_columns": "fixed: rows are prepared before the trainer starts",
    "train_sampling_strategy": "fixed: complete effective batches in a seeded order",
    "dataloader_drop_last": "fixed: complete effective batches in a seeded order",
    "logging_nan_inf_filter": "fixed: NaN/Inf losses are logged as such",
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
    "enable_jit_checkpoint": "fixed: a signal saves the same step on all ranks",
    "ignore_data_skip": "fixed: a resumed run continues with the remaining rows",
    "report_to": "REPORT_TO=",
    "model_init_kwargs": "the keys of model",
    "chat_template_path": "model.chat_template",
    "trust_remote_code": "model.trust_remote_code",
    "do_train": "fixed: set by the command",
    "do_eval": "fixed: set by the command",
    "do_predict": "fixed: set by the command",
    "resume_from_checkpoint": "RESUME=1",
    "parallelism_config": "parallelism",
    "local_rank": "fixed: set by the launcher",
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
        "fixed: runs upload nothing",
    ),
}


@dataclass(frozen=True)
class Hardware:
    """The hardware of a recipe.

    Attributes:
        gpus: over all nodes; 0 is the CPU.
        mfu: assumed share of peak FLOP/s in forecasts. 0.35 is a guess below the 0.42 to 0.48 of the best published
            tables (llm-foundry's scripts/train/benchmarking); not measured in this project.
    """

    gpus: int = 0
    nodes: int = 1
    gpu_type: str | None = None
    mfu: float = 0.35


@dataclass(frozen=True)
class Model:
    """The model to fine-tune.

    Attributes:
        name_or_path: Hub name or local folder.
        open_alternative: a model of the same size without a license gate.
        from_scratch: build the model from `architecture` with random weights, and train a tokenizer on the training
            rows.
        add_tokens: special tokens that `chat_template` writes and the tokenizer lacks, such as those of a base model.
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
class DataSource:
    """One entry of `data.train` or `data.validation`, with what applies to it alone.

    Attributes:
        path: file, folder, or Hub dataset (owner/name or owner/name:split).
        columns: as `Data.columns`, like `ignore_columns` and `chat_template_kwargs`; replaces it for this source.
        weight: uses of each row per epoch. The fraction is a seeded choice of rows, a different one each epoch.
    """

    path: str
    columns: dict[str, str] = field(default_factory=dict)
    ignore_columns: list[str] = field(default_factory=list)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0


@dataclass(frozen=True)
class Data:
    """Training and validation data.

    Attributes:
        train: one source, or a list of sources (names, or the keys of `DataSource`); each has its own validation loss.
        retention_eval: rows that measure forgetting: their loss is logged before the first step and at every
            evaluation, and affects nothing else.
        columns: a format string with column names in braces for each of system, prompt, completion, messages,
            conversations, tools. Rows are then read by these alone.
        ignore_columns: columns that may be left out although their names say that they change what a row means.
        chat_template_kwargs: variables for the chat template; a row's own column of this name overrides them.
        max_rejected_fraction: fraction of a source's rows that may be rejected; they are left out and reported.
        revision: commit of the dataset on the Hub.
        max_eval_samples: examples per evaluation, a seeded sample.
        max_dropped_fraction: fraction of rows that `max_length` may leave without a supervised token.
        max_overlap: fraction of validation rows that may also be in training.
        overfit_rows: train and validate on this many rows, the first of the first source; set by OVERFIT=1.
        examples: size of the source, for forecasts; so are `mean_tokens` and `validation_examples`.
    """

    train: str | list[Any] = ""
    validation: str | list[Any] | None = None
    retention_eval: str | None = None
    revision: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    ignore_columns: list[str] = field(default_factory=list)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_rejected_fraction: float = 0.0
    max_eval_samples: int | None = None
    validation_fraction: float = 0.05
    max_dropped_fraction: float = 0.05
    max_overlap: float = 0.0
    overfit_rows: int | None = None
    examples: int | None = None
    mean_tokens: int | None = None
    validation_examples: int | None = None

    def revision_of(self, path: str) -> str | None:
        """Return the Hub commit of a source: `revision` belongs to the training dataset."""
        return self.revision if self.training[0].path.partition(":")[0] == path.partition(":")[0] else None

    @property
    def training(self) -> list[DataSource]:
        """Sources of the training rows."""
        return self._sources(self.train)

    @property
    def held_out(self) -> list[DataSource]:
        """Sources of the validation rows; empty if part of the training rows is held out."""
        return self._sources(self.validation)

    @property
    def retention(self) -> list[DataSource]:
        """The source of the retention eval set, if there is one."""
        return self._sources(self.retention_eval)

    def _sources(self, named: str | list[Any] | None) -> list[DataSource]:
        shared = {key: getattr(self, key) for key in ("columns", "ignore_columns", "chat_template_kwargs")}
        entries = named if isinstance(named, list) else [named] if named else []
        return [
            DataSource(**{**shared, **(entry if isinstance(entry, dict) else {"path": entry})}) for entry in entries
        ]


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on frozen weights (arXiv:2106.09685); `quantize: nf4` makes those 4-bit (QLoRA,
    arXiv:2305.14314).

    Attributes:
        target_modules: `all-linear` or a list of layer names.
        experts: adapt fused experts too, the weights of all experts of a layer in one parameter; without dropout.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    experts: bool = False
    quantize: str | None = None


@dataclass(frozen=True)
class Batch:
    """Sizes in rows of the trainer: packed rows if packing is on."""

    effective_batch_size: int | None = None
    max_per_device_batch_size: int = 1
    min_optimizer_steps: int = 20


@dataclass(frozen=True)
class Generation:
    """Generation on held-out prompts before and after training: how many to print, and to score by exact match."""

    show: int = 3
    exact_match: int = 0
    max_new_tokens: int = 64


@dataclass(frozen=True)
class Monitor:
    """Thresholds of alerts, during training and in `diagnose`.

    0.1, 10 and 1e-6 are from the SFT guide ("4.1 Key Metrics to Track", "4.2 W&B Integration"); the others are this
    project's. A NaN/Inf loss always stops the run.

    Attributes:
        overfitting_gap: validation loss above training loss by more than this.
        grad_norm_above: gradients explode if their norm stays above this for `window` optimizer steps.
        grad_norm_below: gradients vanish if it stays below this for `window` optimizer steps.
        loss_spike: loss of a step, in robust standard deviations (1.4826 x median deviation) above the median of the
            steps before it.
        throughput_drop: fraction of the usual tokens/s that a run loses over `window` optimizer steps.
        plateau: the training loss fell by less than this fraction since warm-up.
        data_wait: fraction of a step spent waiting for data.
        memory_growth: fraction by which memory grows although row lengths do not.
        rank_lag: fraction by which one rank is slower on a step than the others.
        window: optimizer steps.
        early_stopping_patience: evaluations without a lower validation loss after which the run ends; None disables
            it.
        heartbeat_timeout_seconds: a run without a heartbeat for this long is terminated, and the rank that the others
            wait for is named; five times the longest interval so far if that is more, and longer to load and to save.
        replica_check_steps: optimizer steps between replica consistency checks under DDP, which also run before each
            save; replicas that differ stop the run.
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
    """A validated recipe; `origins` has the file and line of each value."""

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
        """`full`, `lora`, or `qlora` if the frozen weights are 4-bit."""
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
    """Return SFTConfig's fields and their types, recorded by `python tests/unit/test_schema.py`."""
    fields: dict[str, list[str]] = json.loads(Path(__file__).with_name("trainer_fields.json").read_text())
    return fields


def source_paths(named: Any) -> list[Any]:
    """Return the path of each entry of `data.train` or `data.validation`: a name, or a list of names and mappings."""
    entries = named if isinstance(named, list) else [named] if named else []
    return [entry.get("path") if isinstance(entry, dict) else entry for entry in entries]


def column_pieces(template: str) -> list[tuple[str, str | None]]:
    """Split a format string of `data.columns` into pairs of literal text and column name.

    Raises:
        ValueError: it is not a format string, or a field is more than a column name.
    """
    pieces = []
    for literal, name, spec, conversion in string.Formatter().parse(template):
        if name is not None and (not name or spec or conversion or re.search(r"[.\[\]{}]", name)):
            raise ValueError(f"found the field {{{name}}}, expected a plain column name in braces")
        pieces.append((literal, name))
    return pieces


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean x?` for the nearest of `known`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
