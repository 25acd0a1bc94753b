"""Loads a tokenizer and says which of its tokens steer a model: ends of turn, marks, padding."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft_recipes.runtime.errors import DataError

# Padding tokens that well-known tokenizers hold without naming them as such.
_PADDING_TOKENS = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|endoftext|>", "<unk>")
_RESERVED = re.compile(r"<\|?(reserved|unused|extra_id|special_token)[^<>]*\|?>|\[unused\d+\]")
_MARK = re.compile(r"<.+>|\[.+\]")
# Elements that tokenizers such as Gemma's hold as added tokens; in a message they are what they are at inference.
_HTML = re.compile(
    r"</?(table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|s|sub|sup|code|p|br|li|ul|ol)>"
)
NEW_PADDING_TOKEN = "<|pad|>"


def load_tokenizer(
    name_or_path: str, chat_template: str | None, trust_remote_code: bool, add_tokens: Sequence[str] = ()
) -> Any:
    """The tokenizer with a chat template, and a padding token that is never the end of turn.

    Raises:
        DataError: it cannot be loaded, has no chat template and the recipe gives none, or cannot tell offsets.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except Exception as error:  # OSError, ValueError, Hub and tokenizer errors alike: it is not to be had
        raise DataError(
            f"model.name_or_path: the tokenizer of {name_or_path} cannot be loaded "
            f"({(str(error).splitlines() or [type(error).__name__])[0]}); name a "
            f"folder that holds it, or check the Hub name, the network and HF_TOKEN"
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
    if not tokenizer.chat_template:
        raise DataError(
            f"model.name_or_path: the tokenizer of {name_or_path} has no chat template (a base model?); say "
            f"model.chat_template=<a .jinja file>, or take the instruct model"
        )
    if not tokenizer.is_fast:
        raise DataError(
            f"model.name_or_path: the tokenizer of {name_or_path} is a slow one, which cannot tell where a token "
            f"stands; it needs a tokenizer.json"
        )
    if add_tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": [*add_tokens]}, replace_extra_special_tokens=False)
    _choose_padding(tokenizer)
    return tokenizer


def _read_template(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"model.chat_template: {file} cannot be read ({error})") from error


def new_tokens(tokenizer: Any, add_tokens: Sequence[str]) -> dict[str, int]:
    """Ids of the tokens that loading may have added: the recipe's, and a padding token."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (*add_tokens, NEW_PADDING_TOKEN)}
    return {token: id for token, id in ids.items() if id is not None and id != tokenizer.unk_token_id}


def _choose_padding(tokenizer: Any) -> None:
    """A padding token that neither ends a turn nor stands in the template: padding is masked out by its id in places,
    and a model whose end of turn is masked never learns to stop."""

    def taken(token: str) -> bool:
        return token == tokenizer.eos_token or token in str(tokenizer.chat_template)

    if tokenizer.pad_token is not None and not taken(tokenizer.pad_token):
        return
    vocabulary = tokenizer.get_vocab()
    known = [token for token in _PADDING_TOKENS if token in vocabulary]
    reserved = sorted(token for token in vocabulary if _RESERVED.fullmatch(token))
    free = next((token for token in (*known, *reserved) if not taken(token)), None)
    if free is None:
        tokenizer.add_special_tokens({"pad_token": NEW_PADDING_TOKEN})
    else:
        tokenizer.pad_token = free


def control_tokens(tokenizer: Any) -> tuple[set[str], set[str]]:
    """Texts of the special tokens, and of all tokens that steer a model: those, and added ones that look like marks
    or that the template writes. Added words, runs of spaces and HTML are ordinary text."""
    added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    specials = {text for text, special in added.items() if special} | set(tokenizer.all_special_tokens)
    specials -= {tokenizer.unk_token}  # what stands for text that it cannot write
    template = str(tokenizer.chat_template)
    marks = {
        text
        for text in added.keys() - {tokenizer.unk_token}
        if (_MARK.fullmatch(text) and not _HTML.fullmatch(text))
        or (text in template and len(text) > 1 and not text.replace(" ", "").isalnum())
    }
    return {text for text in specials if text.strip()}, {text for text in specials | marks if text.strip()}
