"""Tokenized conversations, of which none may be rejected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sft_recipes.data.formats import Conversation
from sft_recipes.data.tokenize import IGNORED, ConversationTokenizer, Example


def tokenize_all(tokenizer: ConversationTokenizer, conversations: Sequence[Conversation]) -> list[Example]:
    """Return the examples of conversations, with their ids as lists.

    Raises:
        DataError: one is rejected.
    """
    examples = []
    for example in tokenizer.tokenize(conversations):
        if isinstance(example, Exception):
            raise example
        examples.append(replace(example, input_ids=example.input_ids.tolist()))
    return examples


def labels_of(example: Example) -> list[int]:
    """Return the token ids in the loss, IGNORED elsewhere."""
    labels = [IGNORED] * len(example.input_ids)
    for start, end in example.spans:
        labels[start:end] = example.input_ids[start:end]
    return labels
