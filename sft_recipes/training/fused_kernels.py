"""Replaces a model's RMSNorm, SwiGLU and RoPE by Liger's Triton kernels, once they are verified on this device.

https://github.com/linkedin/Liger-Kernel states +20% tokens/s for Llama 3 8B on 8 A100, with its fused loss, which TRL's
loss replaces here. Not measured in this project.
"""

import copy
import importlib.util
import sys
from typing import Any
from unittest import mock

import torch

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import SetupError

# Without the fused loss: TRL's kernel also computes logits at supervised positions only.
_KERNELS = {
    "rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": False,
}  # fmt: skip
_LENGTHS = (150, 1, 105)  # of the packed examples that kernels are verified on


def apply(plan: Plan, model: Any) -> str:
    """Replace the layers of a model where that is possible and correct; return what it uses, with the reason.

    Raises:
        SetupError: the recipe requires fused kernels, which are unavailable.
    """
    wanted, config = plan.sections.model.fused_kernels, model.config
    dtype = torch.bfloat16 if plan.dtypes["compute"] == "bf16" else torch.float32
    problem = "set by the recipe" if wanted is False else find_unsupported(plan, config)
    problem = problem or find_problem(type(model), config, "cuda", dtype)
    if problem is None:
        _replace_layers(model)
        return "RMSNorm, SwiGLU and RoPE of Liger (verified on this device)"
    if wanted is True:
        raise SetupError(f"model.fused_kernels: unavailable: {problem}. Set model.fused_kernels=auto")
    return f"none ({problem})"


def find_unsupported(plan: Plan, config: Any) -> str | None:
    """Return why a plan or model type has no fused kernels; None if it has."""
    if not plan.fused_kernels:
        return "they need a GPU and bf16"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return None if config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN else f"Liger has none for {config.model_type}"


def find_problem(model_class: Any, config: Any, device: str, dtype: torch.dtype) -> str | None:
    """Return why the kernels are unusable on this device, compared with float64; None if they are usable.

    A model of one layer, with random weights and packed examples, computes hidden states and gradients in float64, by
    transformers' layers, and by the kernels, whose errors may be three times those of transformers' layers.

    Args:
        dtype: of the weights; float32 is used under bf16 autocast.
    """
    config = _with_one_layer(config)
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    restored = mock.patch.dict(vars(sys.modules[model_class.__module__]))  # Liger also replaces RoPE and classes in it
    with restored, torch.random.fork_rng(devices), torch.device(device):
        torch.manual_seed(0)
        model = model_class(config).to(dtype)
        try:
            expected = _compute(copy.deepcopy(model).double(), device, autocast=False)
            plain = _relative_errors(_compute(model, device, dtype == torch.float32), expected)
            _replace_layers(model)
            fused = _relative_errors(_compute(model, device, dtype == torch.float32), expected)
        except (ImportError, RuntimeError, TypeError, AttributeError) as error:  # of Triton, or of another transformers
            return " ".join(str(error).split())[:120]
    wrong = {name: error for name, error in fused.items() if not error <= 3 * plain[name] + 1e-3}  # a NaN is wrong
    if not wrong:
        return None
    name = max(wrong, key=lambda name: wrong[name])
    return f"relative error of {name} {fused[name]:.0e}, {plain[name]:.0e} without"


def _replace_layers(model: Any) -> None:
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model, **_KERNELS)


def _with_one_layer(config: Any) -> Any:
    """Return the configuration of a model with the first layer and few tokens; the widths, which kernels depend on,
    stay."""
    config = copy.deepcopy(config)
    config.update({"num_hidden_layers": 1, "vocab_size": 64, "pad_token_id": None, "use_cache": False})
    config._attn_implementation = "eager"
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    return config


def _compute(model: Any, device: str, autocast: bool) -> dict[str, torch.Tensor]:
    """Return the last hidden states and the gradients of all weights of the decoder, on packed examples."""
    ids = torch.arange(sum(_LENGTHS), device=device)[None] % 64
    positions = torch.cat([torch.arange(length, device=device) for length in _LENGTHS])[None]
    model.zero_grad()
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        states = model.base_model(input_ids=ids, position_ids=positions).last_hidden_state
    (states * torch.linspace(-1, 1, states.numel(), device=device).view_as(states).to(states.dtype)).sum().backward()
    gradients = {name: weight.grad for name, weight in model.base_model.named_parameters()}
    return {"hidden states": states.detach(), **{name: grad for name, grad in gradients.items() if grad is not None}}


def _relative_errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the norm of each tensor's error over the norm of the expected tensor."""
    return {
        name: float((tensor.double() - expected[name]).norm() / expected[name].norm()) for name, tensor in found.items()
    }
