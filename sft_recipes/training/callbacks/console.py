"""Progress on the console: a line at every log and evaluation step, on rank 0 only."""

import logging
import time
from typing import Any

from transformers import TrainerCallback

from sft_recipes.runtime.units import GIB, format_duration

log = logging.getLogger(__name__)


class ConsoleCallback(TrainerCallback):
    """Prints a line at every log and evaluation step.

    Attributes:
        started: time and step at which this attempt started, for the remaining time.
    """

    started = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self.started = (time.monotonic(), state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Print loss, learning rate, gradient norm, throughput, memory and the remaining time."""
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            parts = [f"loss {logs['loss']:.4f}", f"lr {logs['learning_rate']:.2e}"]
            parts += [f"grad_norm {logs['grad_norm']:.2f}"] if "grad_norm" in logs else []
            parts += [f"{logs['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in logs else []
            memory = logs.get("memory_peak_bytes", logs.get("host_memory_bytes"))
            self._print(state, "  ".join([*parts, *([f"{memory / GIB:.1f} GiB"] if memory else [])]))
        if "eval_loss" in logs:
            self._print(state, f"eval_loss {logs['eval_loss']:.4f}")

    def _print(self, state: Any, text: str) -> None:
        started, first_step = self.started
        eta = "?"
        if steps := state.global_step - first_step:
            eta = format_duration((time.monotonic() - started) / steps * (state.max_steps - state.global_step))
        step = f"step {state.global_step}/{state.max_steps}  epoch {state.epoch or 0:.2f}"
        log.info(f"{step}  {text}  eta {eta}")
