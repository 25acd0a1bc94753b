"""Loads the model, selects its attention, and makes its vocabulary fit the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import SetupError
from sft_recipes.training import attention, lora, out_of_memory, vocabulary
from sft_recipes.training.attention import Choice


@dataclass(frozen=True)
class TrainableModel:
    """A loaded model, its attention implementation, and the token ids that end a completion."""

    model: Any
    attention: Choice
    end_of_turn_ids: list[int]


def build_model(plan: Plan, base: str, tokenizer: Any, details: dict[str, Any]) -> TrainableModel:
    """Load the base model and prepare it for the rows.

    Args:
        base: folder of the base model.
        details: counts from data preparation (`details.json`).

    Raises:
        SetupError: the model cannot be loaded, or does not fit the rows or the recipe's attention.
    """
    model = load_model(plan, base)
    choice = attention.select(plan, model)
    vocabulary.resize_embeddings(plan, model, tokenizer, details)
    return TrainableModel(model, choice, vocabulary.set_stop_tokens(model, tokenizer, details))


def load_model(plan: Plan, folder: str) -> Any:
    """Load the model in a local folder, in the plan's dtype for weights.

    Raises:
        SetupError: it cannot be loaded, or its files lack a weight.
    """
    from transformers import AutoModelForCausalLM

    section = plan.sections.model
    name = section.name_or_path or folder
    try:
        lora.check_quantizable(plan, Path(folder))
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=lora.loaded_dtype(plan),
            attn_implementation=attention.implementation_to_load(plan),
            quantization_config=lora.quantization_config(plan),
            trust_remote_code=section.trust_remote_code,
            allow_all_kernels="/" in section.attention,  # the recipe names the kernel, with its commit
            output_loading_info=True,
        )
    except SetupError:
        raise
    except Exception as error:  # of any kind: the files may hold anything
        if out_of_memory.is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SetupError(
            f"model.name_or_path: {name} cannot be loaded ({reason}). Set a folder written by save_pretrained, or a "
            f"model on the Hub of a type that the installed transformers supports"
        ) from error
    absent = [*loading["missing_keys"], *loading["mismatched_keys"]]
    if absent:
        raise SetupError(
            f"model.name_or_path: the weights of {name} lack {absent[0]} and {len(absent) - 1} more, which would be "
            f"random. Use a complete copy of the model"
        )
    if section.name_or_path and not Path(section.name_or_path).is_dir():
        # Adapters record this as their base model: the name on the Hub, not the cache folder of this machine.
        model.name_or_path = model.config._name_or_path = section.name_or_path
    return model
