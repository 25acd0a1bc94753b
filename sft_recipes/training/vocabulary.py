"""Fits the model to the tokenizer: an embedding for every token, and the stop tokens for generation."""

from __future__ import annotations

import logging
import operator
from typing import Any

from sft_recipes.data.tokenizer import new_tokens
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import SetupError

log = logging.getLogger(__name__)

# Embeddings are resized to a multiple of this: matrix products of odd sizes are slower on GPUs.
_PAD_TO_MULTIPLE_OF = 64


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
            f"model.name_or_path: token ids: found up to {details['largest_known_token_id']} in the rows and padding "
            f"{tokenizer.pad_token_id}, expected less than the model's {embeddings} embeddings. Use its tokenizer"
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
        known = config.eos_token_id
        ids = {*details["end_of_turn_ids"], *(known if isinstance(known, list) else [] if known is None else [known])}
        config.eos_token_id, config.pad_token_id = sorted(map(operator.index, ids)), tokenizer.pad_token_id
        try:
            config.validate(strict=True)
        except ValueError:
            config.do_sample = True
            config.validate(strict=True)
            log.info("note: generation_config.json has values for sampling without do_sample; do_sample: true is set")
    except Exception as error:  # also of values of another type
        raise SetupError(
            f"model.name_or_path: generation_config.json is invalid: {' '.join(str(error).split())[:200]}. Correct it"
        ) from error
    return list(config.eos_token_id)
