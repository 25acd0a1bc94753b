"""Works out parameters and per-GPU memory from the numbers of an architecture, before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sft_recipes.planning.schema import RecipeError, did_you_mean

GIB = 1024**3

# Memory that the vendors' datasheets name; drivers and CUDA contexts take some of it, hence USABLE.
CARDS_GIB: dict[str, int] = {
    "h100-80g": 80,
    "h200-141g": 141,
    "a100-80g": 80,
    "a100-40g": 40,
    "l40s-48g": 48,
    "rtx4090-24g": 24,
}
USABLE = 0.92

ZERO_BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's default allgather_bucket_size

DENSE_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def card_bytes(card: str | None) -> int | None:
    """Memory of a named card, or of a number of GiB; None where no card is named.

    Raises:
        RecipeError: the card is neither in the list nor a number.
    """
    if card is None:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", str(card)):
        return int(float(card) * GIB)
    if card not in CARDS_GIB:
        raise RecipeError(
            f"CARD: {card!r} is not known; wanted a number of GiB or one of {', '.join(CARDS_GIB)}"
            f"{did_you_mean(card, CARDS_GIB)}"
        )
    return CARDS_GIB[card] * GIB


def parameter_count(architecture: Mapping[str, Any]) -> int | None:
    """Weights of a dense Llama-shaped decoder (grouped-query attention, gated MLP, two RMS norms a layer).

    Returns None where the recipe does not give the numbers that this takes.
    """
    if any(key not in architecture for key in DENSE_KEYS):
        return None
    hidden, layers = architecture["hidden_size"], architecture["num_hidden_layers"]
    heads = architecture["num_attention_heads"]
    head_dim = architecture.get("head_dim") or hidden // heads
    key_values = architecture.get("num_key_value_heads") or heads
    attention = 2 * hidden * heads * head_dim + 2 * hidden * key_values * head_dim
    if architecture.get("attention_bias"):
        attention += heads * head_dim + 2 * key_values * head_dim
    mlp = 3 * hidden * architecture["intermediate_size"]
    embeddings = architecture["vocab_size"] * hidden * (1 if architecture.get("tie_word_embeddings") else 2)
    return int(embeddings + layers * (attention + mlp + 2 * hidden) + hidden)


def bytes_per_gpu(
    architecture: Mapping[str, Any],
    engine: str,
    precision: str,
    world_size: int,
    tokens_per_micro_batch: int,
    gradient_checkpointing: bool,
) -> dict[str, int] | None:
    """Peak memory of one rank by part, in bytes; an estimate to decide with, not a measurement.

    Weights, gradients and optimizer state follow the dtypes of `dtypes`: AdamW's two moments are fp32 everywhere.
    Activations follow Korthikanti et al. 2022 (arXiv:2205.05198): 34·tokens·hidden bytes a layer at 16 bits without the
    attention scores, which fused attention never stores; with checkpointing, each layer's input and one whole layer.
    Logits are not built whole: the trainer takes the cross-entropy in chunks, so one micro-batch in bf16 and fp32
    bounds them. Buffers: DDP's gradient buckets, ZeRO's gather bucket, under ZeRO-3 four times the largest layer,
    and autocast's bf16 copies of the weights.
    """
    parameters = parameter_count(architecture)
    if parameters is None:
        return None
    shard = {"zero1": (1, 1, world_size), "zero2": (1, world_size, world_size), "zero3": (world_size,) * 3}
    weights_over, gradients_over, optimizer_over = shard.get(engine, (1, 1, 1))
    zero, half = engine.startswith("zero"), precision == "bf16"
    weight_bytes = 2 if zero and half else 4
    hidden, layers = architecture["hidden_size"], architecture["num_hidden_layers"]
    per_layer = tokens_per_micro_batch * hidden * (34 if half else 68)
    layer_inputs = layers * tokens_per_micro_batch * hidden * (2 if half else 4)
    embeddings = architecture["vocab_size"] * hidden
    buffers = {
        "single": 0,
        "ddp": 4 * parameters,
        "zero1": 2 * min(parameters, ZERO_BUCKET_ELEMENTS),
        "zero2": 2 * min(parameters, ZERO_BUCKET_ELEMENTS),
        "zero3": 4 * weight_bytes * max(embeddings, (parameters - embeddings) // layers),
    }
    parts = {
        "weights": weight_bytes * parameters // weights_over,
        "gradients": 4 * parameters // gradients_over,
        "optimizer": (12 if zero and half else 8) * parameters // optimizer_over,
        "activations": layer_inputs + per_layer if gradient_checkpointing else layers * per_layer,
        "logits": min(tokens_per_micro_batch, 1024) * architecture["vocab_size"] * 8,
        "buffers": buffers[engine] + (2 * parameters if half and not zero else 0),
    }
    return {**parts, "total": sum(parts.values())}


def dtypes(engine: str, precision: str) -> dict[str, str]:
    """What each kind of number is held in under this engine; the run compares it with what it got."""
    if precision == "fp32":
        return {"weights": "fp32", "master": "fp32", "gradients": "fp32", "reduction": "fp32", "compute": "fp32"}
    if engine.startswith("zero"):
        return {"weights": "bf16", "master": "fp32", "gradients": "fp32", "reduction": "fp32", "compute": "bf16"}
    # fp32 weights are their own master copy: bf16 weights without one lose most updates at these rates.
    return {"weights": "fp32", "master": "fp32", "gradients": "fp32", "reduction": "fp32", "compute": "bf16 autocast"}
