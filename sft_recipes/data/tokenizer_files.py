"""Writes a run's tokenizer: the base model's own files, with only the values changed that the run changed.

Data preparation writes it once and checks that it loads again with the same ids; every saved model has a copy.
"""

import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from sft_recipes.data.tokenizer import FIX_MISTRAL_REGEX
from sft_recipes.runtime.errors import DataError
from sft_recipes.runtime.run_dir import read_json, write_json

FOLDER = "tokenizer"  # of the prepared data
_CONFIG, _TEMPLATE, _SPECIAL_TOKENS = "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"
_PATTERNS = (
    *("tokenizer*", _SPECIAL_TOKENS, "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken", "*.model"),
    *("tekken.json", "chat_template*", "additional_chat_templates"),
)
# Transformers 4 and 5 load `tokenizer.json` as it is with this class.
_FROM_FILE = "PreTrainedTokenizerFast"
# Where tokenizers differ: numbers, spaces, newlines, contractions, NFC and NFD, scripts, emoji, code.
_PROBE = (
    "In 2025, 1234567.89 of 10%  two   three    spaces\n\n\nlines\r\n\ttabs \u00a0 end ",
    "It's we'LL DON'T caf\u00e9 cafe\u0301 \ufb01 \uac00 \u1100\u1161 \u00c5 A\u030a",
    "日本語のテキスト 中文字符 한국어 العربية हिन्दी ไทย 🙂👩\u200d👩\u200d👧🇭🇷",
    "def f(x_1: int) -> dict:\n    return {'a': [x_1**2, 0xFF]}  # ok\n",
)


def save(tokenizer: Any, base: Path, folder: Path, texts: Iterable[str], trust_remote_code: bool) -> list[str]:
    """Write a loaded tokenizer's files and check that `AutoTokenizer` loads them with the same ids; return notes.

    Args:
        base: the folder that the tokenizer was loaded from.
        texts: of the run's rows, compared in addition to the probe texts.

    Raises:
        DataError: its ids are not those of `tokenizer.json`, or it cannot be saved.
    """
    import transformers

    texts = [*_PROBE, *(text.encode("utf-8", "replace").decode() for text in texts)]
    fixed, file = tokenizer.init_kwargs.get(FIX_MISTRAL_REGEX), base / "tokenizer.json"
    try:
        tokenizer.save_pretrained(folder)
        is_unchanged = file.is_file() and not fixed and _check_ids(tokenizer, file, texts)
    except Exception as error:  # of any kind: the files may hold anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"model.name_or_path: tokenizer of {base}: {reason}. Use a complete copy") from error
    config = {**read_json(folder / _CONFIG), "tokenizer_class": _FROM_FILE}
    copy_files(base, folder, keep=() if is_unchanged else ("tokenizer.json",))
    config = read_json(folder / _CONFIG) or config
    model = _reload(folder, base, trust_remote_code)
    if _add_changes(tokenizer, model, config, folder):
        model = _reload(folder, base, trust_remote_code)
    notes = ["tokenizer: Mistral's pre-tokenizer is corrected (fix_mistral_regex), also in final/"] if fixed else []
    expected = _ids(tokenizer, texts)
    if _ids(model, texts) == expected == _ids(_reload(folder, None, trust_remote_code), texts):
        return notes
    extra = config.pop("extra_special_tokens", [])  # Transformers 4 accepts no list under this name
    config = {**tokenizer.special_tokens_map, "additional_special_tokens": extra, **config}
    write_json(folder / _CONFIG, {**config, "tokenizer_class": _FROM_FILE})
    if _ids(model, texts) != expected:
        notes.append(f"tokenizer: read from tokenizer.json, which {type(model).__name__} ignores, also in final/")
    if _ids(_reload(folder, base, trust_remote_code), texts) != expected:
        note = f"AutoTokenizer of transformers {transformers.__version__} ignores a part of tokenizer.json here"
        notes.append(f"tokenizer: {note}. Load it from final/ with {_FROM_FILE}")
    return notes


def copy_files(source: Path, target: Path, keep: Collection[str] = ()) -> None:
    """Replace the tokenizer's files in a folder by those of another, except those named in `keep`."""
    for path in _list_files(target, keep):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in _list_files(source, keep):
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, target / path.name)


def _list_files(folder: Path, keep: Collection[str]) -> set[Path]:
    return {path for pattern in _PATTERNS for path in folder.glob(pattern) if path.name not in keep}


def _check_ids(tokenizer: Any, file: Path, texts: list[str]) -> bool:
    """Return whether a tokenizer has the vocabulary of a `tokenizer.json`.

    Raises:
        ValueError: it gives other ids.
    """
    from tokenizers import Tokenizer

    raw = Tokenizer.from_file(str(file))
    raw.no_truncation()
    raw.no_padding()
    ids = [encoding.ids for encoding in raw.encode_batch(texts, add_special_tokens=False)]
    if ids != tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        raise ValueError("it gives other ids than its tokenizer.json")
    return len(tokenizer) == raw.get_vocab_size()


def _reload(folder: Path, base: Path | None, trust_remote_code: bool) -> Any:
    """Load the written files as a user would, next to the configuration of the model; None if that fails."""
    from transformers import AutoTokenizer

    config = folder / "config.json"
    try:
        if base is not None:
            shutil.copyfile(base / config.name, config)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception:
        return None
    finally:
        config.unlink(missing_ok=True)


def _ids(tokenizer: Any, texts: list[str]) -> Any:
    return tokenizer and tokenizer(texts, verbose=False)["input_ids"]


def _add_changes(tokenizer: Any, loaded: Any, config: dict[str, Any], folder: Path) -> bool:
    """Add the special tokens and the chat template that the loaded files do not give to the written files.

    Returns:
        Whether anything was added.
    """
    before, saved = dict(config), getattr(loaded, "special_tokens_map", {})
    if FIX_MISTRAL_REGEX in tokenizer.init_kwargs:
        config[FIX_MISTRAL_REGEX] = tokenizer.init_kwargs[FIX_MISTRAL_REGEX]
    lacks_tokens = any(saved.get(key) != token for key, token in tokenizer.special_tokens_map.items())
    if lacks_tokens:
        config |= tokenizer.special_tokens_map
        (folder / _SPECIAL_TOKENS).unlink(missing_ok=True)  # of Transformers 4, which prefers it
    if tokenizer.extra_special_tokens != getattr(loaded, "extra_special_tokens", None):
        name = "extra_special_tokens" if "extra_special_tokens" in config else "additional_special_tokens"
        config[name] = list(map(str, tokenizer.extra_special_tokens))
    lacks_template = tokenizer.chat_template != getattr(loaded, "chat_template", None)
    if lacks_template:
        shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
        config.pop("chat_template", None)
        (folder / _TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8")
    if config != before:
        write_json(folder / _CONFIG, config)
    return lacks_tokens or lacks_template or config != before
