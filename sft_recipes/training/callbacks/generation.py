"""Generation: greedy completions of the same held-out prompts at every evaluation, on rank 0."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.training import completions
from sft_recipes.training.callbacks.metrics import append


class GenerationCallback(TrainerCallback):
    """Writes `samples.jsonl` and logs the completions to the trackers; inactive if parameters are sharded.

    Attributes:
        stop_token_ids: end a completion.
        max_new_tokens: limit of a completion (`generation.max_new_tokens`).
        prompts: held-out prompts (`generation.show`).
    """

    def __init__(
        self, plan: Plan, folder: RunDir, prepared: Path, trackers: Sequence[Any], stop_token_ids: Sequence[int]
    ):
        self.folder = folder
        self.trackers = trackers
        self.stop_token_ids = stop_token_ids
        self.max_new_tokens = plan.sections.generation.max_new_tokens
        show = 0 if plan.shards_parameters else plan.sections.generation.show
        self.prompts = completions.read_prompts(prepared, show, 0)
        self.trainer: Any = None

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Generate greedily, so that no random number of the training is used."""
        if not state.is_world_process_zero or not self.prompts:
            return
        model, tokenizer = self.trainer.accelerator.unwrap_model(self.trainer.model), self.trainer.processing_class
        with self.trainer.compute_loss_context_manager():
            answered = completions.complete_prompts(
                model, tokenizer, self.prompts, 0, self.max_new_tokens, self.stop_token_ids
            )
        samples = [
            {
                "step": state.global_step,
                "prompt": format_messages(prompt),
                "reference": prompt.answer,
                "completion": completion,
            }
            for prompt, completion in zip(self.prompts, answered.texts, strict=True)
        ]
        for sample in samples:
            append(self.folder.samples, sample)
        for tracker in self.trackers:
            tracker.log_samples(state.global_step, samples)


def format_messages(prompt: completions.Prompt) -> str:
    """Return a prompt's messages, one per line."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt.messages)
