"""Builds a from-scratch model: random weights, and a tokenizer trained on the recipe's rows.

The tokenizer is byte-level and has the architecture's vocabulary size, so the model accepts any text.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sft_recipes.runtime.errors import DataError

END_OF_TEXT, START, END, PADDING = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"

# ChatML, which many open models use.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build(architecture: Mapping[str, Any], texts: Iterable[str], folder: Path, seed: int) -> None:
    """Write config, weights and tokenizer to `folder`, for `from_pretrained`.

    Raises:
        DataError: the architecture has an unknown model type, or values that it rejects.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = train_tokenizer(texts, architecture["vocab_size"])
    settings = {key: value for key, value in architecture.items() if key != "model_type"}
    tokens = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    try:
        torch.manual_seed(seed)
        config = AutoConfig.for_model(architecture["model_type"], **settings, **tokens)
        model = AutoModelForCausalLM.from_config(config)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"model.architecture: no model can be built: {error}") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> Any:
    """Train a byte-level BPE tokenizer of at most `vocabulary_size` tokens, with ChatML's special tokens and template.

    Each digit is a token, as in most open models' tokenizers.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    special = [END_OF_TEXT, START, END, PADDING]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, special_tokens=special, initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PADDING, additional_special_tokens=[START, END_OF_TEXT]
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped
