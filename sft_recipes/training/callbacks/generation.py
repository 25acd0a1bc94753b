"""Generation: greedy completions of the same held-out prompts at every evaluation, on rank 0."""

from typing import Any

from sft_recipes.training import completions
from sft_recipes.training.callbacks import RunCallback
from sft_recipes.training.callbacks.metrics import append
from sft_recipes.training.callbacks.trackers import TrackerCallback


class GenerationCallback(RunCallback):
    """Writes `samples.jsonl` and logs the completions to the trackers; inactive if parameters are sharded."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Complete the prompts that `generation.show` selects."""
        completed = completions.complete(self.trainer) if state.is_world_process_zero else None
        if completed is None:
            return
        samples = []
        for prompt, text in zip(completed.prompts, completed.texts, strict=True):
            asked = "\n".join(f"{message['role']}: {message['content']}" for message in prompt.messages)
            sample = {"step": state.global_step, "prompt": asked, "reference": prompt.answer, "completion": text}
            append(self.trainer.folder.samples, sample)
            samples.append(sample)
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TrackerCallback):
                callback.log_samples(state.global_step, samples)
