"""Tokenized conversations, of which none may be rejected."""

from __future__ import annotations

from collections.abc import Sequence

from sft_recipes.data.formats import Conversation
from sft_recipes.data.tokenize import ConversationTokenizer, Example


def tokenize_all(tokenizer: ConversationTokenizer, conversations: Sequence[Conversation]) -> list[Example]:
    """Return the examples of conversations.

    Raises:
        DataError: one is rejected.
    """
    examples = []
    for example in tokenizer.tokenize(conversations):
        if isinstance(example, Exception):
            raise example
        examples.append(example)
    return examples
