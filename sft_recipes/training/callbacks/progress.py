"""Shows how far a run is: a bar on a terminal, plain lines elsewhere and in `log.txt`; rank 0 alone speaks."""

from __future__ import annotations

import re
import sys
import time
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from sft_recipes.planning.run_folder import RunFolder


class ShowProgress(TrainerCallback):
    """Speaks at every log and evaluation step."""

    def __init__(self, folder: RunFolder):
        self.log = folder.log
        self.bar: Progress | None = None
        self.loss: float | None = None
        self.eval_loss: float | None = None
        self.began = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Starts the bar where there is a terminal to show it on."""
        if not state.is_world_process_zero:
            return
        self.began = (time.monotonic(), state.global_step)
        if sys.stdout.isatty():
            columns = (
                "step",
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                "left",
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns)
            self.bar.start()
            self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Moves the bar."""
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Says loss, learning rate, gradient norm and the time that is left."""
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            self.loss = logs["loss"]
            self._say(
                state,
                f"loss {self.loss:.4f}  lr {logs['learning_rate']:.2e}  grad_norm {logs.get('grad_norm', 0.0):.2f}",
            )
        if "eval_loss" in logs:
            self.eval_loss = logs["eval_loss"]
            sources = {key[5:-5]: value for key, value in logs.items() if re.fullmatch(r"eval_\w+_loss", key)}
            each = ", ".join(f"{name} {value:.4f}" for name, value in sources.items())
            self._say(state, f"eval_loss {self.eval_loss:.4f}{f' ({each})' if each else ''}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Takes the bar away."""
        if self.bar is not None:
            self.bar.stop()

    def _say(self, state: Any, text: str) -> None:
        step, epoch = f"{state.global_step}/{state.max_steps}", state.epoch or 0
        line = f"step {step}  epoch {epoch:.2f}  {text}  left {self._left(state)}"
        with self.log.open("a", encoding="utf-8") as log:
            log.write(line + "\n")
        if self.bar is None:
            print(line, flush=True)
        else:
            shown = [
                f"loss {self.loss:.4f}" if self.loss is not None else "",
                f"eval_loss {self.eval_loss:.4f}" if self.eval_loss is not None else "",
            ]
            self.bar.update(self.task, description="  ".join(filter(None, shown)))

    def _left(self, state: Any) -> str:
        began, first = self.began
        done = state.global_step - first
        if done <= 0:
            return "?"
        seconds = (time.monotonic() - began) / done * (state.max_steps - state.global_step)
        hours, rest = divmod(int(seconds), 3600)
        return f"{hours}:{rest // 60:02}:{rest % 60:02}"
