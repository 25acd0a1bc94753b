"""Loads a tokenizer from its `tokenizer.json`, chooses its padding token and lists its special tokens."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft_recipes.runtime.errors import DataError

# Padding tokens that well-known tokenizers have without naming them as such.
_PADDING_TOKENS = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|endoftext|>", "<unk>")
_RESERVED = re.compile(r"<\|?(reserved|unused|extra_id|special_token)[^<>]*\|?>|\[unused\d+\]")
_MARKUP = re.compile(r"<.+>|\[.+\]")
# HTML elements that tokenizers such as Gemma's have as added tokens. In a message they are the same at inference.
_HTML = re.compile(
    r"</?(table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|s|sub|sup|code|p|br|li|ul|ol)>"
)
NEW_PADDING_TOKEN = "<|pad|>"
# Other vocabularies that Transformers converts for any class.
_VOCABULARIES = ("tokenizer.model", "tiktoken.model")
# Transformers' name for its correction of the pre-tokenizer of Mistral's tokenizers.
FIX_MISTRAL_REGEX = "fix_mistral_regex"


def load_tokenizer(
    name_or_path: str, chat_template: str | None, trust_remote_code: bool, add_tokens: Sequence[str] = ()
) -> Any:
    """Load a tokenizer with a chat template and a padding token that is not the end of turn.

    Raises:
        DataError: it cannot be loaded, has no chat template and the recipe gives none, or reports no offsets.
    """
    place = f"model.name_or_path: tokenizer of {name_or_path}"
    try:
        tokenizer = _load_from_files(Path(name_or_path), trust_remote_code)
        if chat_template is not None:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    except Exception as error:  # OSError, ValueError, errors of the Hub and of the tokenizer
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        fix = "Check model.chat_template; if it lacks tokenizer.json, `pip install sentencepiece protobuf tiktoken`"
        raise DataError(f"{place}: not loadable ({reason}). {fix}") from error
    if not tokenizer.chat_template:
        raise DataError(f"{place}: found no chat template. Set model.chat_template=FILE, or use an instruct model")
    if not tokenizer.is_fast:
        raise DataError(f"{place}: found a slow tokenizer, expected a fast one, which reports token offsets")
    if add_tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": [*add_tokens]}, replace_extra_special_tokens=False)
    _set_padding_token(tokenizer)
    return tokenizer


def _load_from_files(folder: Path, trust_remote_code: bool) -> Any:
    """Load a tokenizer that gives the ids of its `tokenizer.json`.

    Transformers 5 builds many tokenizers from their class and ignores the normalizer and pre-tokenizer in the file
    (`TokenizersBackend.convert_to_native_format`). Its correction of Mistral's regex is applied where it applies: not
    to a vocabulary with numbers of several digits, which Mistral's regex never merges.
    """
    from transformers import AutoTokenizer, TokenizersBackend

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if not type(tokenizer).__module__.startswith("transformers."):
        return tokenizer  # its own code decides
    if not (folder / "tokenizer.json").is_file():
        files = {name for key, name in tokenizer.vocab_files_names.items() if key != "tokenizer_file"}
        has_files = bool(files) and all((folder / name).is_file() for name in files)
        if not has_files and not any((folder / name).is_file() for name in _VOCABULARIES):
            raise ValueError("it has no vocabulary, and the class of the tokenizer would have an empty one")
        return tokenizer
    class_tokens: dict[str, Any] = tokenizer.special_tokens_map  # a class has some that no file names
    announced = getattr(getattr(tokenizer, "backend_tokenizer", None), FIX_MISTRAL_REGEX, None) is False
    decided = FIX_MISTRAL_REGEX in tokenizer.init_kwargs
    fix: dict[str, Any] = {FIX_MISTRAL_REGEX: "10" not in tokenizer.get_vocab()} if announced and not decided else {}
    if type(tokenizer) is not TokenizersBackend or fix:
        tokenizer = TokenizersBackend.from_pretrained(folder, **class_tokens, **fix)
    return tokenizer


def new_tokens(tokenizer: Any, add_tokens: Sequence[str]) -> dict[str, int]:
    """Return the ids of the tokens that `load_tokenizer` may have added: the recipe's, and a padding token."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (*add_tokens, NEW_PADDING_TOKEN)}
    return {token: id for token, id in ids.items() if id is not None and id != tokenizer.unk_token_id}


def _set_padding_token(tokenizer: Any) -> None:
    """Set a padding token that neither ends a turn nor is in the template.

    Some code masks padding by its id, and a model whose end of turn is masked never learns to stop.
    """

    def is_used(token: str) -> bool:
        return token == tokenizer.eos_token or token in str(tokenizer.chat_template)

    if tokenizer.pad_token is not None and not is_used(tokenizer.pad_token):
        return
    vocabulary = tokenizer.get_vocab()
    known = [token for token in _PADDING_TOKENS if token in vocabulary]
    reserved = sorted(token for token in vocabulary if _RESERVED.fullmatch(token))
    free = next((token for token in (*known, *reserved) if not is_used(token)), None)
    if free is None:
        tokenizer.add_special_tokens({"pad_token": NEW_PADDING_TOKEN})
    else:
        tokenizer.pad_token = free


def special_tokens(tokenizer: Any) -> tuple[set[str], set[str]]:
    """Return the texts of the tokens registered as special, and of all tokens that act as special ones.

    The latter include added tokens that look like markup or that the template writes. Other added tokens (words,
    runs of spaces, HTML) are ordinary text.
    """
    added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    registered = {text for text, special in added.items() if special} | set(tokenizer.all_special_tokens)
    registered -= {tokenizer.unk_token}  # it stands for text that the tokenizer cannot encode
    template = str(tokenizer.chat_template)
    acting = {
        text
        for text in added.keys() - {tokenizer.unk_token}
        if (_MARKUP.fullmatch(text) and not _HTML.fullmatch(text))
        or (text in template and len(text) > 1 and not text.replace(" ", "").isalnum())
    }
    return {text for text in registered if text.strip()}, {text for text in registered | acting if text.strip()}
