"""Answers prompts with the model of a finished run."""

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
from sft_recipes.training.library_logging import quiet

_MAX_NEW_TOKENS = 256
# Of a GPU's free memory, for weights. The rest is for keys, values and logits; transformers itself plans with 0.9.
_WEIGHTS_SHARE = 0.85


def main(folder: RunDir, prompts: Iterable[str]) -> int:
    """Prints one greedy answer per prompt.

    Raises:
        SetupError: the run has no final model yet, its base model is gone, or no device holds the model.
    """
    if not any((folder.final / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise SetupError(f"RUN: {folder.path} has no final model yet ({folder.state()}); `make train` goes on with it")
    quiet()
    from sft_recipes.data.tokenize import ConversationTokenizer
    from sft_recipes.data.tokenizer import load_tokenizer
    from sft_recipes.training import completions

    plan = plans.read(folder.plan)
    tokenizer = load_tokenizer(str(folder.final), None, plan.sections.model.trust_remote_code)
    model = load(plan, folder)
    stop = model.generation_config.eos_token_id
    conversation_tokenizer = ConversationTokenizer(tokenizer, datetime.date.today())
    for prompt in prompts:
        ids = conversation_tokenizer.tokenize_prompt(
            [{"role": "user", "content": prompt}]
        )  # special tokens in it are text, as in training
        said = completions.generate(
            model, tokenizer, [ids], _MAX_NEW_TOKENS, stop if isinstance(stop, list) else [stop]
        )
        print(said[0], flush=True)
    return 0


def load(plan: Plan, folder: RunDir) -> Any:
    """The published model; adapters on the base that they were trained on, quantized as it was in training.

    Raises:
        SetupError: the base model is gone, or no device holds the model.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from sft_recipes.training import lora

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0  # an old driver has GPUs that are of no use
    free = [torch.cuda.mem_get_info(gpu)[0] for gpu in range(gpus)]
    trust = plan.sections.model.trust_remote_code
    if plan.method == "full":
        needed = sum(file.stat().st_size for file in folder.final.glob("*.safetensors"))
        model = AutoModelForCausalLM.from_pretrained(
            folder.final, dtype="auto", trust_remote_code=trust, device_map=placement(needed, free, host_memory_bytes())
        )
    else:
        from peft import PeftModel

        base = lora.base_folder(plan, folder)
        needed = lora.base_size(base, trust).loaded_bytes(plan)
        devices = placement(needed, free, host_memory_bytes())
        loaded = lora.load_base(plan, base, lora.loaded_dtype(plan), devices)
        model = PeftModel.from_pretrained(loaded, folder.final)
    model.generation_config = GenerationConfig.from_pretrained(folder.final)
    return model.eval()


def placement(needed: int, free: Sequence[int], host: int) -> str | dict[str, int | str]:
    """The `device_map` of a model: the emptiest GPU, all GPUs where it is larger than that, the CPU without GPUs.

    Args:
        needed: bytes of the weights.
        free: free bytes of each visible GPU.
        host: bytes of host memory.

    Raises:
        SetupError: the devices do not hold the weights.
    """
    usable = [_WEIGHTS_SHARE * gpu for gpu in free]
    if usable and needed <= max(usable):
        return {"": usable.index(max(usable))}
    if usable and needed <= sum(usable):
        return "auto"
    if usable:
        raise SetupError(
            f"RUN: the model does not fit: found {sum(free) / GIB:.1f} GiB free on {len(free)} visible GPU(s), "
            f"expected {needed / _WEIGHTS_SHARE / GIB:.1f} GiB. Make more GPUs visible, or answer on the CPU with "
            f"CUDA_VISIBLE_DEVICES="
        )
    if needed > host:
        raise SetupError(
            f"RUN: the model does not fit: found {host / GIB:.1f} GiB of host memory, expected {needed / GIB:.1f} GiB. "
            f"Use a machine with GPUs or more memory"
        )
    return {"": "cpu"}
