"""Generation: greedy completions of the same held-out prompts at every evaluation, on rank 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from sft_recipes.training.callbacks.metrics import append
from sft_recipes.training.completions import HeldOut


class GenerationCallback(TrainerCallback):
    """Writes `samples.jsonl` and logs the completions to the trackers; inactive if parameters are sharded."""

    def __init__(self, held_out: HeldOut, trackers: Sequence[Any]):
        self.held_out = held_out
        self.trackers = trackers

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Complete the prompts that `generation.show` selects."""
        completed = self.held_out.complete() if state.is_world_process_zero else None
        if completed is None:
            return
        samples = [
            {
                "step": state.global_step,
                "prompt": "\n".join(f"{message['role']}: {message['content']}" for message in prompt.messages),
                "reference": prompt.answer,
                "completion": text,
            }
            for prompt, text in zip(completed.prompts, completed.texts, strict=True)
        ]
        for sample in samples:
            append(self.held_out.folder.samples, sample)
        for tracker in self.trackers:
            tracker.log_samples(state.global_step, samples)
