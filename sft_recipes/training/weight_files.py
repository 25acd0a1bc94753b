"""Copies safetensors files with fp32 weights converted to the base model's dtype."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

# The 16-bit dtypes by their names in the format (https://github.com/huggingface/safetensors#format).
_HALF = {"BF16": torch.bfloat16, "F16": torch.float16}
INDEX = "model.safetensors.index.json"


class PublishedCopy:
    """Copies the files of a trained model with fp32 weights converted to the dtypes of the base model's files.

    A weight that the base does not have gets the dtype of most of the base's weights. Nothing is widened: ZeRO saves
    bf16 for any dtype of the base. One tensor at a time is in memory.
    """

    def __init__(self, base: Path):
        self._base = base
        entries = [pair for file in sorted(base.glob("*.safetensors")) for pair in _header(file).items()]
        weights: Counter[str] = Counter()
        for _, entry in entries:
            weights[entry["dtype"]] += math.prod(entry["shape"])
        self._dtypes = {name: entry["dtype"] for name, entry in entries}
        self._default = weights.most_common(1)[0][0]

    def __call__(self, source: Path, target: Path) -> None:
        """Copy one file."""
        if source.suffix == ".safetensors" and any(
            self._published_dtype(name, entry) for name, entry in _header(source).items()
        ):
            self._copy_weights(source, target)
        elif source.name == "config.json":
            _copy_json(source, target, self.published_config)
        elif source.name == INDEX:
            _copy_json(source, target, lambda index: self._with_size(index, source.parent))
        else:
            shutil.copyfile(source, target)
        shutil.copymode(source, target)

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
        dtype = str(_HALF.get(self._default, torch.float32)).removeprefix("torch.")
        if saved.get("dtype", "float32") != "float32":  # ZeRO's; fp32 weights get the base's dtype
            dtype, is_changed = saved["dtype"], saved["dtype"] != dtype
        else:
            is_changed = own is saved

        def with_changes(config: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
            changes = {"vocab_size": trained.get("vocab_size")}
            changes |= {"dtype": dtype, "torch_dtype": dtype} if is_changed else {}
            return {
                key: with_changes(value, trained.get(key) or {})
                if isinstance(value, dict)
                else (changes.get(key) or value)
                for key, value in config.items()
            }

        return with_changes(own, saved)

    def _published_dtype(self, name: str, entry: dict[str, Any]) -> str | None:
        """Return the dtype to convert a tensor to; None to keep it."""
        dtype = self._dtypes.get(name, self._default)
        return dtype if entry["dtype"] == "F32" and dtype in _HALF else None

    def _layout(self, source: Path) -> dict[str, dict[str, Any]]:
        """Return the header of the published file. Wider dtypes come first, so that every tensor is aligned."""
        published: dict[str, dict[str, Any]] = {}
        for name, entry in _header(source).items():
            first, end = entry["data_offsets"]
            half = self._published_dtype(name, entry)
            size = (end - first) // 2 if half else end - first
            published[name] = {"dtype": half or entry["dtype"], "shape": entry["shape"], "size": size}
        width = {name: entry["size"] // max(math.prod(entry["shape"]), 1) for name, entry in published.items()}
        offset, layout = 0, {}
        for name in sorted(published, key=lambda name: (-width[name], name)):
            size = published[name].pop("size")
            layout[name] = {**published[name], "data_offsets": [offset, offset + size]}
            offset += size
        return layout

    def _copy_weights(self, source: Path, target: Path) -> None:
        layout = self._layout(source)
        with safe_open(source, framework="pt") as weights, target.open("wb") as file:
            text = json.dumps({"__metadata__": weights.metadata() or {"format": "pt"}, **layout}).encode()
            text += b" " * (-len(text) % 8)
            file.write(struct.pack("<Q", len(text)) + text)
            for name, entry in layout.items():
                tensor = weights.get_tensor(name)
                tensor = tensor.to(_HALF.get(entry["dtype"], tensor.dtype))
                file.write(tensor.reshape(-1).view(torch.uint8).numpy())

    def _with_size(self, index: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Return an index with the size of the published weights."""
        files = {folder / name for name in index["weight_map"].values()}
        size = sum(max(entry["data_offsets"][1] for entry in self._layout(file).values()) for file in files)
        return {**index, "metadata": {**index["metadata"], "total_size": size}}


def _copy_json(source: Path, target: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    content = change(json.loads(source.read_text(encoding="utf-8")))
    target.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """Read the dtype, shape and offsets of each tensor in a file, without its data."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, dict[str, Any]] = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return header
