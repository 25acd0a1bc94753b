"""Chooses what a model attends with, and attends within the examples of a packed row with what torch itself has.

Rows of several examples are laid end to end, [1, tokens], with the bounds of the examples beside them (`cu_seq_lens_q`,
as TRL's padding-free collator writes them), for every way that takes bounds: flash-attn, and `varlen` below. The others
make a mask of (row length) squared, and look at all of it.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import SetupError

FLASH, VARLEN, SDPA = "flash_attention_2", "varlen", "sdpa"

# Of an element, relative to the largest, against float64 by the definition. In bf16 two kernels that round at other
# places differ by about 4e-3 (8 bits), their gradients by 1e-2, in fp32 by 1e-6; a wrong mask or scale by 0.1 and more.
TOLERANCES = {torch.bfloat16: 3e-2, torch.float32: 1e-4}

# What configurations call it.
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")

# (queries, keys, values, bounds, longest, scale) -> attended; the first three and the last [tokens, heads, width].
Kernel = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Choice:
    """An attention by transformers' name, and why it is this one."""

    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"


def loaded_with(plan: Plan) -> str | None:
    """What a model is loaded with: what the recipe names; else transformers' choice, until `settle` has seen it."""
    asked: str = plan.sections.model.attention
    if asked == FLASH and importlib.util.find_spec("flash_attn") is None:
        # transformers would take a kernel from the Hub instead, which is code, where the package for it is installed.
        raise SetupError(
            "model.attention: flash_attention_2 needs flash-attn, which is not installed; make flash-attn installs it, "
            "or say model.attention=auto"
        )
    if "/" in asked and importlib.util.find_spec("kernels") is None:
        raise SetupError(
            f"model.attention: {asked} needs the kernels package, which is not installed; say model.attention=auto, or "
            f"install it into the virtual environment"
        )
    return None if asked in ("auto", VARLEN) else asked


def takes_bounds(way: str) -> bool:
    """Whether rows of several examples are laid end to end for it; kernels of the Hub are flash attention's kind."""
    return way in (FLASH, VARLEN) or "/" in way


def settle(plan: Plan, model: Any) -> Choice:
    """Has the loaded model attend with the fastest way that is right on this device, where the recipe says `auto`.

    Raises:
        SetupError: the recipe says `varlen`, and this model or device cannot.
    """
    asked = plan.sections.model.attention
    if asked not in ("auto", VARLEN):
        return Choice(asked, "as the recipe says")
    choice = _hindered(plan, model) or _fastest(plan, model)
    if asked == VARLEN != choice.name:
        raise SetupError(f"model.attention: varlen cannot be had here: {choice.why}; say model.attention=auto")
    model.set_attn_implementation(choice.name)
    return choice


def _hindered(plan: Plan, model: Any) -> Choice | None:
    """What transformers chose, masked attention, where the model wants what the ways that take bounds have not."""
    masked: str = model.config._attn_implementation
    text = model.config.get_text_config()
    window = text.sliding_window if getattr(text, "use_sliding_window", True) and hasattr(text, "sliding_window") else 0
    kinds = {*(getattr(text, "layer_types", None) or ["full_attention"])}
    reasons = {
        "transformers knows no other for it": masked != SDPA,
        "its code has an attention of its own": not model._supports_attention_backend,
        f"it attends in a window of {window} tokens": window and window < plan.max_length,
        f"it has layers of {' and '.join(sorted(kinds - {'full_attention'}))}": kinds
        - {"full_attention", "sliding_attention"},
        "it caps its scores": getattr(text, "attn_logit_softcapping", None),
        "it drops scores out": any(getattr(text, name, 0.0) for name in _DROPOUTS),
        "fp32 on a GPU has no flash kernel": plan.uses_gpu and plan.precision == "fp32",
    }
    return next((Choice(masked, why) for why, holds in reasons.items() if holds), None)


def _fastest(plan: Plan, model: Any) -> Choice:
    """The fastest way that is right for this plan's device and heads of this model's width."""
    text = model.config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    device, dtype = ("cuda", torch.bfloat16) if plan.uses_gpu else ("cpu", torch.float32)
    return fastest(device, dtype, width)


def fastest(device: str, dtype: torch.dtype, width: int = 64) -> Choice:
    """The first of the ways that take bounds that gives what attention is, on this device, for heads of this width."""
    ways = {FLASH: flash, VARLEN: varlen} if device == "cuda" else {VARLEN: varlen}
    passed_over = []
    for name, kernel in ways.items():
        why_not = wrong(kernel, device, dtype, width)
        if why_not is None:
            return Choice(name, "; ".join([*passed_over, "each example by itself, tried on this device"]))
        passed_over.append(f"no {name}: {why_not}")
    return Choice(SDPA, "; ".join(passed_over))


def wrong(kernel: Kernel, device: str, dtype: torch.dtype, width: int = 64) -> str | None:
    """Why a way cannot be taken on this device; None where it can."""
    try:
        found = errors(kernel, device, dtype, width)
    except ImportError as missing:
        return f"{missing.name or missing} is not installed"
    except (RuntimeError, TypeError) as failed:  # built for another torch, or for other GPUs
        return " ".join(str(failed).split())[:120]
    if all(error <= TOLERANCES[dtype] for error in found.values()):  # so written that a NaN is no pass
        return None
    return "it is off by " + ", ".join(f"{error:.0e} {where}" for where, error in found.items())


def flash(queries: Any, keys: Any, values: Any, bounds: Any, longest: int, scale: float | None = None) -> Any:
    """flash-attn's kernel (https://github.com/Dao-AILab/flash-attention), for CUDA in 16 bits."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        queries, keys, values, bounds, bounds, longest, longest, softmax_scale=scale, causal=True
    )


def varlen(queries: Any, keys: Any, values: Any, bounds: Any, longest: int, scale: float | None = None) -> Any:
    """torch's own, with nothing to install or compile: on CUDA its flash kernel for rows of several examples, on a CPU
    its causal kernel for each example. Grouped heads stay grouped.

    On a CPU the work is (example length) squared instead of (row length) squared: benchmarks/attention.py.
    """
    if queries.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        grouped = {"enable_gqa": True} if queries.shape[1] != keys.shape[1] and _is_told_of_groups(varlen_attn) else {}
        return varlen_attn(
            queries, keys, values, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0), **grouped
        )
    lengths = bounds.diff().tolist()
    parts = (one.transpose(0, 1)[None].split(lengths, 2) for one in (queries, keys, values))
    attended = [
        scaled_dot_product_attention(*part, is_causal=True, scale=scale, enable_gqa=True)
        for part in zip(*parts, strict=True)
    ]
    return torch.cat(attended, 2)[0].transpose(0, 1)


@functools.cache
def _is_told_of_groups(kernel: Kernel) -> bool:
    """Older versions group heads without being told, and do not know the word; asked once, not at every layer."""
    return "enable_gqa" in inspect.signature(kernel).parameters


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **named: Any,
) -> tuple[torch.Tensor, None]:
    """`varlen` as transformers calls an attention: tensors [1, heads, tokens, width]. Rows without bounds, such as
    those of an answer that is being generated, are left to torch's masked attention.

    Raises:
        RuntimeError: the model drops scores out, which `settle` was to see.
    """
    bounds = named.pop("cu_seq_lens_q", None)
    if named.get("dropout"):
        raise RuntimeError("varlen drops no scores out, and this model does; say model.attention=sdpa")
    if bounds is None:
        window, seen = named.get("sliding_window"), key.shape[2]
        if attention_mask is None and window and window < seen == query.shape[2]:
            at = torch.arange(seen, device=query.device)
            back = at[:, None] - at
            attention_mask = ((back >= 0) & (back < window))[None, None]
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **named)
    # Rotated queries and keys are fp32 under autocast; values have what the projections computed in.
    tensors = (one[0].transpose(0, 1).to(value.dtype) for one in (query, key, value))
    return varlen(*tensors, bounds, named["max_length_q"], scaling)[None], None


def _mask(attention_mask: torch.Tensor | None = None, **arguments: Any) -> torch.Tensor | None:
    """The mask that torch's masked attention wants where rows are padded, or go on behind what is cached; rows with
    bounds need none, and are as long as all that they see."""
    queries = arguments["q_length"] if "q_length" in arguments else len(arguments["cache_position"])
    if attention_mask is None and queries == arguments["kv_length"]:
        return None
    return sdpa_mask(attention_mask=attention_mask, **arguments)


AttentionInterface.register(VARLEN, _attend)
AttentionMaskInterface.register(VARLEN, _mask)


def errors(kernel: Kernel, device: str, dtype: torch.dtype, width: int = 64) -> dict[str, float]:
    """The largest errors of a way, forward and backward, on grouped heads over packed examples of several lengths.

    Raises:
        ImportError, RuntimeError, TypeError: the way cannot be had here.
    """
    lengths = (300, 1, 211)
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    chance = torch.Generator(device=device).manual_seed(0)

    def inputs(heads: int) -> torch.Tensor:
        drawn = torch.randn(sum(lengths), heads, width, generator=chance, device=device)
        return drawn.to(dtype).requires_grad_()

    tensors = inputs(8), inputs(2), inputs(2)
    found = kernel(*tensors, bounds, max(lengths), None)
    wanted = torch.cat([by_definition(*part) for part in zip(*(one.split(lengths) for one in tensors), strict=True)])
    weights = torch.randn(found.shape, generator=chance, device=device)
    ours = torch.autograd.grad((found.double() * weights).sum(), tensors)
    theirs = torch.autograd.grad((wanted * weights).sum(), tensors)
    return {
        "forward": relative_error(found, wanted),
        "backward": max(relative_error(*pair) for pair in zip(ours, theirs, strict=True)),
    }


def by_definition(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Causal attention in float64; tensors are [tokens, heads, width], query heads share key heads in groups."""
    groups = queries.shape[1] // keys.shape[1]
    query, key, value = (
        one.double().transpose(0, 1)
        for one in (queries, keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1))
    )
    scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value).transpose(0, 1)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of the element that is furthest off, relative to the largest value that is wanted; NaN where one is found."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).abs().max() / wanted.abs().max())
