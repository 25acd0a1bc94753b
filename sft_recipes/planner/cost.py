"""Forecast time, GPU-hours and cost of a run from its FLOPs; assumptions are stated, nothing is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft_recipes.config.architecture import linear_layers, parameter_count
from sft_recipes.config.gpu_types import peak_flops
from sft_recipes.planner.memory import MemoryInputs
from sft_recipes.runtime.env import gpu_hour_price

if TYPE_CHECKING:
    from sft_recipes.planner.plan import Plan

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


def flops_per_token(load: MemoryInputs, mean_length: float, supervised_share: float = 1.0) -> Flops:
    """Return the FLOPs per token of matrix multiplications.

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
    adapters = load.trained if load.lora else 0
    linear = 2.0 * load.layers * load.block
    attention = 2.0 * load.layers * linear_layers(architecture)["q_proj"][1] * mean_length
    logits = 2.0 * load.ends * supervised_share
    forward = linear + 2.0 * adapters + attention + logits
    backward = (1 if load.lora else 2) * (linear + logits) + 4.0 * adapters + 2 * attention
    recomputed = logits + attention / 2
    if load.gradient_checkpointing:
        skipped = 0.0 if load.lora else 2.0 * load.layers * load.inner * load.hidden
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


def forecast(plan: Plan, load: MemoryInputs) -> dict[str, float | None] | None:
    """Return seconds by part, GPU-hours and cost of a plan whose steps are known.

    None without GPUs of known bf16 FLOP/s, in fp32, and without the number of validation examples.

    `plan.assumed_mfu` is the assumed share of peak FLOP/s that a GPU executes, that is, the MFU without recomputation,
    as in published tables: llm-foundry's 40 to 46% for 1B to 13B on H100 at 2,048 tokens have activation checkpointing
    off (mosaicml/llm-foundry, scripts/train/benchmarking). Seconds are hardware FLOPs / (peak x share), so
    recomputation takes its time; `mfu` of the result is comparable to the metrics of the run.

    Packed rows count as full. Before data preparation all tokens count as supervised, an upper bound. Sharded
    checkpoints are written by all nodes together, a model by one rank.

    Raises:
        UserError: GPU_HOUR_PRICE is not a price.
    """
    price, peak, data, trainer = gpu_hour_price(), peak_flops(plan.gpu_type), plan.sections.data, plan.sections.trainer
    held_out = data.overfit_rows or round((plan.examples or 0) * data.validation_fraction)
    validation = data.validation_examples if data.validation else held_out
    if data.max_eval_samples is not None:
        validation = min(data.max_eval_samples, validation or data.max_eval_samples)
    steps, saved = plan.optimizer_steps, plan.checkpoint_bytes
    if peak is None or not plan.gpus or plan.precision != "bf16" or validation is None or not steps or not saved:
        return None
    mean = min(data.mean_tokens or plan.max_length, plan.max_length)
    flops = flops_per_token(load, mean, 1.0 if plan.supervised_share is None else plan.supervised_share)
    per_second = plan.gpus * peak * plan.assumed_mfu
    row_tokens = plan.max_length if plan.packing else mean
    training = steps * plan.effective_batch_size * row_tokens * flops.hardware / per_second
    evaluations = math.ceil(steps / trainer["eval_steps"])
    evaluating = evaluations * validation * mean * flops.forward / per_second
    writers = plan.nodes if plan.strategy.deepspeed else 1
    saving = math.ceil(steps / trainer["save_steps"]) * saved / (WRITE_BYTES_PER_SECOND * writers)
    # With a falling loss each evaluation saves a best model; then last/ and final/.
    saving += (evaluations + 2) * load.trained_bytes / WRITE_BYTES_PER_SECOND
    seconds = training + evaluating + saving
    gpu_hours = seconds * plan.gpus / 3600
    return {
        "hfu": plan.assumed_mfu,
        "mfu": round(plan.assumed_mfu * flops.model / flops.hardware, 4),
        "training_seconds": round(training, 1),
        "evaluation_seconds": round(evaluating, 1),
        "saving_seconds": round(saving, 1),
        "seconds": round(seconds, 1),
        "overhead_share": round((evaluating + saving) / seconds, 4),
        "tokens_per_second_per_gpu": round(per_second / plan.gpus / flops.hardware, 1),
        "gpu_hours": round(gpu_hours, 2),
        "money": None if price is None else round(gpu_hours * price, 2),
    }
