"""Lets the model of a finished run answer what a user types."""

from __future__ import annotations

import datetime
from collections.abc import Iterable

from sft_recipes.planning import plan as plans
from sft_recipes.planning.run_folder import RunFolder
from sft_recipes.planning.schema import RecipeError
from sft_recipes.training.quiet import quiet

_MAX_NEW_TOKENS = 256


def main(folder: RunFolder, prompts: Iterable[str]) -> int:
    """Prints one greedy answer a prompt.

    Raises:
        RecipeError: the run has no final model yet.
    """
    if not any((folder.final / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise RecipeError(f"RUN: {folder.path} has no final model yet ({folder.state()}); `make train` goes on with it")
    quiet()
    import torch
    import transformers

    from sft_recipes.data.chat import Chat
    from sft_recipes.data.tokenizer import load_tokenizer
    from sft_recipes.training import answers

    trust = plans.read(folder.plan).sections["model"]["trust_remote_code"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(str(folder.final), None, trust)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder.final, dtype="auto", trust_remote_code=trust)
    model = model.to(device)
    model.generation_config = transformers.GenerationConfig.from_pretrained(folder.final)
    stop = model.generation_config.eos_token_id
    chat = Chat(tokenizer, datetime.date.today())
    for prompt in prompts:
        ids = chat.prompt([{"role": "user", "content": prompt}])  # control tokens in it are text, as in training
        said = answers.generate(model, tokenizer, [ids], _MAX_NEW_TOKENS, stop if isinstance(stop, list) else [stop])
        print(said[0], flush=True)
    return 0
