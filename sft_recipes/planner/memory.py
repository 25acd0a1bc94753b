"""Forecast memory and disk from the dimensions of an architecture, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sft_recipes.config.architecture import adapter_count, block_weights, linear_layers, parameter_count
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
class MemoryInputs:
    """Inputs of the memory forecast of a rank.

    Attributes:
        tokens: tokens per micro-batch, padding included.
        scores_of: attention scores kept per token and head: the row length under eager attention, else 0.
        accumulates: whether a step has several micro-batches.
        on_cpu: no GPU, whose kernels need less memory.
    """

    architecture: Mapping[str, Any]
    parallelism: str
    precision: str
    world_size: int
    tokens: int
    gradient_checkpointing: bool
    lora: Lora | None = None
    nodes: int = 1
    optimizer: str = "adamw_torch_fused"
    scores_of: int = 0
    accumulates: bool = True
    on_cpu: bool = False

    @property
    def strategy(self) -> Strategy:
        """The parallelism strategy."""
        return STRATEGIES[self.parallelism]

    @property
    def autocasts(self) -> bool:
        """Whether fp32 weights are cast to bf16 on use."""
        return self.precision == "bf16" and self.lora is None and self.strategy.replicated

    @property
    def gradient_width(self) -> int:
        """Bytes per element of a gradient in the backward pass."""
        return 2 if self.precision == "bf16" and not self.autocasts else 4

    @property
    def moments(self) -> int:
        """Bytes of Adam's two moments for all trained weights: fp32, or 8-bit with bitsandbytes' optimizers.

        8-bit: the scales of its blocks of 256 add under 4%; the Trainer keeps those of embeddings in fp32. Other
        optimizers are forecast as AdamW; most need less.
        """
        if "8bit" not in self.optimizer:
            return 8 * self.trained
        embedding = 0 if self.lora else self.architecture["vocab_size"] * self.architecture["hidden_size"]
        return 2 * self.trained + 6 * int(embedding)

    @property
    def weight_shards(self) -> int:
        """Number of shards of the weights."""
        return self.world_size if self.strategy.shards_parameters else 1

    @property
    def zero_half(self) -> bool:
        """Whether DeepSpeed keeps bf16 weights and fp32 master weights."""
        return self.strategy.deepspeed and self.precision == "bf16"

    @property
    def stream_half(self) -> bool:
        """Whether hidden states between layers are 16-bit; under autocast with fp32 weights they are fp32."""
        return self.precision == "bf16" and (not self.strategy.replicated or self.lora is not None)

    @property
    def trained(self) -> int:
        """Number of trained weights."""
        count = adapter_count(self.architecture, self.lora) if self.lora else parameter_count(self.architecture)
        assert count is not None
        return count

    @property
    def trained_bytes(self) -> int:
        """Bytes of the trained weights in their dtype, without master weights; the size of a saved model."""
        return self.trained * (2 if self.zero_half else 4)

    @property
    def model_bytes(self) -> int:
        """Bytes of the complete model in its dtypes, without adapters."""
        parameters = parameter_count(self.architecture)
        assert parameters is not None
        if self.lora and self.lora.quantize:
            linear = self.architecture["num_hidden_layers"] * block_weights(self.architecture)
            return int(linear * NF4_BYTES + (2 if self.precision == "bf16" else 4) * (parameters - linear))
        frozen_half = self.lora is not None and self.precision == "bf16"
        return parameters * (2 if self.zero_half or frozen_half else 4)


def bytes_per_gpu(load: MemoryInputs) -> dict[str, int] | None:
    """Estimate the peak memory of one rank by part, in bytes, in the phase of a step with the largest sum.

    `total` is that sum, `reserve` must stay free in addition. Weights, gradients and optimizer state have the dtypes of
    `dtypes`; AdamW's two moments are fp32 except in an 8-bit optimizer.
    Activations: what layers keep for their backward pass; with checkpointing, each layer's input and one full layer.
    Logits: loss computation, and temporary gradients of the embeddings.
    Buffers: DDP's gradient buckets; ZeRO's buckets for gradients and gathered weights; gathered layers or embeddings
    under ZeRO-3 and FSDP2; autocast's bf16 copies of the weights; a dequantized layer under QLoRA.
    Step: a flat copy of the gradients in ZeRO's optimizer step. Fused AdamW needs no copies.
    """
    if parameter_count(load.architecture) is None:
        return None
    optimizer_shards = load.world_size if load.strategy.shards_optimizer else 1
    adapters = load.trained_bytes if load.lora else 0
    constant = {
        "weights": (load.model_bytes + adapters) // load.weight_shards,
        "optimizer": 0
        if load.strategy.cpu_offload
        else (load.moments + 4 * load.zero_half * load.trained) // optimizer_shards,
        "buffers": _buffers(load),
    }
    peak = max(_phases(load), key=lambda phase: sum(phase.values()))
    parts = {name: constant.get(name, 0) + peak.get(name, 0) for name in PARTS}
    total = sum(parts.values())
    return {**parts, "total": total, "reserve": reserve_bytes(load, total)}


def reserve_bytes(load: MemoryInputs, total: int) -> int:
    """Return the GPU memory to leave free in addition to `total`: driver, CUDA context, NCCL, fragmentation; 0 on CPU.

    The constants above cite the source of each part.
    """
    if load.on_cpu:
        return 0
    return DRIVER_BYTES + CONTEXT_BYTES + (NCCL_BYTES if load.world_size > 1 else 0) + int(FRAGMENTATION * total)


@dataclass(frozen=True)
class _StepBytes:
    """Memory in the phases of a step, in bytes.

    Attributes:
        gradients: stored by this rank.
        before: stored when a backward pass begins. A plain optimizer and FSDP2 free them after each step, so a step of
            one micro-batch begins with none.
        layer: activations that one decoder layer saves for its backward pass.
        temporary: temporaries of the backward pass of a layer.
        saved: activations of all layers at the end of the forward pass.
        chunk: logits of one chunk (`_logits`), activations of the last norm, and the hidden states in the loss.
        scores: gradients of the loss computation (`_logits`).
        embedding: a gradient of the embeddings or the output layer from autograd; 0 if frozen.
        hidden_gradient: gradient of the last hidden states, fp32 in the top layer with adapters; without adapters it
            is freed before the peak of the phase.
    """

    gradients: int
    before: int
    layer: int
    temporary: int
    saved: int
    chunk: int
    scores: int
    embedding: int
    hidden_gradient: int


def _step_bytes(load: MemoryInputs) -> _StepBytes:
    architecture = load.architecture
    gradient_shards = load.world_size if load.strategy.shards_gradients else 1
    gradients = 0 if load.strategy.cpu_offload else 4 * load.trained // gradient_shards
    layer = load.tokens * activation_bytes(load)
    inputs = load.tokens * architecture["hidden_size"] * (2 if load.stream_half else 4)
    chunk, scores = _logits(load)
    # Its input, the normalized input, its output, and the scored positions of the output: 4 bytes each if the
    # hidden states are fp32; 2 bytes each if they are 16-bit, plus the input in fp32.
    last_norm = load.tokens * architecture["hidden_size"] * (12 if load.stream_half else 16)
    return _StepBytes(
        gradients=gradients,
        before=gradients if load.accumulates or load.strategy.deepspeed else 0,
        layer=layer,
        temporary=load.tokens * _backward_temporaries(load),
        saved=architecture["num_hidden_layers"] * (inputs if load.gradient_checkpointing else layer),
        chunk=chunk + last_norm,
        scores=scores,
        embedding=0 if load.lora else load.gradient_width * architecture["vocab_size"] * architecture["hidden_size"],
        hidden_gradient=4 * load.tokens * architecture["hidden_size"] if load.lora else 0,
    )


def _phases(load: MemoryInputs) -> list[dict[str, int]]:
    """Return the phases of a step that can be its peak, each with its bytes in addition to the constant parts."""
    step = _step_bytes(load)
    if load.strategy.fsdp:
        return _phases_of_fsdp2(load, step)
    architecture, recomputes = load.architecture, load.gradient_checkpointing
    casts, casts_of_a_layer = _casts(load)
    # With tied embeddings, the gradient of the output layer stays allocated until that of the embeddings exists.
    waiting = step.embedding if architecture.get("tie_word_embeddings") else 0
    last = 0 if step.before or load.lora else 4 * block_weights(architecture) + step.embedding
    flat = {2: step.gradients, 3: min(step.gradients, 4 * SUB_GROUP)}.get(load.strategy.zero_stage, 0)
    forward = {"gradients": step.before, "activations": step.saved, "logits": step.chunk, "buffers": casts}
    scoring = {**forward, "logits": step.chunk + step.scores, "buffers": 0 if recomputes else casts}
    top_layer = {
        "gradients": step.before,
        "activations": step.saved + step.temporary + (step.layer if recomputes else 0),
        "logits": (waiting if step.before else step.embedding) + step.hidden_gradient,
        "buffers": casts_of_a_layer if recomputes else casts,
    }
    bottom_layer = {
        "gradients": step.gradients - last,
        "activations": step.layer + step.temporary,
        "logits": waiting,
        "buffers": casts_of_a_layer,
    }
    embeddings = {"gradients": step.gradients, "logits": waiting + (step.embedding if step.before else 0)}
    optimizing = {"gradients": step.gradients, "step": flat}
    return [forward, scoring, top_layer, bottom_layer, embeddings, optimizing]


def _phases_of_fsdp2(load: MemoryInputs, step: _StepBytes) -> list[dict[str, int]]:
    """Return the phases of a step under FSDP2, with the bytes that each gathers and reduces.

    The units are accelerate's (1.15, utils/fsdp_utils.py, `fsdp2_prepare_model`): the embeddings, each decoder layer,
    and the last norm with the output layer, which stays gathered from the forward pass until its gradients are reduced.
    torch gathers the next unit during the computation of one, reduces gradients in fp32, and keeps the input of a
    reduction until the next one (torch 2.13, distributed/fsdp/_fully_shard/_fsdp_param_group.py, `post_backward`).
    """
    architecture, ranks = load.architecture, load.world_size
    width = 2 if load.precision == "bf16" else 4
    block, inputs = block_weights(architecture), architecture["hidden_size"]
    ends = architecture["vocab_size"] * inputs  # weights of the embeddings, or of the output layer
    untied = not architecture.get("tie_word_embeddings")
    reduced = 0 if load.lora else 4
    down = 0 if load.lora else width * architecture["intermediate_size"] * inputs  # the first gradient of a layer
    forward = {
        "gradients": step.before, "activations": step.saved, "logits": step.chunk, "buffers": 2 * width * ends
    }  # fmt: skip
    scoring = {**forward, "logits": step.chunk + step.scores, "buffers": width * (ends + block)}
    top_layer = {
        "gradients": max(step.before, reduced * ends // ranks),
        "activations": step.saved + step.temporary + (step.layer if load.gradient_checkpointing else 0),
        "logits": step.hidden_gradient,
        "buffers": 2 * width * block + reduced * ends,
    }
    but_last = step.gradients if step.before else step.gradients - reduced * (block + (ends if untied else 0)) // ranks
    next_unit = width * ends if untied and not load.lora else 0  # frozen embeddings are not gathered for a gradient
    bottom_layer = {
        "gradients": max(but_last, 0),
        "activations": step.layer + step.temporary,
        "buffers": width * block + next_unit + down + reduced * block,
    }
    own = 0 if load.lora else width
    bottom_reduction = {"gradients": max(but_last, 0), "buffers": next_unit + (own + reduced) * block}
    embeddings = {"gradients": step.gradients, "buffers": (own + reduced) * ends + (0 if untied else width * ends)}
    optimizing = {"gradients": step.gradients}
    return [forward, scoring, top_layer, bottom_layer, bottom_reduction, embeddings, optimizing]


def _logits(load: MemoryInputs) -> tuple[int, int]:
    """Return the bytes of the loss computation with all tokens in the loss: a chunk of logits, and its gradients.

    The chunk includes autocast's copy of the output weights. The gradients are fp32: of the hidden states and, unless
    frozen, of the output layer, which are then cast to its dtype.
    """
    hidden, vocabulary = load.architecture["hidden_size"], load.architecture["vocab_size"]
    width, columns = 2 if load.precision == "bf16" else 4, min(vocabulary, LOGIT_CHUNK[1])
    chunk = width * min(load.tokens, LOGIT_CHUNK[0]) * columns + (2 * columns * hidden if load.autocasts else 0)
    scores = 4 * load.tokens * hidden
    if load.on_cpu and load.precision == "bf16":  # only GPUs have 16-bit matmuls with 32-bit output
        scores += 4 * columns * hidden
    if load.lora is None:
        scores += (4 + (2 if load.gradient_width == 2 else 0)) * vocabulary * hidden
    return chunk, scores


def _casts(load: MemoryInputs) -> tuple[int, int]:
    """Return the bytes of autocast's bf16 copies of linear layers: of all, and of one decoder layer.

    The forward pass makes all; the backward pass needs one layer at a time. Embeddings are not cast.
    """
    if not load.autocasts:
        return 0, 0
    block = 2 * block_weights(load.architecture)
    return load.architecture["num_hidden_layers"] * block, block


def activation_bytes(load: MemoryInputs) -> int:
    """Return the bytes per token that one decoder layer keeps for its backward pass, without checkpointing.

    Counted from the tensors that autograd saves in transformers' layers (tests/unit/test_memory.py): the MLP's four
    inner ones, keys and values twice, and the hidden states in norms, projections and adapters. Fused
    attention keeps no scores; eager attention keeps them in fp32 and, in mixed precision, also in 16 bits.
    """
    architecture = load.architecture
    hidden, inner = architecture["hidden_size"], architecture["intermediate_size"]
    key_values = linear_layers(architecture)["k_proj"][1]
    extra = architecture["num_attention_heads"] * load.scores_of * (4 if load.precision == "fp32" else 6)
    if architecture.get("model_type") == "olmo2":  # norms of queries, keys and both outputs
        extra += (8 if load.lora else 20) * hidden
    if load.on_cpu:  # attention per example, then concatenated again
        extra += (4 if load.precision == "fp32" else 2) * hidden
    if load.precision == "fp32":
        return int((24 if load.lora else 32) * hidden + 16 * inner + 8 * key_values + extra)  # frozen norms keep less
    stream = 20 if load.stream_half else 30
    return int((stream + (5 if load.lora else 0)) * hidden + 8 * inner + 4 * key_values + extra)


def _backward_temporaries(load: MemoryInputs) -> int:
    """Return the bytes per token of temporaries in the backward pass of an MLP: gradients of its inner products.

    Adapters on the last product also keep an fp32 copy of its input.

    Measured like activations (the peak of a pass beyond saved activations), for MLPs at least 2.5 times as wide as the
    hidden states, and on fake tensors of the recipes' shapes (tests/strategies/test_step_memory.py).
    """
    hidden, inner = load.architecture["hidden_size"], load.architecture["intermediate_size"]
    if load.precision == "fp32":
        return int(8 * inner + 5 * hidden)
    return int((6 if load.lora else 4) * inner + 7.5 * hidden)


def _buffers(load: MemoryInputs) -> int:
    """Return the bytes of communication buffers and dequantized weights."""
    parameters, architecture = parameter_count(load.architecture), load.architecture
    assert parameters is not None
    half = load.precision == "bf16"
    largest: int = max(block_weights(architecture), architecture["vocab_size"] * architecture["hidden_size"])
    width = 2 if half else 4
    # DeepSpeed's gradient buckets have a fixed size, also for few trained weights: two in the staging dtype in stages
    # 1 and 2, one in the communication dtype in stage 3.
    if load.strategy.zero_stage in (1, 2):
        staged = 4 if load.strategy.zero_stage == 1 else width
        return width * min(parameters, ALLGATHER_BUCKET) + 2 * staged * REDUCE_BUCKET
    if load.strategy.zero_stage == 3:
        return 2 * width * largest + width * min(parameters, PREFETCH_BUCKET) + 4 * REDUCE_BUCKET
    if load.strategy.fsdp:
        # Gathers and reductions are counted per phase. On CPU gloo keeps copies of unsent data:
        # about four layers in real runs (docs/design/decisions.md: peaks of one small run were 208 to 273 MiB).
        return 4 * width * block_weights(architecture) if load.on_cpu else 0
    quantized = load.lora is not None and load.lora.quantize is not None
    dequantized: int = width * architecture["hidden_size"] * architecture["intermediate_size"] if quantized else 0
    return dequantized + (4 * load.trained if load.strategy.ddp else 0)


def host_bytes_per_node(load: MemoryInputs) -> dict[str, int] | None:
    """Estimate the host memory of one node by part, in bytes.

    Loading, as measured by benchmarks/loading.py: 16-bit weights are mapped from their files, or under ZeRO-3 sharded
    while reading; fp32 weights are copied by each rank until they are on its GPU, under FSDP2 too. Saving: rank 0 has
    the fp32 master weights under ZeRO, FSDP2 gathers the fp32 weights and the optimizer state. Offload: fp32 weights,
    two moments and gradients of the node's shards.
    """
    parameters = parameter_count(load.architecture)
    if parameters is None:
        return None
    ranks = max(load.world_size // load.nodes, 1)
    in_fp32 = not load.zero_half and (load.lora is None or load.precision == "fp32")
    loading = ranks * load.model_bytes if in_fp32 else 0
    saved = 4 * load.trained if load.zero_half else load.model_bytes if load.strategy.shards_parameters else 0
    gathered = 12 * load.trained if load.strategy.fsdp else saved
    parts = {
        "processes": ranks * PROCESS_BYTES,
        "loading or saving": max(loading, 0 if load.lora else gathered),
        "offload": 16 * load.trained // load.nodes if load.strategy.cpu_offload else 0,
    }
    return {**parts, "total": sum(parts.values())}


def checkpoint_bytes(load: MemoryInputs) -> int | None:
    """Return the bytes of a checkpoint: trained weights, master weights and moments.

    Weights are saved twice under ZeRO (16-bit: model files and DeepSpeed's state) and under FSDP2 (fp32).
    """
    if parameter_count(load.architecture) is None:
        return None
    twice = load.zero_half or load.strategy.fsdp
    copies = 2 if twice and not load.lora else 1
    return copies * load.trained_bytes + load.moments + 4 * load.zero_half * load.trained


def disk_bytes(load: MemoryInputs) -> int | None:
    """Return the maximum size of a run directory: two checkpoints, three best models, one of each being written, last/
    and final/.

    final/ counts like last/; it is half the size if the base model is 16-bit, which a plan does not read.
    """
    checkpoint = checkpoint_bytes(load)
    if checkpoint is None:
        return None
    return 3 * checkpoint + 5 * load.trained_bytes + 4 * load.trained  # last/ has the fp32 weights


def dtypes(parallelism: str, precision: str, lora: Lora | None = None) -> dict[str, str]:
    """Return the dtypes under this strategy; the run checks them.

    `weights` are trained; `frozen` are not, under LoRA. fp32 weights are the master weights themselves: bf16 weights
    without master weights lose most updates at these learning rates.
    """
    strategy = STRATEGIES[parallelism]
    compute = "fp32" if precision == "fp32" else "bf16 autocast" if strategy.replicated else "bf16"
    weights = "bf16" if strategy.deepspeed and precision == "bf16" else "fp32"
    frozen = {} if lora is None else {"frozen": lora.quantize or precision}
    return {
        "weights": weights, **frozen, "master": "fp32", "gradients": "fp32", "reduction": "fp32", "compute": compute
    }  # fmt: skip
