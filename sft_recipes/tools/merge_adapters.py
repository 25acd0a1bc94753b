"""Merge a run's best adapters into their base model, as one plain model in `merged/`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from sft_recipes.data import tokenizer_files
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.env import host_memory_bytes
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import RunDir, read_json, write_json
from sft_recipes.runtime.units import GIB
from sft_recipes.training import lora
from sft_recipes.training.checkpoint import checkpoint_format
from sft_recipes.training.library_logging import silence_libraries
from sft_recipes.training.weight_files import PublishedCopy

log = logging.getLogger(__name__)

# Rounding error of adding an adapter to weights of this dtype, relative to the largest logit.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


def merge(folder: RunDir) -> Path:
    """Merge the best adapters into the base model and write it to `merged/`.

    Runs on the CPU, since the model may be larger than a GPU. 4-bit weights are dequantized first: the adapters were
    trained on those, not on the original weights.

    Raises:
        SetupError: the run trained no adapters or has no final model, the host has too little memory, or the merged
            model's logits differ from the adapted model's.
    """
    silence_libraries()
    plan = plans.read(folder.plan)
    if plan.method == "full":
        raise SetupError(f"RUN: {folder.name} has no adapters: full fine-tuning. Use {folder.final}")
    if not (folder.final / "adapter_config.json").is_file():
        raise SetupError(
            f"RUN: {folder.path} has no final adapters yet ({folder.state()}). Run `make train` to resume it"
        )
    if folder.merged.is_dir():
        return folder.merged
    base = lora.find_base_folder(plan, folder)
    required = lora.measure_base(base, plan.sections.model.trust_remote_code).merging_bytes(plan)
    if required > (host := host_memory_bytes()):
        raise SetupError(
            f"RUN: {folder.name} cannot be merged here: found {host / GIB:.1f} GiB of host memory, expected "
            f"{required / GIB:.1f} GiB or more. Merge on a larger machine, or use the adapters in {folder.final}: "
            f"make generate RUN={folder.name}"
        )
    merged, difference = _merge(plan, base, folder.final)
    _save(plan, folder, base, merged)
    log.info("merged %s: %s", folder.merged, difference)
    return folder.merged


def _merge(plan: Plan, base_folder: Path, final: Path) -> tuple[Any, str]:
    """Return the merged model, and the difference of its logits from the adapted model's.

    Raises:
        SetupError: the difference is too large.
    """
    from peft import PeftModel

    dtype = torch.bfloat16 if plan.precision == "bf16" else torch.float32
    base = lora.load_base(plan, base_folder, dtype, {"": "cpu"})
    if plan.method == "qlora":
        base = base.dequantize(dtype)
    adapted = PeftModel.from_pretrained(base, final, torch_device="cpu").eval()
    probe = torch.arange(min(64, base.config.vocab_size))[None]
    with torch.no_grad():
        before = adapted(input_ids=probe).logits.float()
        merged = adapted.merge_and_unload()
        after = merged(input_ids=probe).logits.float()
    difference, largest = float((after - before).abs().max()), float(before.abs().max())
    limit = _TOLERANCE[merged.dtype] * largest
    if not difference <= limit:
        raise SetupError(
            f"RUN: logits of the merged and the adapted model differ: found {difference:.2g}, expected {limit:.2g} or "
            f"less. Nothing was written; use {final}"
        )
    return merged, f"largest logit {largest:.3g}, largest difference {difference:.2g}"


def _save(plan: Plan, folder: RunDir, base: Path, merged: Any) -> None:
    from transformers import GenerationConfig

    partial = folder.saving / folder.merged.name
    merged.generation_config = GenerationConfig.from_pretrained(folder.final)
    merged.save_pretrained(partial)
    config = PublishedCopy(base).published_config(read_json(partial / "config.json"))
    write_json(partial / "config.json", config)
    tokenizer_files.copy_files(folder.final, partial)
    files = checkpoint_format.compute_checksums(partial, checkpoint_format.list_files(partial))
    checkpoint_format.write_commit_marker(partial, {"run_id": plan.run_id, "files": files})
    checkpoint_format.publish(partial, folder.merged, folder.removing)
