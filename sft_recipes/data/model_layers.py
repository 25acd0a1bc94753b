"""Reads from a model's configuration what its layers ask of the rows: packed or not, and how long."""

import inspect
import re
from pathlib import Path
from typing import Any

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import DataError

# Layers that pass a state or a convolution from token to token, by their names in transformers' `layer_types`.
WITH_STATE = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}

# Names of attention dropout in model configurations.
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")


def load_config(folder: Path, trust_remote_code: bool) -> Any:
    """Return a model's configuration; None if its folder has none, or none that transformers can read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception:  # of any kind: the file may hold anything; loading the model reports it
        return None


def build_on_meta(config: Any, trust_remote_code: bool) -> Any:
    """Build a model without memory for its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def find_leak(plan: Plan, config: Any) -> str | None:
    """Describe what one packed example would pass on to the next in this model; None if nothing is known to.

    The run checks the loaded model too (training/packing_isolation.py).
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ())
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if with_state := sorted(kinds & WITH_STATE):
        return f"layers of type {' and '.join(with_state)} carry state from one packed example into the next"
    if not kinds and getattr(model, "_is_stateful", False):
        return "recurrent layers carry state from one packed example into the next"
    name = plan.sections.model.attention
    if model is None or name == "flash_attention_2" or "/" in name or not _masks_ignore_positions(model):
        return None
    reason = f"model.attention={name}" if name in ("eager", "sdpa") else masked_attention_reason(plan, config, model)
    return reason and f"the attention mask of {model.__name__} ignores the bounds of packed examples ({reason})"


def _masks_ignore_positions(model: type) -> bool:
    """Return whether a model's code makes a mask without `position_ids`, by which transformers separates examples."""
    code = Path(inspect.getfile(model)).read_text(encoding="utf-8")
    arguments = re.findall(r"(?:mask_kwargs = \{|causal_mask\()([^(){}]*)[)}]", code)
    return any("attention_mask" in text and "position_ids" not in text for text in arguments)


def masked_attention_reason(plan: Plan, config: Any, model: Any, implementation: str = "") -> str | None:
    """Return why a model needs transformers' masked attention, which takes no sequence boundaries; None if it does not.

    Args:
        model: the model or its class.
        implementation: transformers' default for the loaded model.
    """
    implementation = implementation or ("sdpa" if model._supports_sdpa else "eager")
    text = config.get_text_config()
    window = text.sliding_window if getattr(text, "use_sliding_window", True) and hasattr(text, "sliding_window") else 0
    others = {*(getattr(text, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    reasons = {
        "transformers supports no other for this model": implementation != "sdpa",
        "its code implements attention itself": not model._supports_attention_backend,
        f"sliding window of {window} tokens": window and window < plan.max_length,
        f"layers of type {' and '.join(sorted(others))}": others,
        "logit soft-capping": getattr(text, "attn_logit_softcapping", None),
        "attention dropout": any(getattr(text, name, 0.0) for name in _DROPOUTS),
        "no flash kernel for fp32 on a GPU": plan.uses_gpu and plan.precision == "fp32",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def check_positions(plan: Plan, config: Any) -> list[str]:
    """Return a note if `trainer.max_length` exceeds the positions that the model was trained for.

    Raises:
        DataError: the model has a table of positions, which ends there.
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or 0
    if not isinstance(positions, int) or not 0 < positions < plan.max_length:
        return []
    if getattr(text, "rope_parameters", None):
        factor = f"{plan.max_length / positions:.3g} times the {positions:,} positions of the model (RoPE)"
        return [f"trainer.max_length={plan.max_length} is {factor}: quality beyond them is not known"]
    if _has_position_table(plan, config, positions):
        found = f"found {plan.max_length}, expected {positions} or less (the model's table of positions)"
        raise DataError(f"trainer.max_length: {found}. Set trainer.max_length={positions}")
    return []


def _has_position_table(plan: Plan, config: Any, positions: int) -> bool:
    """Return whether the model has a table with a row per position; some have up to two rows more, for padding."""
    model = build_on_meta(config, plan.sections.model.trust_remote_code)
    tokens = model.get_input_embeddings().weight
    tables = (table for table in (*model.parameters(), *model.buffers()) if table is not tokens and table.ndim == 2)
    return any(positions <= len(table) <= positions + 2 for table in tables)
