"""Forecast time, GPU-hours and cost of a run from its FLOPs; assumptions are stated, nothing is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sft_recipes.config import gpu_types as gpu_table
from sft_recipes.config.architecture import adapter_count, block_weights, linear_layers, parameter_count
from sft_recipes.planner.memory import MemoryInputs
from sft_recipes.runtime.env import gpu_hour_price

WRITE_BYTES_PER_SECOND = 2_000_000_000  # of one node to the disk of its runs; an assumption


@dataclass(frozen=True)
class Flops:
    """FLOPs per token, padding excluded.

    Attributes:
        forward: the forward pass, as in evaluation.
        model: forward and backward pass, each operation once: the numerator of MFU.
        hardware: executed by the GPU, recomputation included: the numerator of HFU.
    """

    forward: float
    model: float
    hardware: float


def flops_per_token(load: MemoryInputs, mean_length: float, supervised_share: float = 1.0) -> Flops | None:
    """Return the FLOPs per token of matrix multiplications; None if the architecture is not given.

    Forward pass: 2 for each weight of the decoder layers and adapters, 2 x vocabulary x width in the output layer for
    each supervised token (only those are scored), and 2 x layers x width x length for causal attention, half of what
    PaLM counts (arXiv:2204.02311, appendix B). Embeddings are looked up, not multiplied. The backward pass is twice
    that: gradients of inputs and of weights. Frozen weights get none of the latter.

    Recomputed (arXiv:2205.05198 defines HFU by it): the logits, which TRL's scoring computes again (trl 1.16,
    kernels/chunked_logprob.py, `backward`); the attention scores, by flash attention's backward pass (arXiv:2205.14135,
    as torch/utils/flop_counter.py counts it); and with activation checkpointing each decoder layer, but for its last
    matrix product, at which torch's checkpoint stops because nothing after it is needed (`set_checkpoint_early_stop`);
    adapters on that product need it. tests/unit/test_suggest.py compares it with torch's FLOP counter.

    Args:
        load: model, adapters and activation checkpointing.
        mean_length: mean over tokens of the length of the example that a token is in.
        supervised_share: supervised tokens / tokens.
    """
    architecture = load.architecture
    if parameter_count(architecture) is None:
        return None
    layers, products = architecture["num_hidden_layers"], linear_layers(architecture)
    adapters = (adapter_count(architecture, load.lora) or 0) if load.lora else 0
    linear = 2.0 * layers * block_weights(architecture)
    attention = 2.0 * layers * products["q_proj"][1] * mean_length
    logits = 2.0 * architecture["vocab_size"] * architecture["hidden_size"] * supervised_share
    forward = linear + 2.0 * adapters + attention + logits
    backward = (1 if load.lora else 2) * (linear + logits) + 4.0 * adapters + 2 * attention
    recomputed = logits + attention / 2
    if load.gradient_checkpointing:
        inputs, outputs = products["down_proj"]
        skipped = 0.0 if load.lora else 2.0 * layers * inputs * outputs
        recomputed += linear + 2.0 * adapters + attention - skipped
    return Flops(forward, forward + backward, forward + backward + recomputed)


def palm_flops_per_token(architecture: Mapping[str, Any], tokens_per_row: int) -> float | None:
    """Return 6N + 12 x layers x width x row length, as in most published MFU (PaLM, arXiv:2204.02311, appendix B).

    It includes the embedding look-up and attention to tokens that the causal mask hides.
    """
    parameters = parameter_count(architecture)
    if parameters is None:
        return None
    width: int = linear_layers(architecture)["q_proj"][1]
    attention: float = 12 * architecture["num_hidden_layers"] * width * tokens_per_row
    return 6 * parameters + attention


@dataclass(frozen=True)
class Work:
    """Amounts of work in a run."""

    flops: Flops
    train_tokens: float
    evaluations: int
    tokens_per_evaluation: float
    saves: int
    bytes_per_save: int
    models: int
    bytes_per_model: int
    one_rank_saves: bool


def forecast(work: Work, gpu_type: str | None, gpus: int, nodes: int, mfu: float) -> dict[str, float | None] | None:
    """Return seconds by part, GPU-hours and cost; None if the peak FLOP/s of the GPU type are not known.

    `mfu` is the assumed share of peak FLOP/s that a GPU executes, that is, the MFU without recomputation, as in
    published tables: llm-foundry's 40 to 46% for 1B to 13B on H100 at 2,048 tokens
    have activation checkpointing off (mosaicml/llm-foundry, scripts/train/benchmarking). Seconds are hardware FLOPs /
    (peak x `mfu`), so recomputation takes its time; `mfu` of the result is comparable to the metrics of the run.

    Sharded checkpoints are written by all nodes together, a model by one rank.

    Raises:
        UserError: GPU_HOUR_PRICE is not a price.
    """
    price = gpu_hour_price()
    peak = gpu_table.peak_flops(gpu_type)
    if peak is None or not gpus:
        return None
    per_second = gpus * peak * mfu
    training = work.train_tokens * work.flops.hardware / per_second
    evaluating = work.evaluations * work.tokens_per_evaluation * work.flops.forward / per_second
    saving = work.saves * work.bytes_per_save / (WRITE_BYTES_PER_SECOND * (1 if work.one_rank_saves else nodes))
    saving += work.models * work.bytes_per_model / WRITE_BYTES_PER_SECOND
    seconds = training + evaluating + saving
    gpu_hours = seconds * gpus / 3600
    return {
        "hfu": mfu,
        "mfu": round(mfu * work.flops.model / work.flops.hardware, 4),
        "training_seconds": round(training, 1),
        "evaluation_seconds": round(evaluating, 1),
        "saving_seconds": round(saving, 1),
        "seconds": round(seconds, 1),
        "overhead_share": round((evaluating + saving) / seconds, 4) if seconds else 0.0,
        "tokens_per_second_per_gpu": round(per_second / gpus / work.flops.hardware, 1),
        "gpu_hours": round(gpu_hours, 2),
        "money": None if price is None else round(gpu_hours * price, 2),
    }
