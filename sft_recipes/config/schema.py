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
from typing import Annotated, Any, Literal, Union, get_type_hints

import yaml
from pydantic import AfterValidator, Field, NonNegativeFloat

from sft_recipes.config.strategies import STRATEGIES

# Types of keys, with their bounds; the largest Size only keeps the arithmetic finite.
Count = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=1, le=100_000)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Name = Annotated[str, Field(pattern=r"\S")]

AUTO = "auto"  # the plan chooses: the fastest configuration that fits
CONVERGED_ACCURACY = 0.9  # token accuracy above which a flat loss is convergence, not a plateau
# Template variables that are set for each row; chat_template_kwargs may not.
RESERVED_TEMPLATE_VARIABLES = frozenset(("messages", "tools", "add_generation_prompt"))

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

# Fields of SFTConfig with narrower types than its own. transformers reads a fraction of steps as a ratio of all steps.
TRAINER_TYPES: dict[str, Any] = {
    **dict.fromkeys(("max_length", "eval_steps", "save_steps", "logging_steps"), Count),
    **dict.fromkeys(("seed", "data_seed"), Seed),
    "gradient_checkpointing": Literal["auto"] | bool | Count,
    "lr_scheduler_kwargs": dict[str, float],
    "learning_rate": Annotated[float, Field(ge=1e-12, le=10)],
    "num_train_epochs": Annotated[float, Field(ge=0.001, le=10_000)],
    "warmup_ratio": Fraction,
    "weight_decay": Annotated[float, Field(ge=0, le=10)],
}

# A smoke test (defaults.yaml).
OVERFIT = "OVERFIT=1"
OVERFIT_LOSS = 0.1  # per token


def _check_name(name: str, names: tuple[str, ...]) -> str:
    if name not in names:
        raise ValueError(f"found {name!r}, expected one of {', '.join(names)}{did_you_mean(name, names)}")
    return name


def _one_of(*names: str) -> AfterValidator:
    return AfterValidator(lambda name: _check_name(name, names))


def _check_columns(columns: dict[str, str]) -> dict[str, str]:
    for target, template in columns.items():
        names = [name for _, name in column_pieces(template) if name]
        if not names and target not in ("system", "prompt"):
            raise ValueError(f"{target}: found {template!r}, expected a column name in braces: '{{answer}}'")
    if columns and not ({"prompt", "completion"} <= columns.keys() or {"messages", "conversations"} & columns.keys()):
        raise ValueError(f"found {', '.join(columns)}, expected prompt and completion, or messages")
    return columns


def _check_template_variables(variables: dict[str, Any]) -> dict[str, Any]:
    if reserved := RESERVED_TEMPLATE_VARIABLES & set(variables):
        raise ValueError(f"found {min(reserved)}, which is set for each row. Remove it")
    return variables


StoppingAlert = Literal["loss_spike", "exploding_gradients", "vanishing_gradients"]
ColumnTarget = Literal["system", "prompt", "completion", "messages", "conversations", "tools", "chat_template_kwargs"]
Columns = Annotated[dict[ColumnTarget, str], AfterValidator(_check_columns)]
# A kernel of the Hub is code: it needs a commit.
Kernel = Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+@[0-9a-f]{40}$")]
Attention = Literal["auto", "eager", "sdpa", "varlen", "flash_attention_2"] | Kernel
# Linear layers of a decoder block; Llama, Qwen and OLMo share the names.
LinearLayer = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TargetModules = Literal["all-linear"] | Annotated[list[LinearLayer], Field(min_length=1)]
TemplateVariables = Annotated[dict[str, Any], AfterValidator(_check_template_variables)]


@dataclass(frozen=True)
class Hardware:
    """The hardware of a recipe.

    Attributes:
        gpus: over all nodes; 0 is the CPU.
        mfu: assumed share of peak FLOP/s in forecasts. 0.35 is a guess below the 0.42 to 0.48 of the best published
            tables (llm-foundry's scripts/train/benchmarking); not measured in this project.
        network_gbs: of one node to others, in 1e9 bytes/s and direction, for forecasts of several nodes. 400 is eight
            cards of 400 Gbit/s, as in a DGX H100; one 100 Gbit/s Ethernet card is 12.5.
    """

    gpus: Annotated[int, Field(ge=0, le=100_000)] = 0
    nodes: Size = 1
    gpu_type: str | None = None
    mfu: Annotated[float, Field(ge=0.01, le=1)] = 0.35
    network_gbs: Annotated[float, Field(ge=0.1, le=10_000)] = 400.0


@dataclass(frozen=True)
class Model:
    """The model to fine-tune.

    Attributes:
        name_or_path: Hub name or local folder.
        open_alternative: a model of the same size without a license gate.
        from_scratch: build the model from `architecture` with random weights, and train a tokenizer on the training
            rows.
        add_tokens: special tokens that `chat_template` writes and the tokenizer lacks, such as those of a base model.
        fused_kernels: Liger's RMSNorm, SwiGLU and RoPE in bf16 on GPUs; `auto` uses them where they are installed and
            verified, `true` fails where they are not.
    """

    name_or_path: str | None = None
    revision: str | None = None
    license: str | None = None
    open_alternative: str | None = None
    from_scratch: bool = False
    architecture: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    add_tokens: list[Name] = field(default_factory=list)
    attention: Attention = "auto"
    fused_kernels: Literal["auto"] | bool = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class DataSource:
    """One entry of `data.train` or `data.validation`, with what applies to it alone.

    Attributes:
        path: file, folder, or Hub dataset (owner/name or owner/name:split).
        columns: as `Data.columns`, like `ignore_columns` and `chat_template_kwargs`; replaces it for this source.
        weight: uses of each row per epoch. The fraction is a seeded choice of rows, a different one each epoch.
    """

    path: Name
    columns: Columns = field(default_factory=dict)
    ignore_columns: list[Name] = field(default_factory=list)
    chat_template_kwargs: TemplateVariables = field(default_factory=dict)
    weight: Annotated[float, Field(gt=0, le=100)] = 1.0


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

    train: Name | list[Name | dict[str, Any]] = ""
    validation: Name | list[Name | dict[str, Any]] | None = None
    retention_eval: Name | None = None
    revision: str | None = None
    columns: Columns = field(default_factory=dict)
    ignore_columns: list[Name] = field(default_factory=list)
    chat_template_kwargs: TemplateVariables = field(default_factory=dict)
    max_rejected_fraction: Fraction = 0.0
    max_eval_samples: Count | None = None
    validation_fraction: Annotated[float, Field(ge=0.0001, le=0.9999)] = 0.05
    max_dropped_fraction: Fraction = 0.05
    max_overlap: Fraction = 0.0
    overfit_rows: Annotated[int, Field(ge=1, le=1000)] | None = None
    examples: Count | None = None
    mean_tokens: Count | None = None
    validation_examples: Count | None = None

    def revision_of(self, path: str) -> str | None:
        """Return the Hub commit of a source: `revision` belongs to the training dataset."""
        return self.revision if self.sources("train")[0].path.partition(":")[0] == path.partition(":")[0] else None

    def sources(self, part: str) -> list[DataSource]:
        """Return the sources of `train`, `validation` (none if part of the training rows is held out) or
        `retention_eval`."""
        named = getattr(self, part)
        shared = {key: getattr(self, key) for key in ("columns", "ignore_columns", "chat_template_kwargs")}
        entries = named if isinstance(named, list) else [named] if named else []
        return [DataSource(**(shared | (entry if isinstance(entry, dict) else {"path": entry}))) for entry in entries]


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on frozen weights (arXiv:2106.09685); `quantize: nf4` makes those 4-bit (QLoRA,
    arXiv:2305.14314).

    Attributes:
        target_modules: `all-linear` or a list of layer names.
        experts: adapt fused experts too, the weights of all experts of a layer in one parameter; without dropout.
    """

    r: Size = 16
    alpha: Count = 32
    dropout: Annotated[float, Field(ge=0, le=0.99)] = 0.0
    target_modules: TargetModules = "all-linear"
    experts: bool = False
    quantize: Literal["nf4"] | None = None


@dataclass(frozen=True)
class Batch:
    """Sizes in rows of the trainer: packed rows if packing is on. Without `max_per_device_batch_size` the plan chooses
    the micro-batch."""

    effective_batch_size: Size | None = None
    max_per_device_batch_size: Size | None = None
    min_optimizer_steps: Count = 20


@dataclass(frozen=True)
class Generation:
    """Generation on held-out prompts before and after training.

    Attributes:
        show: prompts to print.
        score: prompts to score by `metrics` (sft_recipes/data/held_out_metrics.py).
        metrics_file: Python file that registers more metrics; it is code, and runs as this user.
    """

    show: Annotated[int, Field(ge=0, le=1000)] = 3
    score: Annotated[int, Field(ge=0, le=1000)] = 0
    metrics: list[Name] = field(default_factory=lambda: ["exact_match"])
    metrics_file: Name | None = None
    max_new_tokens: Count = 64


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
        window: optimizer steps.
        early_stopping_patience: evaluations without a lower validation loss after which the run ends; None disables
            it.
        heartbeat_timeout_seconds: a run without a heartbeat for this long is terminated, and the rank that the others
            wait for is named; longer to load and to save. Raise it if a micro-batch takes that long.
        replica_check_steps: optimizer steps between replica consistency checks under DDP, which also run before each
            save; replicas that differ stop the run.
        stop_on: of loss_spike, exploding_gradients, vanishing_gradients, those that stop the run instead of warning.
    """

    overfitting_gap: NonNegativeFloat = 0.1
    grad_norm_above: NonNegativeFloat = 10.0
    grad_norm_below: NonNegativeFloat = 1e-6
    loss_spike: Annotated[float, Field(ge=1)] = 10.0
    throughput_drop: Fraction = 0.5
    plateau: Fraction = 0.02
    data_wait: Fraction = 0.2
    memory_growth: NonNegativeFloat = 0.1
    window: Annotated[int, Field(ge=2, le=10_000)] = 10
    early_stopping_patience: Count | None = None
    heartbeat_timeout_seconds: Annotated[float, Field(ge=1)] = 300.0
    replica_check_steps: Count = 100
    stop_on: list[StoppingAlert] = field(default_factory=list)


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
    parallelism: Annotated[str, _one_of(AUTO, *STRATEGIES)] = AUTO
    precision: Literal["bf16", "fp32"] = "bf16"
    allow_out_of_range: list[Annotated[str, _one_of(*TABLE_KEYS)]] = field(default_factory=list)
    trainer: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def method(self) -> str:
        """`full`, `lora`, or `qlora` if the frozen weights are 4-bit."""
        if self.lora is None:
            return "full"
        return "qlora" if self.lora.quantize else "lora"


SECTIONS: dict[str, type] = {
    section.__name__.lower(): section for section in (Hardware, Model, Data, Lora, Batch, Generation, Monitor)
}


@cache
def key_types() -> dict[str, Any]:
    """Return the type of every key of a recipe by its dotted name, those of SFTConfig as `trainer_fields` has them."""
    kinds = {"str": str, "int": int, "float": float, "bool": bool, "dict": dict[str, Any], "list": list[Any]}
    trainer = {
        field: Union[tuple(kinds.get(kind) for kind in accepted)]  # noqa: UP007
        for field, accepted in trainer_fields().items()
        if field not in owned_trainer_fields()
    }
    top = get_type_hints(Recipe, include_extras=True)
    types = {key: top[key] for key in top.keys() - {*SECTIONS, "name", "origins", "trainer"}}
    for section, fields in SECTIONS.items():
        types |= {f"{section}.{key}": type for key, type in get_type_hints(fields, include_extras=True).items()}
    return types | {f"trainer.{field}": type for field, type in (trainer | TRAINER_TYPES).items()}


@cache
def trainer_fields() -> dict[str, list[str]]:
    """Return SFTConfig's fields and their types, recorded by `python tests/unit/test_schema.py`."""
    fields: dict[str, list[str]] = json.loads(Path(__file__).with_name("trainer_fields.json").read_text())
    return fields


@cache
def owned_trainer_fields() -> dict[str, str]:
    """Return SFTConfig's fields that a recipe may not set, each with what to set instead, or why it is fixed."""
    fields = read_table("owned_trainer_fields.yaml")
    return {field: owner for owner, owned in fields.items() for field in owned}


@cache
def defaults() -> dict[str, dict[str, Any]]:
    """Return defaults.yaml: the defaults of `trainer`, and the recipe keys that OVERFIT=1 sets (`overfit`)."""
    return dict(read_table("defaults.yaml"))


def read_table(name: str) -> Any:
    """Return the content of a YAML file of this folder."""
    return yaml.load(Path(__file__).with_name(name).read_text(encoding="utf-8"), yaml.CSafeLoader)


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
