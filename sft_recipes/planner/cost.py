"""Forecast time, GPU-hours and cost of a run from its FLOPs; assumptions are stated, nothing is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft_recipes.config.gpu_types import find_gpu_type
from sft_recipes.planner.memory import MemoryInputs
from sft_recipes.runtime.env import gpu_hour_price

if TYPE_CHECKING:
    from sft_recipes.planner.plan import Plan

WRITE_BYTES_PER_SECOND = 2_000_000_000  # of one node to the disk of its runs; an assumption

# Assumptions of step times, not measured in this project.
LINK_SHARE = 0.8  # of a link's peak that a collective reaches
EXPOSED = 0.25  # share of communication that computation does not hide
LAUNCH_SECONDS = 0.001  # lower bound per layer and micro-batch, both passes: about 100 kernel launches
MICRO_BATCH_SECONDS = 0.01  # per micro-batch: its copy to the GPU, synchronization, casts of fp32 weights
CPU_ADAM_SECONDS = 0.25  # per billion weights of a node (ZeRO-Offload, arXiv:2101.06840)
PCIE_BYTES_PER_SECOND = 25e9  # between GPU and host memory under offload


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
    adapters = load.trained if load.lora else 0
    linear = 2.0 * sum(layer.active for layer in load.decoder)
    attention = 2.0 * sum(layer.queries * min(mean_length, layer.window or mean_length) for layer in load.decoder)
    logits = 2.0 * load.ends * supervised_share
    forward = linear + 2.0 * adapters + attention + logits
    backward = (1 if load.lora else 2) * (linear + logits) + 4.0 * adapters + 2 * attention
    recomputed = logits + attention / 2
    skipped = 0.0 if load.lora else 2.0 * sum(layer.last for layer in load.decoder)
    recomputed += load.recomputed / load.layers * (linear + 2.0 * adapters + attention - skipped)
    return Flops(forward, forward + backward, forward + backward + recomputed)


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step by part, an estimate; `total` hides communication behind computation."""

    compute: float
    communication: float
    overhead: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return max(self.compute + EXPOSED * self.communication, self.communication) + self.overhead


def step_time(plan: Plan, load: MemoryInputs) -> StepTime | None:
    """Estimate the seconds of an optimizer step; None without GPUs of a known type, and in fp32.

    Computation is hardware FLOPs / (peak x `plan.assumed_mfu`), an assumed share of peak FLOP/s as in published tables
    without recomputation: llm-foundry's are 40 to 46% for 1B to 13B on H100 at 2,048 tokens with activation
    checkpointing off (mosaicml/llm-foundry, scripts/train/benchmarking). Packed rows count as full. Before data
    preparation all tokens count as supervised, an upper bound.
    """
    gpu = find_gpu_type(plan.gpu_type)
    if gpu is None or not plan.uses_gpu or plan.precision != "bf16":
        return None
    tokens = plan.effective_batch_size / plan.world_size * row_tokens(plan)
    flops, mfu = flops_of(plan, load).hardware, plan.assumed_mfu
    # A ring crosses the network once per node, and NCCL makes one ring for each of its network cards.
    link = gpu.link_gbs if load.nodes == 1 else min(gpu.link_gbs, plan.network_gbs)
    launches = load.accumulation * load.layers * LAUNCH_SECONDS
    compute = max(tokens * flops / (gpu.peak_flops * mfu), launches)
    overhead = load.accumulation * MICRO_BATCH_SECONDS
    if load.strategy.cpu_offload:  # fp32 gradients of each micro-batch to the host, 16-bit weights back
        moved = (4 * load.accumulation + 2) * load.trained / load.world_size
        overhead += moved / PCIE_BYTES_PER_SECOND + CPU_ADAM_SECONDS * load.trained / load.nodes / 1e9
    between, within = communicated_bytes(load)
    communication = (between / link + within / gpu.link_gbs) / (LINK_SHARE * 1e9)
    return StepTime(compute, communication, overhead)


def communicated_bytes(load: MemoryInputs) -> tuple[float, float]:
    """Return the bytes that a rank sends per optimizer step in ring collectives, (ranks - 1) / ranks of each tensor:
    among all ranks, and within the node only.

    Gradients are reduced in fp32: once per step under DDP (all-reduce, twice the bytes) and ZeRO-1, for each
    micro-batch where they are sharded. ZeRO-1 and 2 gather updated weights once per step; ZeRO-3 and FSDP2 gather all
    weights for each forward and each backward pass (arXiv:1910.02054, section 7); with hierarchical partitioning those
    of backward passes come from the node (arXiv:2306.10209).
    """
    strategy, trained, width = load.strategy, load.trained, load.width
    reductions = load.accumulation if strategy.shards_gradients else 2 if strategy.ddp else 1
    gathered = 0.0
    if strategy.shards_parameters:
        gathered = 2.0 * load.accumulation * width * load.parameters
    elif strategy.shards_optimizer:
        gathered = width * trained
    within, of_node = gathered / 2 if load.hierarchical else 0.0, load.nodes / load.world_size
    between = 4 * reductions * trained + gathered - within
    return (1 - 1 / load.world_size) * between, (1 - of_node) * within


def mean_tokens(plan: Plan) -> int:
    """Return the mean length of an example, the longest if it is not known."""
    return min(plan.sections.data.mean_tokens or plan.max_length, plan.max_length)


def row_tokens(plan: Plan) -> int:
    """Return the tokens of a row of the trainer, padding excluded."""
    return plan.max_length if plan.packing else mean_tokens(plan)


def flops_of(plan: Plan, load: MemoryInputs) -> Flops:
    """Return the FLOPs per token of a plan."""
    return flops_per_token(load, mean_tokens(plan), plan.supervised_share or 1.0)


def palm_flops_per_token(load: MemoryInputs, tokens_per_row: int) -> float:
    """Return 6N + 12 x layers x width x row length, as in most published MFU (PaLM, arXiv:2204.02311, appendix B).

    It includes the embedding look-up and attention to tokens that the causal mask hides. Of experts, N has those that
    a token is routed to.
    """
    idle = sum(layer.weights - layer.active for layer in load.decoder)
    attention: float = 12 * sum(layer.queries for layer in load.decoder) * tokens_per_row
    return 6 * (load.parameters - idle) + attention


def forecast(plan: Plan, load: MemoryInputs) -> dict[str, Any] | None:
    """Return seconds by part, GPU-hours and cost of a plan whose steps are known.

    None without a step time, and without the number of validation examples. `mfu` and `hfu` of the result are
    comparable to the metrics of the run. Sharded checkpoints are written by all nodes together, a model by one rank.

    Raises:
        UserError: GPU_HOUR_PRICE is not a price.
    """
    price, step, data, trainer = gpu_hour_price(), step_time(plan, load), plan.sections.data, plan.sections.trainer
    held_out = data.overfit_rows or round((plan.examples or 0) * data.validation_fraction)
    validation = data.validation_examples if data.validation else held_out
    if data.max_eval_samples is not None:
        validation = min(data.max_eval_samples, validation or data.max_eval_samples)
    steps, saved = plan.optimizer_steps, plan.checkpoint_bytes
    if step is None or validation is None or not steps or not saved:
        return None
    flops, training = flops_of(plan, load), steps * step.total
    # Hardware FLOPs and tokens per second and GPU, communication included.
    executed = step.compute / step.total * plan.assumed_mfu
    tokens_per_second = plan.effective_batch_size / plan.world_size * row_tokens(plan) / step.total
    evaluations = math.ceil(steps / trainer["eval_steps"])
    evaluated_tokens = evaluations * validation * mean_tokens(plan) / plan.gpus
    evaluating = evaluated_tokens * flops.forward / flops.hardware / tokens_per_second
    writers = plan.nodes if plan.strategy.deepspeed else 1
    saving = math.ceil(steps / trainer["save_steps"]) * saved / (WRITE_BYTES_PER_SECOND * writers)
    # With a falling loss each evaluation saves a best model; then last/ and final/.
    saving += (evaluations + 2) * load.trained_bytes / WRITE_BYTES_PER_SECOND
    seconds = training + evaluating + saving
    gpu_hours = seconds * plan.gpus / 3600
    return {
        "hfu": round(executed, 4),
        "mfu": round(executed * flops.model / flops.hardware, 4),
        "training_seconds": round(training, 1),
        "evaluation_seconds": round(evaluating, 1),
        "saving_seconds": round(saving, 1),
        "seconds": round(seconds, 1),
        "overhead_share": round((evaluating + saving) / seconds, 4),
        "tokens_per_second_per_gpu": round(tokens_per_second, 1),
        "gpu_hours": round(gpu_hours, 2),
        "money": None if price is None else round(gpu_hours * price, 2),
    }
