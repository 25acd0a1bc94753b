"""Looks at what torch finds on this machine, for `doctor`: GPUs, compiled operators, flash attention. Prints JSON."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sysconfig
from pathlib import Path
from typing import Any

# Of an element, in bf16, against fp32 by the definition. Two kernels that round at other places differ by about 4e-3 of
# values near 1 (bf16 has 8 bits); a wrong mask or scale is a hundred times that.
TOLERANCE = 3e-2


def look() -> dict[str, Any]:
    """What there is: torch's build, its GPUs, DeepSpeed's operators, and whether flash attention is right."""
    import torch

    return {
        "cuda": torch.version.cuda,
        "available": torch.cuda.is_available(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "operators": _operators(),
        "compiler": shutil.which("c++") is not None and Path(sysconfig.get_path("include"), "Python.h").is_file(),
        "flash_attention": _flash_attention() if torch.cuda.is_available() else None,
    }


def _flash_attention() -> dict[str, Any]:
    try:
        return flash_attention()
    except (ImportError, RuntimeError) as error:  # built for another torch, or for other GPUs
        return {"error": " ".join(str(error).split())[:200]}


def _gpu(index: int) -> dict[str, Any]:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    return {
        "name": torch.cuda.get_device_name(index), "capability": f"{major}.{minor}", "free": free, "total": total,
    }  # fmt: skip


def _operators() -> list[str]:
    """DeepSpeed's operators that were compiled when it was installed."""
    found = importlib.util.find_spec("deepspeed")
    if found is None or found.origin is None:
        return []
    return sorted(path.name.partition(".")[0] for path in Path(found.origin).parent.glob("ops/**/*_op*.so"))


def flash_attention(device: str = "cuda") -> dict[str, Any]:
    """The largest error of flash-attn's kernel, forward and backward, of causal attention with grouped heads over two
    packed examples, or why there is none."""
    if importlib.util.find_spec("flash_attn") is None:
        return {"missing": "flash_attn is not installed"}
    import torch
    from flash_attn import flash_attn_varlen_func

    lengths = (300, 212)
    ends = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=device)
    chance = torch.Generator(device=device).manual_seed(0)

    def inputs(heads: int) -> torch.Tensor:
        drawn = torch.randn(sum(lengths), heads, 64, generator=chance, device=device)
        return drawn.to(torch.bfloat16).requires_grad_()

    tensors = inputs(8), inputs(2), inputs(2)
    found = flash_attn_varlen_func(*tensors, ends, ends, max(lengths), max(lengths), causal=True)
    wanted = torch.cat([_by_definition(*part) for part in zip(*(one.split(lengths) for one in tensors), strict=True)])
    weights = torch.randn(found.shape, generator=chance, device=device)
    ours = torch.autograd.grad((found.float() * weights).sum(), tensors)
    theirs = torch.autograd.grad((wanted * weights).sum(), tensors)
    errors = [_error(*pair) for pair in ((found, wanted), *zip(ours, theirs, strict=True))]
    return {"forward": errors[0], "backward": max(errors[1:]), "tolerance": TOLERANCE}


def _by_definition(queries: Any, keys: Any, values: Any) -> Any:
    """Causal attention in fp32; tensors are (tokens, heads, width), and query heads share key heads in groups."""
    import torch

    groups = queries.shape[1] // keys.shape[1]
    query, key, value = (
        one.float().transpose(0, 1)
        for one in (queries, keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1))
    )
    scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value).transpose(0, 1)


def _error(found: Any, wanted: Any) -> float:
    """Relative to the largest value that is wanted."""
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())


if __name__ == "__main__":
    print(json.dumps(look()))
