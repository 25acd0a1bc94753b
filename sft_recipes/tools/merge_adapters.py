"""Merge a run's best adapters into their base model, as one plain model in `merged/`."""

import logging
from pathlib import Path

import torch

from sft_recipes.data import model_layers, tokenizer_files
from sft_recipes.planner import memory
from sft_recipes.planner import plan as plans
from sft_recipes.runtime.env import host_memory_bytes
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import RunDir, read_json, write_json
from sft_recipes.runtime.units import GIB
from sft_recipes.tools import generate
from sft_recipes.training import lora
from sft_recipes.training.checkpoint import checkpoint_format
from sft_recipes.training.library_logging import silence_libraries
from sft_recipes.training.weight_files import PublishedCopy

log = logging.getLogger(__name__)

_LIBRARIES_BYTES = GIB  # of this process, without the model


def merge(folder: RunDir) -> Path:
    """Merge the best adapters into the base model and write it to `merged/`.

    Runs on the CPU, since the model may be larger than a GPU. 4-bit weights are dequantized first: the adapters were
    trained on those, not on the original weights.

    Raises:
        SetupError: the run trained no adapters or is not finished, or the host has too little memory.
    """
    silence_libraries()
    from peft import PeftModel
    from transformers import GenerationConfig

    plan = plans.read(folder.plan)
    if plan.method == "full":
        raise SetupError(f"RUN: {folder.name} has no adapters: full fine-tuning. Use {folder.final}")
    generate.find_model(folder)
    if folder.merged.is_dir():
        return folder.merged
    base_folder, partial = lora.find_base_folder(plan, folder), folder.saving / folder.merged.name
    dtype = torch.bfloat16 if plan.precision == "bf16" else torch.float32
    trust_remote_code = plan.sections.model.trust_remote_code
    model = model_layers.build_on_meta(model_layers.load_config(base_folder, trust_remote_code), trust_remote_code)
    # transformers keeps the 4-bit weights until all are dequantized.
    per_weight = dtype.itemsize + (memory.NF4_BYTES if plan.method == "qlora" else 0)
    required, host = int(per_weight * model.num_parameters()) + _LIBRARIES_BYTES, host_memory_bytes()
    if required > host:
        found = f"found {host / GIB:.1f} GiB of host memory, expected {required / GIB:.1f} GiB or more"
        raise SetupError(f"RUN: {folder.name} cannot be merged here: {found}. Merge it on a larger machine")
    base = lora.load_base(plan, base_folder, dtype, {"": "cpu"})
    if plan.method == "qlora":
        base = base.dequantize(dtype)
    merged = PeftModel.from_pretrained(base, folder.final, torch_device="cpu").merge_and_unload()
    merged.generation_config = GenerationConfig.from_pretrained(folder.final)
    merged.save_pretrained(partial)
    config = PublishedCopy(base_folder).published_config(read_json(partial / "config.json"))
    write_json(partial / "config.json", config)
    tokenizer_files.copy_files(folder.final, partial)
    files = checkpoint_format.compute_checksums(partial, checkpoint_format.list_files(partial))
    checkpoint_format.write_commit_marker(partial, {"run_id": plan.run_id, "files": files})
    checkpoint_format.publish(partial, folder.merged, folder.removing)
    log.info("merged %s", folder.merged)
    return folder.merged
