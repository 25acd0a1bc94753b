"""Shows how far a run is: a live view on a terminal, plain lines elsewhere and in `log.txt`; rank 0 alone speaks."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback

from sft_recipes.runtime import append_line
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.runtime.units import GIB

log = logging.getLogger(__name__)


class _View(Progress):
    """A bar with the steps, and the newest figures in a line below it, so that neither is cut at 80 columns."""

    figures = ""

    def get_renderables(self) -> Iterator[Any]:
        """The two lines."""
        yield self.make_tasks_table(self.tasks)
        yield Text(self.figures)


class ConsoleCallback(TrainerCallback):
    """Speaks at every log and evaluation step."""

    def __init__(self, folder: RunDir):
        self.log = folder.log
        self.bar: _View | None = None
        self.shown: dict[str, str] = {}
        self.began = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Starts the view where there is a terminal to show it on."""
        if not state.is_world_process_zero:
            return
        self.began = (time.monotonic(), state.global_step)
        if sys.stdout.isatty():
            self.bar = _View("step", MofNCompleteColumn(), BarColumn(24), "left", TimeRemainingColumn())
            self.bar.start()
            self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Moves the bar."""
        if self.bar is not None:
            self.shown["epoch"] = f"epoch {state.epoch or 0:.2f}"
            self.bar.figures = "  ".join(self.shown.values())
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Says loss, learning rate, gradient norm, speed, memory and the time that is left."""
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            self.shown.update(loss=f"loss {logs['loss']:.4f}", **_cost(logs))
            said = [self.shown["loss"], f"lr {logs['learning_rate']:.2e}"]
            said += [f"grad_norm {logs['grad_norm']:.2f}"] if "grad_norm" in logs else []
            self._line(state, "  ".join([*said, *_cost(logs).values()]))
        if "eval_loss" in logs:
            self.shown["eval_loss"] = f"eval_loss {logs['eval_loss']:.4f}"
            sources = {key[5:-5]: value for key, value in logs.items() if re.fullmatch(r"eval_\w+_loss", key)}
            each = ", ".join(f"{name} {value:.4f}" for name, value in sources.items())
            self._line(state, f"{self.shown['eval_loss']}{f' ({each})' if each else ''}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Takes the view away."""
        self.end()

    def end(self) -> None:
        """For a run that did not come to its end, too."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _line(self, state: Any, text: str) -> None:
        step, epoch = f"{state.global_step}/{state.max_steps}", state.epoch or 0
        line = f"step {step}  epoch {epoch:.2f}  {text}  left {self._left(state)}"
        if self.bar is None:
            log.info(line)
            return
        append_line.add(self.log, line)
        self.bar.figures = "  ".join(self.shown.values())
        self.bar.refresh()

    def _left(self, state: Any) -> str:
        began, first = self.began
        done = state.global_step - first
        if done <= 0:
            return "?"
        seconds = (time.monotonic() - began) / done * (state.max_steps - state.global_step)
        hours, rest = divmod(int(seconds), 3600)
        return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def _cost(logs: dict[str, Any]) -> dict[str, str]:
    """Tokens a second, and the memory at its highest: the GPU's, else this host's process."""
    memory = logs.get("memory_peak_bytes", logs.get("host_memory_bytes"))
    shown = {"speed": f"{logs['tokens_per_second']:,.0f} tok/s"} if "tokens_per_second" in logs else {}
    return {**shown, "memory": f"{memory / GIB:.1f} GiB"} if memory else shown
