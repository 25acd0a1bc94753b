"""Forecast memory and disk from the dimensions of an architecture, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sft_recipes.config.architecture import adapter_count, block_weights, find_trace, linear_layers, parameter_count
from sft_recipes.config.schema import Lora
from sft_recipes.config.strategies import STRATEGIES, Strategy
from sft_recipes.runtime.units import GIB

# The reserve: GPU memory that the forecast of a step does not cover. Published values, not measured in this project.
# The driver keeps the difference between nvidia-smi's total and CUDA's: 0.7 GiB of a B200 (183,359 MiB,
# and 178.35 GiB in pytorch/ao#4002), 0.5 of an H100, 0.8 of an A100.
DRIVER_BYTES = int(0.8 * GIB)
# A process's CUDA context is 426 MiB with torch 2.10 and CUDA 13 (unslothai/unsloth-zoo#1053); loaded kernels and
# cuBLAS workspaces (32 MiB per handle and stream on Hopper) are added.
CONTEXT_BYTES = int(0.6 * GIB)
# NCCL's buffers. On 8 H100 they and the context were 1.06 GB outside of PyTorch, with one communicator and without
# all-to-all (NVIDIA/nccl#1685); DeepSpeed makes a second communicator.
NCCL_BYTES = int(1.0 * GIB)
# Fragmentation of the caching allocator. With expandable segments, which the launcher enables, it remains between
# streams (verl-project/verl#3020); without them 10 to 60% were published (meta-pytorch/torchtune#1185,
# arXiv:2401.08156).
FRAGMENTATION = 0.05
# Traced forecasts with masked attention were 6 to 16% below steps on fake tensors, for an unknown reason
# (tests/strategies/test_step_memory.py).
MASKED_ERROR = 0.16

# The values in deepspeed_configs/, in elements; a test compares them.
ALLGATHER_BUCKET = REDUCE_BUCKET = 200_000_000
PREFETCH_BUCKET = 50_000_000
SUB_GROUP = 1_000_000_000  # DeepSpeed's default: elements per ZeRO-3 optimizer step

# The trainer computes logits in chunks, tokens x vocabulary (TRL 1.16, kernels/chunked_logprob.py, trainer/utils.py).
LOGIT_CHUNK = (4096, 32_768)
PROCESS_BYTES = 4 * GIB  # a rank's libraries, CUDA context and pinned batches in host memory; an estimate

# Parts of a rank's memory.
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "step")

# 4-bit NormalFloat: half a byte, and a quantized scale per 64 weights (arXiv:2305.14314, 0.127 bits per weight).
NF4_BYTES = 0.5 + 0.127 / 8


@dataclass(frozen=True)
class LayerCosts:
    """What one decoder layer needs, by closed form or by a trace (training/layer_trace.py).

    Attributes:
        weights: number of weights, which FSDP2 and ZeRO-3 gather together.
        linear: those of linear layers, which autocast casts and QLoRA quantizes; fused experts are not among them.
        active: those that a token is multiplied with: of the experts, the ones that it is routed to.
        largest: weights of the largest linear layer.
        last: weights of the last product, which activation checkpointing does not compute again.
        queries: width of attention's queries; 0 without attention.
        window: tokens that a token attends to at most; 0 is no limit.
        kept: bytes of a micro-batch kept for the backward pass.
        temporary: bytes that the backward pass of a micro-batch needs in addition, at its peak.
        first_gradient: weights with a gradient at that peak under FSDP2, if `temporary` does not include it.
    """

    weights: int
    linear: int
    active: int
    largest: int
    last: int
    queries: int
    window: int
    kept: int
    temporary: int
    first_gradient: int


@dataclass
class MemoryInputs:
    """Inputs of the memory forecast of a rank: a model whose dimensions are known (`parameter_count`), and a strategy.

    Attributes:
        tokens: tokens per micro-batch, padding included.
        row_length: tokens per row, where a traced layer keeps scores or a mask; 0 is one row.
        scores_of: attention scores kept per token and head: the row length under eager attention, else 0.
        gradient_checkpointing: whether layers are recomputed; a number n means every n-th layer.
        accumulation: micro-batches per optimizer step.
        on_cpu: no GPU, whose kernels need less memory.
        fused_kernels: Liger's RMSNorm, SwiGLU and RoPE.
        hierarchical: under ZeRO-3 every node also holds a copy of the weights, which backward passes gather within it
            (hpZ of ZeRO++, arXiv:2306.10209).
    """

    architecture: Mapping[str, Any]
    parallelism: str
    precision: str
    world_size: int
    tokens: int
    gradient_checkpointing: bool | int
    lora: Lora | None = None
    nodes: int = 1
    optimizer: str = "adamw_torch_fused"
    scores_of: int = 0
    accumulation: int = 2
    on_cpu: bool = False
    fused_kernels: bool = False
    hierarchical: bool = False
    row_length: int = 0

    def __post_init__(self) -> None:
        """Derive sizes: numbers of weights, and bytes."""
        architecture, lora, half = self.architecture, self.lora, self.precision == "bf16"
        parameters = parameter_count(architecture)
        assert parameters is not None, "dimensions are missing"
        trace = find_trace(architecture)
        dimensions = trace or architecture
        self.strategy: Strategy = STRATEGIES[self.parallelism]
        self.hidden: int = dimensions["hidden_size"]
        self.vocabulary: int = dimensions["vocab_size"]
        self.ends = self.vocabulary * self.hidden  # weights of the embeddings, or of the output layer
        self.tied = bool(trace["tied"] if trace else architecture.get("tie_word_embeddings"))
        self.parameters = parameters
        self.trained = (adapter_count(architecture, lora) or 0) if lora else parameters
        # fp32 weights are cast to bf16 on use.
        self.autocasts = half and lora is None and self.strategy.replicated
        # DeepSpeed has bf16 weights and fp32 master weights.
        self.zero_half = half and self.strategy.deepspeed
        # Bytes per element: in matrix products; of hidden states between layers and gradients in the backward pass.
        self.width = 2 if half else 4
        self.stream_width = 2 if half and not self.autocasts else 4
        # Trained weights in their dtype, the size of a saved model; master weights where they are others.
        self.trained_bytes = self.trained * (2 if self.zero_half else 4)
        self.master_bytes = 4 * self.trained if self.zero_half else 0
        # Adam's two moments: fp32, or 8-bit with bitsandbytes' optimizers, except those of embeddings, which the
        # Trainer keeps in fp32 (scales add under 4%). Other optimizers are forecast as AdamW; most need less.
        embeddings = 0 if lora else self.ends
        self.moments = 2 * self.trained + 6 * embeddings if "8bit" in self.optimizer else 8 * self.trained
        self.masks = 0  # bytes of the masks of traced attention, one per kind of attention
        # The decoder layers from bottom to top.
        self.decoder = _traced_layers(self, trace) if trace else _dense_layers(self)
        self.layers = len(self.decoder)
        self.block = max(layer.weights for layer in self.decoder)
        interval = int(self.gradient_checkpointing)
        self.kept_layers = [layer for index, layer in enumerate(self.decoder) if not interval or index % interval]
        self.recomputed = self.layers - len(self.kept_layers)  # layers 0, n, 2n, …
        # The complete model in its dtypes, without adapters.
        frozen_half = lora is not None and half
        self.model_bytes = parameters * (2 if self.zero_half or frozen_half else 4)
        if lora and lora.quantize:
            linear = sum(layer.linear for layer in self.decoder)
            self.model_bytes = int(linear * NF4_BYTES + self.width * (parameters - linear))


def _dense_layers(load: MemoryInputs) -> list[LayerCosts]:
    """Return the layers of a Llama-shaped decoder, which are all alike."""
    architecture, block = load.architecture, block_weights(load.architecture)
    largest = architecture["intermediate_size"] * load.hidden
    layer = LayerCosts(
        weights=block, linear=block, active=block, largest=largest, last=largest, first_gradient=largest, window=0,
        queries=linear_layers(architecture)["q_proj"][1], kept=load.tokens * activation_bytes(load),
        temporary=load.tokens * _backward_temporaries(load),
    )  # fmt: skip
    return [layer] * int(architecture["num_hidden_layers"])


def is_traced(architecture: Mapping[str, Any], precision: str, lora: Lora | None) -> bool:
    """Return whether forecasts have what they read of the layers, from a trace or the closed form."""
    trace = find_trace(architecture)
    return trace is None or set(trace_modes(precision, lora)) <= set(trace["modes"])


def trace_modes(precision: str, lora: Lora | None) -> list[str]:
    """Return the modes of a trace (training/layer_trace.py) that forecasts read.

    They are those of every strategy, with and without adapters, which are suggested for full fine-tuning. "bf16" has
    the FLOPs.
    """
    adapted = ["lora", *(["experts"] if lora and lora.experts else [])]
    if precision == "fp32":
        return ["fp32", "bf16", *(f"{mode} fp32" for mode in adapted)]
    return ["autocast", "bf16", "sharded", *adapted]


def _traced_layers(load: MemoryInputs, trace: Mapping[str, Any]) -> list[LayerCosts]:
    """Return the layers of a traced decoder, each of its kind."""
    row, fp32 = load.row_length or load.tokens, load.precision == "fp32"
    mode = "fp32" if fp32 else "autocast" if load.autocasts else "sharded" if load.strategy.fsdp else "bf16"
    if load.lora:
        adapted = "experts" if load.lora.experts and trace["expert_adapters"] else "lora"
        mode = f"{adapted} fp32" if fp32 else adapted
    kinds = []
    for kind in trace["kinds"]:
        masked = "varlen" not in kind["bytes"] or 0 < trace["window"] < row
        measured = kind["bytes"]["masked" if masked else "varlen"][mode]
        load.masks = load.tokens * row * len({each["window"] for each in trace["kinds"]}) if masked else 0
        kept, *peaks = (
            int(constant + load.tokens * (per_token + row * per_pair))
            for constant, per_token, per_pair in (measured["kept"], *measured["peak"])
        )
        numbers = {name: kind[name] for name in ("linear", "active", "largest", "queries", "window")}
        temporary = max(*peaks, kept) - kept
        costs = LayerCosts(kind["parameters"], **numbers, last=0, kept=kept, temporary=temporary, first_gradient=0)
        kinds.append(costs)
    return [kinds[index] for index in trace["layers"]]


def bytes_per_gpu(load: MemoryInputs) -> dict[str, int]:
    """Estimate the peak memory of one rank by part, in bytes, in the phase of a step with the largest sum.

    `total` is that sum, `reserve` must stay free in addition: driver, CUDA context, NCCL, fragmentation; 0 on CPU.
    Weights, gradients and optimizer state have the dtypes of `dtypes`; AdamW's two moments are fp32 except in an 8-bit
    optimizer.
    Activations: what layers keep for their backward pass; with checkpointing, each layer's input and one full layer.
    Logits: loss computation, and temporary gradients of the embeddings.
    Buffers: DDP's gradient buckets; ZeRO's buckets for gradients and gathered weights; gathered layers or embeddings
    under ZeRO-3 and FSDP2; autocast's bf16 copies of the weights; a dequantized layer under QLoRA.
    Step: a flat copy of the gradients in ZeRO's optimizer step. Fused AdamW needs no copies.
    """
    strategy = load.strategy
    weights = load.model_bytes + (load.trained_bytes if load.lora else 0)
    copy = load.width * load.parameters * load.nodes // load.world_size if load.hierarchical else 0
    optimizer = (load.moments + load.master_bytes) // (load.world_size if strategy.shards_optimizer else 1)
    constant = {
        "weights": weights // (load.world_size if strategy.shards_parameters else 1) + copy,
        "optimizer": 0 if strategy.cpu_offload else optimizer,
        "buffers": _buffers(load),
    }
    peak = max(_phases(load), key=lambda phase: sum(phase.values()))
    parts = {name: constant.get(name, 0) + peak.get(name, 0) for name in PARTS}
    total = sum(parts.values())
    share = FRAGMENTATION + (MASKED_ERROR if load.masks else 0)
    reserve = DRIVER_BYTES + CONTEXT_BYTES + (NCCL_BYTES if load.world_size > 1 else 0) + int(share * total)
    return {**parts, "total": total, "reserve": 0 if load.on_cpu else reserve}


def _phases(load: MemoryInputs) -> list[dict[str, int]]:
    """Return the phases of a step that can be its peak, each with its bytes in addition to the constant parts.

    Under FSDP2 the units are accelerate's (1.15, utils/fsdp_utils.py, `fsdp2_prepare_model`): the embeddings, each
    decoder layer, and the last norm with the output layer, which stays gathered from the forward pass until its
    gradients are reduced. torch gathers the next unit during the computation of one, reduces gradients in fp32, and
    keeps the input of a reduction until the next one (torch 2.13, distributed/fsdp/_fully_shard/_fsdp_param_group.py,
    `post_backward`).
    """
    strategy, lora, recomputed, width = load.strategy, load.lora, load.recomputed, load.width
    hidden, block, ends, ranks = load.hidden, load.block, load.ends, load.world_size
    shards = ranks if strategy.shards_gradients else 1
    gradients = 0 if strategy.cpu_offload else 4 * load.trained // shards
    # A plain optimizer and FSDP2 free gradients after each step: a step of one micro-batch begins with none.
    before = gradients if load.accumulation > 1 or strategy.deepspeed else 0
    heaviest = max(load.decoder, key=lambda layer: layer.kept + layer.temporary)
    layer, temporary = heaviest.kept, heaviest.temporary
    saved = recomputed * load.tokens * hidden * load.stream_width + sum(each.kept for each in load.kept_layers)
    saved += load.masks
    # If the top layer is kept, it is freed before the first layer is recomputed.
    top_recomputed = recomputed and (load.layers - 1) % int(load.gradient_checkpointing) == 0
    chunk, scores = _logits(load)
    # A gradient of the embeddings or the output layer from autograd. With tied embeddings, that of the output layer
    # stays allocated until that of the embeddings exists.
    embedding = 0 if lora else load.stream_width * ends
    waiting = embedding if load.tied else 0
    # The gradient of the last hidden states is fp32 with adapters; without, it is freed before the peak of the phase.
    states = 4 * load.tokens * hidden if lora else 0
    cast = 2 if load.autocasts else 0
    casts_of_a_layer = cast * heaviest.linear
    casts, kept_casts = (cast * sum(each.linear for each in layers) for layers in (load.decoder, load.kept_layers))
    last = 0 if before or lora else 4 * load.decoder[0].weights + embedding
    flat = {2: gradients, 3: min(gradients, 4 * SUB_GROUP)}.get(strategy.zero_stage, 0)
    forward = {"gradients": before, "activations": saved, "logits": chunk, "buffers": casts}
    scoring = forward | {"logits": chunk + scores, "buffers": kept_casts}
    top_layer = {
        "gradients": before,
        "activations": saved + temporary + (layer if top_recomputed else 0),
        "logits": (waiting if before else embedding) + states,
        "buffers": kept_casts + (casts_of_a_layer if recomputed else 0),
    }
    bottom_layer = {
        "gradients": gradients - last,
        "activations": layer + temporary,
        "logits": waiting,
        "buffers": casts_of_a_layer,
    }
    embeddings = {"gradients": gradients, "logits": waiting + (embedding if before else 0)}
    optimizing = {"gradients": gradients, "step": flat}
    if not strategy.fsdp:
        return [forward, scoring, top_layer, bottom_layer, embeddings, optimizing]
    reduced, own = (0, 0) if lora else (4, width)
    but_last = max(gradients if before else gradients - reduced * (block + (0 if load.tied else ends)) // ranks, 0)
    next_unit = 0 if load.tied or lora else width * ends  # frozen embeddings are not gathered for a gradient
    first_gradient = own * heaviest.first_gradient
    top_layer |= {
        "gradients": max(before, reduced * ends // ranks),
        "logits": states,
        "buffers": 2 * width * block + reduced * ends,
    }
    bottom_layer |= {
        "gradients": but_last,
        "logits": 0,
        "buffers": width * block + next_unit + first_gradient + reduced * block,
    }
    # Above the bottom layer the next unit is a layer.
    second_layer = bottom_layer | {
        "activations": layer + temporary + load.tokens * hidden * load.stream_width,
        "gradients": gradients if before else max(but_last - reduced * block // ranks, 0),
        "buffers": 2 * width * block + first_gradient + reduced * block,
    }
    return [
        forward | {"buffers": 2 * width * ends},
        scoring | {"buffers": width * (ends + block)},
        top_layer,
        second_layer,
        bottom_layer,
        {"gradients": but_last, "buffers": next_unit + (own + reduced) * block},  # reducing the bottom layer
        {"gradients": gradients, "buffers": (own + reduced) * ends + (width * ends if load.tied else 0)},
        optimizing,
    ]


def _logits(load: MemoryInputs) -> tuple[int, int]:
    """Return the bytes of the loss computation with all tokens in the loss: a chunk of logits with the activations of
    the last norm, and its gradients.

    The chunk includes autocast's copy of the output weights. The gradients are fp32: of the hidden states and, unless
    frozen, of the output layer, which are then cast to its dtype.
    """
    columns = min(load.vocabulary, LOGIT_CHUNK[1])
    chunk = load.width * min(load.tokens, LOGIT_CHUNK[0]) * columns
    chunk += 2 * columns * load.hidden if load.autocasts else 0
    # The norm's input, the normalized input, its output, and the scored positions of the output: 4 bytes each if the
    # hidden states are fp32; 2 bytes each if they are 16-bit, plus the input in fp32.
    chunk += load.tokens * load.hidden * (12 if load.stream_width == 2 else 16)
    scores = 4 * load.tokens * load.hidden
    if load.on_cpu and load.precision == "bf16":  # only GPUs have 16-bit matmuls with 32-bit output
        scores += 4 * columns * load.hidden
    if load.lora is None:
        scores += (4 + (2 if load.stream_width == 2 else 0)) * load.ends
    return chunk, scores


def activation_bytes(load: MemoryInputs) -> int:
    """Return the bytes per token that one decoder layer keeps for its backward pass, without checkpointing.

    Counted from the tensors that autograd saves in transformers' layers (tests/unit/test_memory.py): the MLP's four
    inner ones, keys and values twice, and the hidden states in norms, projections and adapters. Fused
    attention keeps no scores; eager attention keeps them in fp32 and, in mixed precision, also in 16 bits.
    """
    hidden, inner, fp32 = load.hidden, load.architecture["intermediate_size"], load.precision == "fp32"
    layers, kind = linear_layers(load.architecture), load.architecture.get("model_type")
    queries, key_values = layers["q_proj"][1], layers["k_proj"][1]
    extra = load.architecture["num_attention_heads"] * load.scores_of * (4 if fp32 else 6)
    # Queries and the output of attention, where they are wider than the hidden states.
    extra += (queries - hidden) * (8 if fp32 else 6 if load.lora else 4)
    if kind == "olmo2":  # norms of queries, keys and both outputs
        extra += (8 if load.lora else 20) * hidden
    if kind == "qwen3":  # norms of queries and keys
        extra += (queries + key_values) * (4 if load.lora else 8 if fp32 else 6)
    if load.fused_kernels:  # neither a product of the MLP nor normalized hidden states (tests/cuda_build)
        extra -= 2 * inner + (4 if load.lora else 12 if kind == "olmo2" else 8) * hidden
        extra -= (queries + key_values) * (2 if load.lora else 4) if kind == "qwen3" else 0
    if load.on_cpu:  # attention per example, then concatenated again
        extra += load.width * queries
    if fp32:
        return int((24 if load.lora else 32) * hidden + 16 * inner + 8 * key_values + extra)  # frozen norms keep less
    stream = 20 if load.stream_width == 2 else 30
    return int((stream + (5 if load.lora else 0)) * hidden + 8 * inner + 4 * key_values + extra)


def _backward_temporaries(load: MemoryInputs) -> int:
    """Return the bytes per token of temporaries in the backward pass of an MLP: gradients of its inner products.

    Adapters on the last product also keep an fp32 copy of its input.

    Measured like activations (the peak of a pass beyond saved activations), for MLPs at least 2.5 times as wide as the
    hidden states, and on fake tensors of the recipes' shapes (tests/strategies/test_step_memory.py).
    """
    inner = int(load.architecture["intermediate_size"])
    if load.precision == "fp32":
        return int(8 * inner + 5 * load.hidden)
    return int((6 if load.lora else 4) * inner + 7.5 * load.hidden)


def _buffers(load: MemoryInputs) -> int:
    """Return the bytes of communication buffers and dequantized weights."""
    strategy, width = load.strategy, load.width
    # DeepSpeed's gradient buckets have a fixed size, also for few trained weights: two in the staging dtype in stages
    # 1 and 2, one in the communication dtype in stage 3.
    if strategy.zero_stage in (1, 2):
        staged = 4 if strategy.zero_stage == 1 else width
        return int(width * min(load.parameters, ALLGATHER_BUCKET) + 2 * staged * REDUCE_BUCKET)
    if strategy.zero_stage == 3:
        gathered: int = 2 * max(load.block, load.ends) + min(load.parameters, PREFETCH_BUCKET)
        gathered += load.trained if load.lora else 0  # adapters are below the threshold
        return width * gathered + 4 * REDUCE_BUCKET
    if strategy.fsdp:
        # Gathers and reductions are counted per phase. On CPU gloo keeps copies of unsent data:
        # about four layers in real runs (docs/design/decisions.md: peaks of one small run were 208 to 273 MiB).
        return 4 * width * load.block if load.on_cpu else 0
    quantized = load.lora is not None and load.lora.quantize
    dequantized = width * max(layer.largest for layer in load.decoder) if quantized else 0
    return dequantized + (4 * load.trained if strategy.ddp else 0)


def zero3_sizes(load: MemoryInputs) -> dict[str, int]:
    """Return DeepSpeed's values that depend on the model; empty except under ZeRO-3.

    The threshold, in elements, below which every rank keeps a weight: vectors, with transformers' formula (its
    DeepSpeed integration, "auto"), and adapters, whose collectives would be bound by latency. Not measured on a GPU.
    """
    if load.strategy.zero_stage != 3:
        return {}
    width = max(load.hidden, load.architecture.get("intermediate_size") or 0)
    adapters = load.lora.r * width + 1 if load.lora else 0
    return {
        "stage3_param_persistence_threshold": max(10 * load.hidden, adapters),
        **({"zero_hpz_partition_size": load.world_size // load.nodes} if load.hierarchical else {}),
    }


def host_bytes_per_node(load: MemoryInputs) -> dict[str, int]:
    """Estimate the host memory of one node by part, in bytes.

    Loading, as measured by benchmarks/loading.py: 16-bit weights are mapped from their files, or under ZeRO-3 sharded
    while reading; fp32 weights are copied by each rank until they are on its GPU, under FSDP2 too. Saving: sharded
    weights are gathered, under FSDP2 the optimizer state too; under ZeRO-1 and 2 each rank copies its weights
    (accelerate's `get_state_dict`), and rank 0 has the fp32 master weights for `last/`. Offload: fp32 weights, two
    moments and gradients of the node's shards.
    """
    strategy, ranks = load.strategy, max(load.world_size // load.nodes, 1)
    in_fp32 = not load.zero_half and (load.lora is None or load.precision == "fp32")
    copies = 1 if strategy.shards_parameters else ranks if load.zero_half else 0
    gathered = 12 * load.trained if strategy.fsdp else max(copies * load.model_bytes, load.master_bytes)
    parts = {
        "processes": ranks * PROCESS_BYTES,
        "loading or saving": max(ranks * load.model_bytes if in_fp32 else 0, 0 if load.lora else gathered),
        "offload": 16 * load.trained // load.nodes if strategy.cpu_offload else 0,
    }
    return {**parts, "total": sum(parts.values())}


def checkpoint_bytes(load: MemoryInputs) -> int:
    """Return the bytes of a checkpoint: trained weights, master weights and moments.

    Weights are saved twice under ZeRO (16-bit: model files and DeepSpeed's state) and under FSDP2 (fp32).
    """
    twice = (load.zero_half or load.strategy.fsdp) and not load.lora
    return (2 if twice else 1) * load.trained_bytes + load.moments + load.master_bytes


def disk_bytes(load: MemoryInputs) -> int:
    """Return the maximum size of a run directory: two checkpoints, three best models, one of each being written, last/
    and final/.

    final/ counts like last/; it is half the size if the base model is 16-bit, which a plan does not read.
    """
    return 3 * checkpoint_bytes(load) + 5 * load.trained_bytes + 4 * load.trained  # last/ has the fp32 weights


def dtypes(parallelism: str, precision: str, lora: Lora | None = None) -> dict[str, str]:
    """Return the dtypes under this strategy; the run checks them.

    `weights` are trained; `frozen` are not, under LoRA. fp32 weights are the master weights themselves: bf16 weights
    without master weights lose most updates at these learning rates.
    """
    strategy = STRATEGIES[parallelism]
    found = {"weights": "bf16" if strategy.deepspeed and precision == "bf16" else "fp32"}
    found |= {"frozen": lora.quantize or precision} if lora else {}
    found |= dict.fromkeys(("master", "gradients", "reduction"), "fp32")
    return found | {"compute": "bf16 autocast" if strategy.replicated and precision == "bf16" else precision}
