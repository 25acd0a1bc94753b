"""Generates completions of prompts with the model of a finished run."""

import datetime
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sft_recipes.planner import plan as plans
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.training.library_logging import silence_libraries

_MAX_NEW_TOKENS = 256


def main(folder: RunDir, prompts: Iterable[str]) -> int:
    """Print one greedy completion per prompt.

    Raises:
        SetupError: the run is not finished, its base model does not exist, or the model does not fit.
    """
    final = find_model(folder)
    silence_libraries()
    from sft_recipes.data.formats import Conversation
    from sft_recipes.data.tokenize import ConversationTokenizer
    from sft_recipes.data.tokenizer import load_tokenizer
    from sft_recipes.training import completions

    plan = plans.read(folder.plan)
    tokenizer = load_tokenizer(str(final), None, plan.sections.model.trust_remote_code)
    model = load_final_model(plan, folder)
    stop = model.generation_config.eos_token_id
    stop_ids = stop if isinstance(stop, list) else [stop]
    conversation_tokenizer = ConversationTokenizer(tokenizer, datetime.date.today())
    for prompt in prompts:
        # Special tokens in a prompt are text, as in training.
        ids = conversation_tokenizer.tokenize_prompt(Conversation([{"role": "user", "content": prompt}], "the prompt"))
        (answer,) = completions.generate_ids(model, tokenizer, [ids], _MAX_NEW_TOKENS, stop_ids)
        print(tokenizer.decode(answer, skip_special_tokens=True), flush=True)
    return 0


def find_model(folder: RunDir, merged: bool = False) -> Path:
    """Return the folder of a finished run's model.

    Args:
        merged: the merged model of a run that trained adapters.

    Raises:
        SetupError: the run is not finished, has not merged its adapters, or their base is gone.
    """
    if folder.state() != "finished" or not folder.final.is_dir():
        fix = "expected a finished run with a model in final/. Run its `make train` again to resume it"
        raise SetupError(f"RUN: {folder.path} is {folder.state()}, {fix}")
    plan = plans.read(folder.plan)
    if merged and plan.method == "full":
        raise SetupError(f"MERGED: {folder.name} has no adapters: full fine-tuning. Unset MERGED")
    if merged and not folder.merged.is_dir():
        from sft_recipes.training import lora

        lora.find_base_folder(plan, folder)
        raise SetupError(f"RUN: found no {folder.merged}. Run `make merge RUN={folder.name}` first")
    return folder.merged if merged else folder.final


def load_final_model(plan: plans.Plan, folder: RunDir) -> Any:
    """Load the model in `final/` on the GPUs, else on the CPU; adapters on their base model, quantized as in training.

    Raises:
        SetupError: the base model does not exist, or the model does not fit.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from sft_recipes.training import lora

    base = folder.final if plan.method == "full" else lora.find_base_folder(plan, folder)
    options = {"dtype": "auto", "device_map": "auto", "trust_remote_code": plan.sections.model.trust_remote_code}
    try:
        if plan.method == "full":
            model = AutoModelForCausalLM.from_pretrained(base, **options)
        else:
            from peft import PeftModel

            loaded = lora.load_base(plan, base, lora.loaded_dtype(plan), "auto")
            model = PeftModel.from_pretrained(loaded, folder.final)
    except (ValueError, torch.OutOfMemoryError) as error:  # transformers: some layers fit no device
        reason = " ".join(str(error).split())[:200]
        raise SetupError(f"RUN: {base} does not load here: {reason}. Make more GPUs visible, or use the CPU") from error
    model.generation_config = GenerationConfig.from_pretrained(folder.final)
    return model.eval()
