"""Selects a model's attention implementation, and implements `varlen`: attention within packed examples by torch alone.

Implementations that take sequence boundaries (flash-attn, and `varlen` below) get rows concatenated to [1, tokens] with
`cu_seq_lens_q`, as TRL's padding-free collator writes it. The others build a mask of (row length) squared.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import attention as torch_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sft_recipes.data import model_layers
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import SetupError

FLASH, VARLEN, SDPA = "flash_attention_2", "varlen", "sdpa"

# Error of an element relative to the largest, against the definition in float64. In bf16 two kernels that round
# differently differ by about 4e-3 (8 bits), their gradients by 1e-2, in fp32 by 1e-6; a wrong mask or scale by 0.1.
TOLERANCES = {torch.bfloat16: 3e-2, torch.float32: 1e-4}

# (queries, keys, values, boundaries, longest, scale) -> output; the first three and the output [tokens, heads, width].
Kernel = Callable[..., torch.Tensor]


class Choice(NamedTuple):
    """An attention implementation by transformers' name, and the reason for it."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def implementation_to_load(plan: Plan) -> str | None:
    """Return the implementation to load the model with: the recipe's, or None for transformers' default until `select`.

    Raises:
        SetupError: the recipe's implementation is not installed. Without flash-attn transformers would download a
            kernel from the Hub, which is code.
    """
    name: str = plan.sections.model.attention
    package = "flash_attn" if name == FLASH else "kernels" if "/" in name else None
    if package and importlib.util.find_spec(package) is None:
        fix = "Install it (`make flash-attn` for flash_attn), or set model.attention=auto"
        raise SetupError(f"model.attention: {name} needs the package {package}, which is not installed. {fix}")
    return None if name in ("auto", VARLEN) else name


def takes_boundaries(name: str) -> bool:
    """Return whether an implementation takes sequence boundaries; kernels from the Hub are flash attention variants."""
    return name in (FLASH, VARLEN) or "/" in name


def select(plan: Plan, model: Any) -> Choice:
    """Set the recipe's attention implementation; for `auto` the fastest that is correct for this model and device.

    Raises:
        SetupError: the recipe sets `varlen`, which this model or device does not support.
    """
    name, masked = plan.sections.model.attention, model.config._attn_implementation
    if name not in ("auto", VARLEN):
        return Choice(name, "set by the recipe")
    if reason := model_layers.masked_attention_reason(plan, model.config, model, masked):
        choice = Choice(masked, reason)
    else:
        text = model.config.get_text_config()
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        device, dtype = ("cuda", torch.bfloat16) if plan.uses_gpu else ("cpu", torch.float32)
        choice = find_fastest(device, dtype, width)
    if name == VARLEN != choice.name:
        raise SetupError(f"model.attention: varlen is unavailable: {choice.reason}. Set model.attention=auto")
    model.set_attn_implementation(choice.name)
    return choice


def find_fastest(device: str, dtype: torch.dtype, width: int = 64) -> Choice:
    """Return the first implementation with boundaries that computes attention correctly, for heads of this width."""
    verified = "no cross-example attention; verified on this device"
    if device == "cuda" and importlib.util.find_spec("flash_attn_interface"):  # the package of FlashAttention-3
        if find_problem(flash_3, device, dtype, width) is None:
            return Choice(VARLEN, f"FlashAttention-3; {verified}")
        # Of another GPU than Hopper, or built for another torch.
        torch_attention.restore_flash_attention_impl(_raise_warn=False)
    kernels = {FLASH: flash, VARLEN: varlen} if device == "cuda" else {VARLEN: varlen}
    skipped = []
    for name, kernel in kernels.items():
        problem = find_problem(kernel, device, dtype, width)
        if problem is None:
            return Choice(name, "; ".join([*skipped, verified]))
        skipped.append(f"no {name}: {problem}")
    return Choice(SDPA, "; ".join(skipped))


def find_problem(kernel: Kernel, device: str, dtype: torch.dtype, width: int = 64) -> str | None:
    """Return why a kernel is unusable on this device; None if it is usable."""
    try:
        errors = measure_errors(kernel, device, dtype, width)
    except ImportError as missing:
        return f"{missing.name or missing} is not installed"
    except (RuntimeError, TypeError) as error:  # built for another torch, or for other GPUs
        return " ".join(str(error).split())[:120]
    if all(error <= TOLERANCES[dtype] for error in errors.values()):  # a NaN fails
        return None
    return "relative error " + ", ".join(f"{error:.0e} {direction}" for direction, error in errors.items())


def flash(queries: Any, keys: Any, values: Any, boundaries: Any, longest: int, scale: float | None = None) -> Any:
    """Run flash-attn's kernel (https://github.com/Dao-AILab/flash-attention), for CUDA in 16 bits."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        queries, keys, values, boundaries, boundaries, longest, longest, softmax_scale=scale, causal=True
    )


def flash_3(*arguments: Any) -> Any:
    """Run `varlen` with FlashAttention-3's kernels, for Hopper GPUs; they stay active in this process.

    Single-digit percentages of a step at 4k over FlashAttention-2 (arXiv:2407.08608); not measured in this project.
    """
    torch_attention.activate_flash_attention_impl("FA3")
    return varlen(*arguments)


def varlen(queries: Any, keys: Any, values: Any, boundaries: Any, longest: int, scale: float | None = None) -> Any:
    """Run torch's kernels, with nothing to install or compile: on CUDA its variable-length flash kernel, on a CPU its
    causal kernel for each example. Grouped heads stay grouped.

    On a CPU the work is (example length) squared instead of (row length) squared: benchmarks/attention.py.
    """
    if queries.is_cuda:
        return varlen_on_gpu(queries, keys, values, boundaries, longest, scale)
    return _attend_examples(queries, keys, values, boundaries, scale)


def varlen_on_gpu(queries: Any, keys: Any, values: Any, bounds: Any, longest: int, scale: float | None = None) -> Any:
    """Run torch's variable-length flash kernel; on fake tensors it needs no GPU (layer_trace.py)."""
    from torch.nn.attention.varlen import varlen_attn

    options = {"scale": scale, "window_size": (-1, 0), "enable_gqa": queries.shape[1] != keys.shape[1]}
    return varlen_attn(queries, keys, values, bounds, bounds, longest, longest, **options)


def _attend_examples(queries: Any, keys: Any, values: Any, boundaries: Any, scale: float | None) -> Any:
    parts = (tensor.transpose(0, 1)[None].split(boundaries.diff().tolist(), 2) for tensor in (queries, keys, values))
    attended = [
        scaled_dot_product_attention(*part, is_causal=True, scale=scale, enable_gqa=True)
        for part in zip(*parts, strict=True)
    ]
    return torch.cat(attended, 2)[0].transpose(0, 1)


def _attend(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float | None = None, **named: Any
) -> tuple[torch.Tensor, None]:
    """Run `varlen` with transformers' interface: tensors [1, heads, tokens, width]. Without sequence boundaries, as in
    generation, run torch's masked attention.

    Raises:
        RuntimeError: the model uses attention dropout, which `select` should have found.
    """
    boundaries = named.pop("cu_seq_lens_q", None)
    if named.get("dropout"):
        raise RuntimeError("model.attention: varlen has no attention dropout. Set model.attention=sdpa")
    if boundaries is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **named)
    # Rotated queries and keys are fp32 under autocast; values have the dtype of the projections.
    tensors = (tensor[0].transpose(0, 1).to(value.dtype) for tensor in (query, key, value))
    return varlen(*tensors, boundaries, named["max_length_q"], scaling)[None], None


def _mask(attention_mask: torch.Tensor | None = None, **arguments: Any) -> torch.Tensor | None:
    """Return the mask for torch's masked attention if rows are padded or continue a cache; rows with boundaries need
    none, and have as many queries as keys."""
    if attention_mask is None and arguments["q_length"] == arguments["kv_length"]:
        return None
    return sdpa_mask(attention_mask=attention_mask, **arguments)


AttentionInterface.register(VARLEN, _attend)
AttentionMaskInterface.register(VARLEN, _mask)


def measure_errors(kernel: Kernel, device: str, dtype: torch.dtype, width: int = 64) -> dict[str, float]:
    """Return the largest relative errors of a kernel, forward and backward, on grouped heads and packed examples.

    Raises:
        ImportError, RuntimeError, TypeError: the kernel does not run on this device.
    """
    lengths = (300, 1, 211)
    boundaries = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    generator = torch.Generator(device=device).manual_seed(0)

    def random_input(heads: int) -> torch.Tensor:
        values = torch.randn(sum(lengths), heads, width, generator=generator, device=device)
        return values.to(dtype).requires_grad_()

    tensors = random_input(8), random_input(2), random_input(2)
    output = kernel(*tensors, boundaries, max(lengths), None)
    with torch_attention.sdpa_kernel(torch_attention.SDPBackend.MATH):  # the definition of attention, in float64
        expected = _attend_examples(*(tensor.double() for tensor in tensors), boundaries, None)
    weights = torch.randn(output.shape, generator=generator, device=device)
    gradients = torch.autograd.grad((output.double() * weights).sum(), tensors)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), tensors)
    return {
        "forward": relative_error(output, expected),
        "backward": max(relative_error(*pair) for pair in zip(gradients, expected_gradients, strict=True)),
    }


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest absolute error relative to the largest expected value; NaN if the output has one."""
    output, expected = output.detach().double(), expected.detach().double()
    return float((output - expected).abs().max() / expected.abs().max())
