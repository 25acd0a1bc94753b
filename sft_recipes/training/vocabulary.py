"""Makes model and tokenizer agree: an embedding for every token, and the ends of turn that generation stops at."""

from __future__ import annotations

from typing import Any

from sft_recipes.data.tokenizer import new_tokens
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import SetupError

# Embeddings grow to a multiple of this: matrix products over odd widths are slower on GPUs.
_MULTIPLE = 64


def fit(plan: Plan, model: Any, tokenizer: Any, details: dict[str, Any]) -> None:
    """Gives new tokens an embedding; refuses ids that neither the model knows nor the recipe adds.

    Args:
        details: of the prepared rows (`details.json`).

    Raises:
        SetupError: the rows hold ids that would end in an error of the device.
    """
    embeddings = model.get_input_embeddings().num_embeddings
    largest = max(details["largest_token_id"], tokenizer.pad_token_id)
    if largest < embeddings:
        return
    new = new_tokens(tokenizer, plan.sections.model.add_tokens)
    if details["largest_known_token_id"] >= embeddings or largest not in new.values():
        raise SetupError(
            f"model.name_or_path: the rows hold token ids up to {details['largest_known_token_id']} (padding is "
            f"{tokenizer.pad_token_id}), and the model has embeddings for {embeddings}; take the tokenizer of this "
            f"model"
        )
    model.resize_token_embeddings(largest + 1, pad_to_multiple_of=_MULTIPLE)


def stop_by_itself(model: Any, tokenizer: Any, details: dict[str, Any]) -> list[int]:
    """Names the ends of turn that the data holds in the model's generation configuration, so that `final/` stops."""
    ends = set(details["end_of_turn_ids"])
    known = model.generation_config.eos_token_id
    ends |= set(known if isinstance(known, list) else [] if known is None else [known])
    model.generation_config.eos_token_id = sorted(ends)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return sorted(ends)
