"""Generates completions of prompts with the model of a finished run."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from typing import Any

from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.env import host_memory_bytes
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.runtime.units import GIB
from sft_recipes.training.library_logging import silence_libraries

_MAX_NEW_TOKENS = 256
# Of a GPU's free memory, for weights. The rest is for keys, values and logits; transformers itself plans with 0.9.
_WEIGHTS_SHARE = 0.85


def main(folder: RunDir, prompts: Iterable[str]) -> int:
    """Print one greedy completion per prompt.

    Raises:
        SetupError: the run has no final model, its base model does not exist, or the model fits no device.
    """
    if not any((folder.final / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise SetupError(f"RUN: {folder.path} has no final model yet ({folder.state()}). Run `make train` to resume it")
    silence_libraries()
    from sft_recipes.data.tokenize import ConversationTokenizer
    from sft_recipes.data.tokenizer import load_tokenizer
    from sft_recipes.training import completions

    plan = plans.read(folder.plan)
    tokenizer = load_tokenizer(str(folder.final), None, plan.sections.model.trust_remote_code)
    model = load_final_model(plan, folder)
    stop = model.generation_config.eos_token_id
    conversation_tokenizer = ConversationTokenizer(tokenizer, datetime.date.today())
    for prompt in prompts:
        # Special tokens in a prompt are text, as in training.
        ids = conversation_tokenizer.tokenize_prompt([{"role": "user", "content": prompt}])
        stop_ids = stop if isinstance(stop, list) else [stop]
        (text,) = completions.generate(model, tokenizer, [ids], _MAX_NEW_TOKENS, stop_ids)
        print(text, flush=True)
    return 0


def load_final_model(plan: Plan, folder: RunDir) -> Any:
    """Load the model in `final/`; adapters on their base model, quantized as in training.

    Raises:
        SetupError: the base model does not exist, or the model fits no device.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from sft_recipes.training import lora

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0  # unusable with an old driver
    free = [torch.cuda.mem_get_info(gpu)[0] for gpu in range(gpus)]
    trust = plan.sections.model.trust_remote_code
    if plan.method == "full":
        needed = sum(file.stat().st_size for file in folder.final.glob("*.safetensors"))
        model = AutoModelForCausalLM.from_pretrained(
            folder.final,
            dtype="auto",
            trust_remote_code=trust,
            device_map=choose_device_map(needed, free, host_memory_bytes()),
        )
    else:
        from peft import PeftModel

        base = lora.find_base_folder(plan, folder)
        needed = lora.measure_base(base, trust).loaded_bytes(plan)
        devices = choose_device_map(needed, free, host_memory_bytes())
        loaded = lora.load_base(plan, base, lora.loaded_dtype(plan), devices)
        model = PeftModel.from_pretrained(loaded, folder.final)
    model.generation_config = GenerationConfig.from_pretrained(folder.final)
    return model.eval()


def choose_device_map(needed: int, free: Sequence[int], host: int) -> str | dict[str, int | str]:
    """Return the `device_map` of a model: the GPU with the most free memory, all GPUs for a larger one, else the CPU.

    Args:
        needed: bytes of the weights.
        free: free bytes of each visible GPU.
        host: bytes of host memory.

    Raises:
        SetupError: the weights fit neither the GPUs nor the host.
    """
    usable = [_WEIGHTS_SHARE * gpu for gpu in free]
    if usable and needed <= max(usable):
        return {"": usable.index(max(usable))}
    if usable and needed <= sum(usable):
        return "auto"
    if usable:
        raise SetupError(
            f"RUN: the model does not fit: found {sum(free) / GIB:.1f} GiB free on {len(free)} visible GPU(s), "
            f"expected {needed / _WEIGHTS_SHARE / GIB:.1f} GiB. Make more GPUs visible, or generate on the CPU with "
            f"CUDA_VISIBLE_DEVICES="
        )
    if needed > host:
        raise SetupError(
            f"RUN: the model does not fit: found {host / GIB:.1f} GiB of host memory, expected {needed / GIB:.1f} GiB. "
            f"Use a machine with GPUs or more memory"
        )
    return {"": "cpu"}
