"""Dimensions of published models that no recipe has."""

from typing import Any

_LLAMA = {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True}


def llama(size: str) -> dict[str, Any]:
    """Return the architecture of Llama 3.2 1B or 3B."""
    sizes = {
        "1B": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64},
        "3B": {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128},
    }
    return {**_LLAMA, "intermediate_size": 8192, **sizes[size]}
