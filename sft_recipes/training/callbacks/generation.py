"""Lets the model answer the same held-out prompts at every evaluation, on rank 0."""

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
    """Writes `samples.jsonl`, and hands the answers to the trackers; nothing where no rank holds the model."""

    def __init__(self, plan: Plan, folder: RunDir, prepared: Path, trackers: Sequence[Any], stop: Sequence[int]):
        """`stop` are the ids that end an answer."""
        self.folder = folder
        self.trackers = trackers
        self.stop = stop
        self.most = plan.sections.generation.max_new_tokens
        shown = 0 if plan.shards_parameters else plan.sections.generation.show
        self.prompts = completions.read_prompts(prepared, shown, 0)
        self.trainer: Any = None

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Greedy answers, so that no random number of the training is used up."""
        if not state.is_world_process_zero or not self.prompts:
            return
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        with self.trainer.compute_loss_context_manager():
            answered = completions.answer(model, self.trainer.processing_class, self.prompts, 0, self.most, self.stop)
        samples = [
            {"step": state.global_step, "prompt": asked(prompt), "wanted": prompt.answer, "said": said}
            for prompt, said in zip(self.prompts, answered.said, strict=True)
        ]
        for sample in samples:
            append(self.folder.samples, sample)
        for tracker in self.trackers:
            tracker.log_samples(state.global_step, samples)


def asked(prompt: completions.Prompt) -> str:
    """A prompt's turns as lines."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt.messages)
