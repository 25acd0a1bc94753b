"""Generation: greedy completions of the same held-out prompts at every evaluation, on rank 0."""

from typing import Any

from sft_recipes.training import completions
from sft_recipes.training.callbacks import RunCallback
from sft_recipes.training.callbacks.metrics import append


class GenerationCallback(RunCallback):
    """Writes `samples.jsonl`; inactive if parameters are sharded."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Complete the prompts that `generation.show` selects."""
        completed = completions.complete(self.trainer) if state.is_world_process_zero else None
        if completed is None:
            return
        for prompt, text in zip(completed.prompts, completed.texts, strict=True):
            asked = "\n".join(f"{message['role']}: {message['content']}" for message in prompt.messages)
            sample = {"step": state.global_step, "prompt": asked, "reference": prompt.answer, "completion": text}
            append(self.trainer.folder.samples, sample)
