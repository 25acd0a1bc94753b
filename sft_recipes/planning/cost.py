"""Forecasts a run's time, GPU-hours and money from its arithmetic; stated assumptions, no measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sft_recipes.planning.environment import gpu_hour_price
from sft_recipes.planning.memory import linear_layers, parameter_count

# Dense bf16 arithmetic a second by the vendors' datasheets, without sparsity, in units of 1e12
# (pytorch/torchtitan, torchtitan/tools/utils.py; RTX 4090: Ada architecture paper, fp32 accumulation).
CARDS_TFLOPS: dict[str, float] = {
    "h100-80g": 989,
    "h200-141g": 989,
    "a100-80g": 312,
    "a100-40g": 312,
    "l40s-48g": 362,
    "rtx4090-24g": 165,
}

WRITE_BYTES_PER_SECOND = 2_000_000_000  # of one node to the disk of its runs; an assumption


def flops_per_token(architecture: Mapping[str, Any], tokens_per_example: float, frozen: bool) -> float | None:
    """Operations of forward and backward pass for one token.

    Six for each weight that is multiplied with (the embedding's look-up is not), four where the weights are frozen and
    no gradients of theirs are taken, and causal attention: half of 12 x layers x width x length of the example (PaLM,
    arXiv:2204.02311, appendix B, counts it whole). Recomputed activations are not counted: that is what MFU means.
    """
    parameters = parameter_count(architecture)
    if parameters is None:
        return None
    if not architecture.get("tie_word_embeddings"):
        parameters -= architecture["vocab_size"] * architecture["hidden_size"]
    width = linear_layers(architecture)["q_proj"][1]
    attention: float = 6 * architecture["num_hidden_layers"] * width * tokens_per_example
    return (4 if frozen else 6) * parameters + attention


def palm_flops_per_token(architecture: Mapping[str, Any], tokens_per_row: int) -> float | None:
    """6N + 12 x layers x width x length of the row: what most published MFU counts (PaLM, arXiv:2204.02311, appendix
    B). It counts the embedding's look-up and attention to tokens that a causal mask hides."""
    parameters = parameter_count(architecture)
    if parameters is None:
        return None
    width: int = linear_layers(architecture)["q_proj"][1]
    attention: float = 12 * architecture["num_hidden_layers"] * width * tokens_per_row
    return 6 * parameters + attention


def forward_share(frozen: bool) -> float:
    """The forward pass's share of the operations of forward and backward pass."""
    return 1 / 2 if frozen else 1 / 3


@dataclass(frozen=True)
class Work:
    """What a run does, in counts."""

    flops_per_token: float
    train_tokens: float
    evaluations: int
    tokens_per_evaluation: float
    saves: int
    bytes_per_save: int
    models: int
    bytes_per_model: int
    one_rank_saves: bool
    frozen: bool


def forecast(work: Work, card: str | None, gpus: int, nodes: int, mfu: float) -> dict[str, float | None] | None:
    """Seconds by part, GPU-hours and money; None where the card's arithmetic is not known.

    An evaluation is the forward pass alone, a third of the operations (half under frozen weights). A checkpoint is
    written by all nodes together where the ranks write shards of it, a model by one rank.

    Raises:
        RecipeError: GPU_HOUR_PRICE is no number.
    """
    price = gpu_hour_price()
    if card not in CARDS_TFLOPS or not gpus:
        return None
    per_second = gpus * CARDS_TFLOPS[card] * 1e12 * mfu
    training = work.train_tokens * work.flops_per_token / per_second
    forward = work.flops_per_token * forward_share(work.frozen)
    evaluating = work.evaluations * work.tokens_per_evaluation * forward / per_second
    saving = work.saves * work.bytes_per_save / (WRITE_BYTES_PER_SECOND * (1 if work.one_rank_saves else nodes))
    saving += work.models * work.bytes_per_model / WRITE_BYTES_PER_SECOND
    seconds = training + evaluating + saving
    gpu_hours = seconds * gpus / 3600
    return {
        "mfu": mfu,
        "training_seconds": round(training, 1),
        "evaluation_seconds": round(evaluating, 1),
        "saving_seconds": round(saving, 1),
        "seconds": round(seconds, 1),
        "overhead_share": round((evaluating + saving) / seconds, 4) if seconds else 0.0,
        "tokens_per_second_per_gpu": round(per_second / gpus / work.flops_per_token, 1),
        "gpu_hours": round(gpu_hours, 2),
        "money": None if price is None else round(gpu_hours * price, 2),
    }
