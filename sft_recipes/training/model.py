"""Loads the model, selects its attention, and fits its vocabulary and its stop tokens to the tokenizer."""

import logging
import operator
from pathlib import Path
from typing import Any

from sft_recipes.data.tokenizer import new_tokens
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import SetupError
from sft_recipes.training import attention, fused_kernels, lora, out_of_memory
from sft_recipes.training.attention import Choice

log = logging.getLogger(__name__)

# Embeddings are resized to a multiple of this: matrix products of odd sizes are slower on GPUs.
_PAD_TO_MULTIPLE_OF = 64


def build_model(plan: Plan, base: str, tokenizer: Any, details: dict[str, Any]) -> tuple[Any, Choice, list[int]]:
    """Load the base model and prepare it for the rows.

    Args:
        base: folder of the base model.
        details: counts from data preparation (`details.json`).

    Returns:
        The model, its attention implementation, and the token ids that end a completion.

    Raises:
        SetupError: the model cannot be loaded, or does not fit the rows or the recipe's attention.
    """
    model = load_model(plan, base)
    choice = attention.select(plan, model)
    if plan.uses_gpu:
        log.info("fused kernels: %s", fused_kernels.apply(plan, model))
    resize_embeddings(plan, model, tokenizer, details)
    return model, choice, set_stop_tokens(model, tokenizer, details)


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
            allow_all_kernels="/" in section.attention,  # the recipe names the kernel, with its commit
            output_loading_info=True,
            **lora.loading_arguments(plan),
        )
    except Exception as error:  # of any kind: the files may hold anything
        if isinstance(error, SetupError) or out_of_memory.is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        fix = "Set a folder written by save_pretrained, or a model on the Hub"
        raise SetupError(f"model.name_or_path: {name} cannot be loaded ({reason}). {fix}") from error
    if absent := [*loading["missing_keys"], *loading["mismatched_keys"]]:
        lacking = f"lack {absent[0]} and {len(absent) - 1} more, which would be random"
        raise SetupError(f"model.name_or_path: the weights of {name} {lacking}. Use a complete copy of the model")
    if section.name_or_path and not Path(section.name_or_path).is_dir():
        # Adapters record this as their base model: the name on the Hub, not the cache folder of this machine.
        model.name_or_path = model.config._name_or_path = section.name_or_path
    return model


def resize_embeddings(plan: Plan, model: Any, tokenizer: Any, details: dict[str, Any]) -> None:
    """Resize the model's embeddings for new tokens.

    Args:
        details: of the prepared rows (`details.json`).

    Raises:
        SetupError: the rows contain ids without an embedding that the recipe does not add.
    """
    embeddings = model.get_input_embeddings().num_embeddings
    largest = max(details["largest_token_id"], tokenizer.pad_token_id)
    if largest < embeddings:
        return
    new = new_tokens(tokenizer, plan.sections.model.add_tokens)
    if details["largest_known_token_id"] >= embeddings or largest not in new.values():
        raise SetupError(
            f"model.name_or_path: found token id {largest}, expected below {embeddings}. Use its tokenizer"
        )
    model.resize_token_embeddings(largest + 1, pad_to_multiple_of=_PAD_TO_MULTIPLE_OF)


def set_stop_tokens(model: Any, tokenizer: Any, details: dict[str, Any]) -> list[int]:
    """Add the data's end-of-turn tokens to the model's generation configuration, and return all stop ids.

    Transformers loads an invalid configuration and refuses to save it. Values for sampling without `do_sample` are the
    usual kind: they get it.

    Raises:
        SetupError: the configuration is invalid.
    """
    config = model.generation_config
    try:
        known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        ids = {*details["end_of_turn_ids"], *known} - {None}
        config.eos_token_id, config.pad_token_id = sorted(map(operator.index, ids)), tokenizer.pad_token_id
        try:
            config.validate(strict=True)
        except ValueError:
            config.do_sample = True
            config.validate(strict=True)
            log.info("note: generation_config.json has values for sampling without do_sample; do_sample: true is set")
    except Exception as error:  # also of values of another type
        reason = " ".join(str(error).split())[:200]
        raise SetupError(f"model.name_or_path: generation_config.json is invalid: {reason}. Correct it") from error
    return list(config.eos_token_id)
