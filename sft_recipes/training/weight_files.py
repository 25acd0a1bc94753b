"""Copies safetensors files with fp32 weights converted to the base model's dtype."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sft_recipes.runtime.run_dir import read_json, write_json

# The 16-bit dtypes by their names in the format (https://github.com/huggingface/safetensors#format).
_HALF = {"BF16": torch.bfloat16, "F16": torch.float16}
INDEX = "model.safetensors.index.json"


class PublishedCopy:
    """Copies the files of a trained model with fp32 weights converted to the dtypes of the base model's files.

    A weight that the base does not have gets the dtype of most of the base's weights. Nothing is widened: ZeRO saves
    bf16 for any dtype of the base. The converted weights of one file are in memory.
    """

    def __init__(self, base: Path):
        self._base = base
        self._dtypes: dict[str, torch.dtype] = {}
        self._sizes: dict[str, int] = {}
        weights: Counter[torch.dtype] = Counter()
        for file in base.glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  no mapping
                    part = tensors.get_slice(name)
                    self._dtypes[name] = _HALF.get(part.get_dtype(), torch.float32)
                    weights[self._dtypes[name]] += torch.Size(part.get_shape()).numel()
        self._default = weights.most_common(1)[0][0]

    def __call__(self, source: Path, target: Path) -> None:
        """Copy one file."""
        if source.suffix == ".safetensors":
            with safe_open(source, "pt") as file:
                tensors = {name: self._convert(name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
                save_file(tensors, target, file.metadata())
            self._sizes[source.name] = sum(tensor.nbytes for tensor in tensors.values())
        elif source.name == "config.json":
            write_json(target, self.published_config(read_json(source)))
        elif source.name == INDEX:  # after the weights, in the order of names
            index = read_json(source)
            index["metadata"]["total_size"] = sum(self._sizes.values())
            write_json(target, index)
        else:
            shutil.copyfile(source, target)
        shutil.copymode(source, target)

    def _convert(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._dtypes.get(name, self._default)) if tensor.dtype == torch.float32 else tensor

    def published_config(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Return the base model's own configuration with what training changed: vocabulary size, dtype, quantization.

        Transformers writes one in its current form, with the switches of the training run (`use_cache`, router losses).

        Args:
            saved: configuration of the trained model as Transformers wrote it.
        """
        own = json.loads((self._base / "config.json").read_text(encoding="utf-8"))
        if any(own.get(key, saved.get(key)) != saved.get(key) for key in ("model_type", "architectures")):
            own = saved  # a part of the base was trained, as a model of another class
        if "quantization_config" not in saved:
            own.pop("quantization_config", None)  # loaded dequantized
        dtype = saved.get("dtype", "float32")  # fp32 weights get the base's; ZeRO saves its own
        dtype = str(self._default).removeprefix("torch.") if dtype == "float32" else dtype
        return _with_changes(own, saved, {"dtype": dtype, "torch_dtype": dtype})


def _with_changes(config: dict[str, Any], trained: dict[str, Any], changes: dict[str, str]) -> dict[str, Any]:
    """Return a configuration and those in it with the changes, and the vocabulary sizes of the trained one."""
    values = {**changes, "vocab_size": trained.get("vocab_size")}
    return {
        key: _with_changes(value, trained.get(key) or {}, changes)
        if isinstance(value, dict)
        else values.get(key) or value
        for key, value in config.items()
    }
