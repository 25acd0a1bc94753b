"""Checks a model's folder before a run starts: complete, without code, and with the recipe's architecture; reads what a
recipe for the model needs."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.config.architecture import DENSE_KEYS, DENSE_KINDS
from sft_recipes.config.schema import Model
from sft_recipes.data import hub
from sft_recipes.runtime.errors import DataError
from sft_recipes.runtime.paths import check_links, mount_hint

# Values of a configuration that do not change what a layer computes.
_NO_DIMENSION = re.compile(
    r"_.*|(bos|eos)_token_id|.*dropout|(torch_)?dtype|architectures|transformers_version|quantization_config|use_cache|"
    r"initializer_range|time_step_limit|max_position_embeddings|rope_.*|id2label|label2id"
)
_DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".zip", ".gz", ".zst")
_DECODERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # endings of decoders' classes


@dataclass(frozen=True)
class ModelFacts:
    """What a recipe for a model needs.

    Attributes:
        revision: commit of a Hub model.
        architecture: dimensions for the memory forecast; empty if it does not support them.
        parameters: number of weights.
        positions: context length; None if its configuration has none.
        quantization: method of quantized weights.
    """

    name_or_path: str
    revision: str | None
    architecture: dict[str, Any]
    parameters: int
    positions: int | None
    quantization: str | None


def check_model(model: Model) -> Path:
    """Return the folder of a complete model, local or in the Hub's cache; download what is missing.

    Raises:
        DataError: no such folder, no config, no weights, a missing shard, or code that would have to run.
    """
    folder = _local_folder(str(model.name_or_path)) or hub.download_model(model)
    if problem := _find_problem(folder, model.trust_remote_code):
        raise DataError(f"model.name_or_path: {folder}{problem}")
    return folder


def _find_problem(folder: Path, trust_remote_code: bool) -> str | None:
    """Return what a model's folder lacks, and the fix."""
    if (folder / "adapter_config.json").is_file():
        return ": found adapters (adapter_config.json), expected a model. Merge them first (`make merge RUN=<run>`)"
    if not _read_json(config := folder / "config.json"):
        return " has no config.json. Name a folder that save_pretrained wrote"
    if not any(folder.glob("*.safetensors")):
        return " has no weights (*.safetensors). Convert pickled weights (*.bin) to safetensors"
    index = folder / "model.safetensors.index.json"
    shards = re.findall(r'"([^"]+[.]safetensors)"', index.read_text(errors="replace")) if index.is_file() else []
    if missing := sorted({shard for shard in shards if not (folder / shard).is_file()}):
        return f" lacks {', '.join(missing)} of its index. Copy the complete model"
    _read_json(folder / "generation_config.json")  # Transformers ignores an invalid one
    if not trust_remote_code and "auto_map" in _read_json(config):
        return " requires its own code (auto_map). Set model.trust_remote_code=true if you trust it"
    return None


def tokenizer_folder(model: Model) -> Path:
    """Return the folder with a model's tokenizer, which suffices to tokenize rows; weights are not downloaded.

    Raises:
        DataError: no such folder, or the Hub does not have it.
    """
    return _local_folder(str(model.name_or_path)) or hub.download_model(model, only_tokenizer=True)


def _local_folder(name_or_path: str) -> Path | None:
    """Return the local folder of a name; None if it can only be a Hub name."""
    folder = Path(os.path.expanduser(name_or_path))  # noqa: PTH111  Path's own raises for an unknown user
    if folder.is_dir():
        check_links(folder, "model.name_or_path")
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name_or_path):
        raise DataError(f"model.name_or_path: no folder {name_or_path!r}. Name one, or a Hub model{mount_hint()}")
    return None


def architecture_of(folder: Path) -> dict[str, Any]:
    """Return the configuration values that forecasts need; empty for values they do not support.

    Of a type without a closed form: all that may change its layers, for a trace of them.
    """
    config = _read_json(folder / "config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str) or "auto_map" in config:
        return {}
    if kind not in DENSE_KINDS:
        return {key: value for key, value in config.items() if value is not None and not _NO_DIMENSION.fullmatch(key)}
    keys = (*DENSE_KEYS, "num_key_value_heads", "head_dim")
    sizes = {key: config[key] for key in keys if config.get(key) is not None}
    if any(type(value) is not int or value < 1 for value in sizes.values()):
        return {}  # loading the model reports it
    stated = {key: config[key] for key in ("tie_word_embeddings", "attention_bias") if config.get(key) is not None}
    return {**sizes, "tie_word_embeddings": DENSE_KINDS[kind], **stated, "model_type": kind}


def describe_model(name_or_path: str) -> ModelFacts:
    """Return what a recipe for a model needs, from its configuration and the headers of its weights.

    From the Hub only these are downloaded.

    Raises:
        DataError: no such model, not a decoder, or its number of parameters cannot be read.
    """
    path = Path(name_or_path)
    if path.is_file() or path.suffix in _DATA_SUFFIXES:
        raise DataError(f"MODEL: found the file {path}, expected a model folder or a Hub name. Set DATA={path}")
    local = _local_folder(name_or_path)
    folder = local or hub.download_model(Model(name_or_path=name_or_path), only_tokenizer=True)
    if local and (problem := _find_problem(folder, trust_remote_code=True)):
        raise DataError(f"MODEL: {folder}{problem}")
    config = _read_json(folder / "config.json")
    kinds = [str(kind) for kind in config.get("architectures") or ()]
    if config.get("is_encoder_decoder") or (kinds and not any(kind.endswith(_DECODERS) for kind in kinds)):
        kind = ", ".join(kinds) or config.get("model_type")
        raise DataError(f"MODEL: {name_or_path} is not a decoder (causal language model): found {kind}")
    quantization = config.get("quantization_config")
    positions = config.get("max_position_embeddings")
    return ModelFacts(
        name_or_path=name_or_path,
        revision=None if local else hub.commit_of(folder),
        architecture=architecture_of(folder),
        parameters=_count_parameters(folder, name_or_path),
        positions=positions if isinstance(positions, int) else None,
        quantization=quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else None,
    )


def _count_parameters(folder: Path, name: str) -> int:
    """Return the number of weights by the headers of a model's files; of a Hub model, only these are downloaded."""
    from huggingface_hub import get_safetensors_metadata, parse_local_safetensors_file_metadata

    try:
        local = [parse_local_safetensors_file_metadata(file) for file in folder.glob("*.safetensors")]
        headers = local or get_safetensors_metadata(name).files_metadata.values()
        return sum(count for header in headers for count in header.parameter_count.values())
    except Exception as error:  # of any kind: the files may hold anything
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"MODEL: {name}: the header of its weights cannot be read ({reason}). Copy it again") from error


def check_architecture(stated: dict[str, Any], folder: Path) -> None:
    """Check that the recipe's architecture, which memory and time are computed from, is the model's.

    Raises:
        DataError: the model's config differs.
    """
    found = architecture_of(folder)
    wrong = [key for key in stated if key in found and stated[key] != found[key]]
    if wrong:
        values = "; ".join(f"{key} {stated[key]!r}, expected {found[key]!r}" for key in wrong)
        raise DataError(f"model.architecture: found {values} ({folder / 'config.json'}). Correct the recipe")


def _read_json(file: Path) -> dict[str, Any]:
    """Return the object in a model's file; empty if there is no such file."""
    if not file.is_file():
        return {}
    try:
        return {**json.loads(file.read_text(encoding="utf-8"))}
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"model.name_or_path: {file}: no JSON object ({error}). Copy the complete model") from error
