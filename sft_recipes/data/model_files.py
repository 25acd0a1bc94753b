"""Looks at a model's folder before anything is started: whole, without code, and as large as the recipe says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sft_recipes.config.architecture import DENSE_KEYS, DENSE_KINDS, parameter_count
from sft_recipes.data import hub
from sft_recipes.runtime.errors import DataError


def check_model(
    name_or_path: str, revision: str | None, trust_remote_code: bool, open_alternative: str | None = None
) -> Path:
    """The folder of a whole model: a local one, or the Hub's, brought where it is not there.

    Raises:
        DataError: no such folder, no config, no weights, a shard missing, or code that would have to run.
    """
    key = "model.name_or_path"
    folder = _local(name_or_path) or hub.model(name_or_path, revision, open_alternative)
    config = folder / "config.json"
    if not config.is_file():
        raise DataError(f"{key}: {folder} has no config.json; name the folder that save_pretrained wrote")
    if not any(folder.glob("*.safetensors")):
        other = "; weights in *.bin are pickles: convert them to safetensors" if any(folder.glob("*.bin")) else ""
        raise DataError(f"{key}: {folder} has no weights (*.safetensors){other}")
    index = folder / "model.safetensors.index.json"
    shards = set(_json_of(index).get("weight_map", {}).values()) if index.is_file() else set()
    missing = sorted(shard for shard in shards if not (folder / shard).is_file())
    if missing:
        raise DataError(f"{key}: {folder} lacks {', '.join(missing)}, which its index names; bring the whole model")
    if not trust_remote_code and "auto_map" in _json_of(config):
        raise DataError(
            f"{key}: {folder} wants its own code to run (auto_map); say model.trust_remote_code=true if you trust it"
        )
    return folder


def tokenizer_folder(name_or_path: str, revision: str | None, open_alternative: str | None = None) -> Path:
    """The folder with a model's tokenizer, which is all that looking at rows needs; no weights are brought.

    Raises:
        DataError: no such folder, or it is not to be had from the Hub.
    """
    return _local(name_or_path) or hub.tokenizer(name_or_path, revision, open_alternative)


def _local(name_or_path: str) -> Path | None:
    """The folder that a name stands for on this machine; None where it can only be a Hub name."""
    folder = Path(os.path.expanduser(name_or_path))  # noqa: PTH111  Path's own raises for a user that is not there
    if folder.is_dir():
        return folder
    if (
        name_or_path.startswith((".", "/", "~"))
        or name_or_path.count("/") > 1
        or any(c.isspace() for c in name_or_path)
    ):
        raise DataError(
            f"model.name_or_path: no folder {name_or_path!r}; name a folder with config.json and weights, or a Hub name"
        )
    return None


def architecture_of(folder: Path) -> dict[str, Any]:
    """The numbers of a model's configuration that forecasts are made from; nothing for a kind that they do not know."""
    config = _json_of(folder / "config.json") if (folder / "config.json").is_file() else {}
    if config.get("model_type") not in DENSE_KINDS:
        return {}
    wanted = (*DENSE_KEYS, "model_type", "num_key_value_heads", "head_dim", "tie_word_embeddings", "attention_bias")
    return {key: config[key] for key in wanted if config.get(key) is not None}


def embeddings_of(folder: Path) -> int | None:
    """How many tokens a model's configuration says that it has embeddings for."""
    config = _json_of(folder / "config.json") if (folder / "config.json").is_file() else {}
    size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    return size if isinstance(size, int) else None


def check_architecture(stated: dict[str, Any], folder: Path, trust_remote_code: bool) -> None:
    """Refuses a recipe whose numbers are not its model's: memory and time were worked out from them.

    Raises:
        DataError: the model's own config says otherwise, or the model has another number of parameters.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if not stated:
        return
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    wrong = [f"{key} {value!r}, not {getattr(config, key, None)!r}" for key, value in stated.items()
             if getattr(config, key, None) != value]  # fmt: skip
    if wrong:
        raise DataError(
            f"model.architecture: the recipe says {'; '.join(wrong)} as {folder / 'config.json'} does; correct it: "
            f"memory and time are worked out from it"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    counted, planned = model.num_parameters(), parameter_count(stated)
    if planned is not None and counted != planned:
        raise DataError(
            f"model.architecture: the model has {counted:,} parameters and the plan counts {planned:,}; it is no dense "
            f"Llama-shaped model: leave model.architecture out, and the plan makes no forecast"
        )


def _json_of(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"model.name_or_path: {file} is not JSON ({error}); bring the whole model") from error
    if not isinstance(content, dict):
        raise DataError(f"model.name_or_path: {file} holds no JSON object; bring the whole model")
    return content
