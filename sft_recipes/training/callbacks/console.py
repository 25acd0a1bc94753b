"""Progress on the console: a live view on a terminal, plain lines elsewhere and in `log.txt`; rank 0 only."""

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
from sft_recipes.runtime.units import GIB, format_duration

log = logging.getLogger(__name__)


class _View(Progress):
    """A progress bar with the latest metrics on a line below it, so that neither is cut at 80 columns."""

    metrics = ""

    def get_renderables(self) -> Iterator[Any]:
        """Yield the two lines."""
        yield self.make_tasks_table(self.tasks)
        yield Text(self.metrics)


class ConsoleCallback(TrainerCallback):
    """Prints a line at every log and evaluation step; on a terminal it updates a view instead.

    Attributes:
        bar: the live view, on a terminal only.
        shown: the latest metrics in the view, formatted.
        started: time and step at which this attempt started, for the remaining time.
    """

    def __init__(self, folder: RunDir):
        self.log_file = folder.log
        self.bar: _View | None = None
        self.shown: dict[str, str] = {}
        self.started = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the view if standard output is a terminal."""
        if not state.is_world_process_zero:
            return
        self.started = (time.monotonic(), state.global_step)
        if sys.stdout.isatty():
            self.bar = _View("step", MofNCompleteColumn(), BarColumn(24), "eta", TimeRemainingColumn())
            self.bar.start()  # lines that are logged meanwhile appear above it
            self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance the bar."""
        if self.bar is not None:
            self.shown["epoch"] = f"epoch {state.epoch or 0:.2f}"
            self.bar.metrics = "  ".join(self.shown.values())
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Print loss, learning rate, gradient norm, throughput, memory and the remaining time."""
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            self.shown.update(loss=f"loss {logs['loss']:.4f}", **_throughput_and_memory(logs))
            parts = [self.shown["loss"], f"lr {logs['learning_rate']:.2e}"]
            parts += [f"grad_norm {logs['grad_norm']:.2f}"] if "grad_norm" in logs else []
            self._print(state, "  ".join([*parts, *_throughput_and_memory(logs).values()]))
        if "eval_loss" in logs:
            self.shown["eval_loss"] = f"eval_loss {logs['eval_loss']:.4f}"
            sources = {key[5:-5]: value for key, value in logs.items() if re.fullmatch(r"eval_\w+_loss", key)}
            by_source = ", ".join(f"{name} {value:.4f}" for name, value in sources.items())
            self._print(state, f"{self.shown['eval_loss']}{f' ({by_source})' if by_source else ''}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the view."""
        self.end()

    def end(self) -> None:
        """Stop the view, also of a run that did not finish."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _print(self, state: Any, text: str) -> None:
        step, epoch = f"{state.global_step}/{state.max_steps}", state.epoch or 0
        line = f"step {step}  epoch {epoch:.2f}  {text}  eta {self._eta(state)}"
        if self.bar is None:
            log.info(line)
            return
        append_line.add(self.log_file, line)
        self.bar.metrics = "  ".join(self.shown.values())
        self.bar.refresh()

    def _eta(self, state: Any) -> str:
        started, first_step = self.started
        steps = state.global_step - first_step
        if steps <= 0:
            return "?"
        seconds = (time.monotonic() - started) / steps * (state.max_steps - state.global_step)
        return format_duration(seconds)


def _throughput_and_memory(logs: dict[str, Any]) -> dict[str, str]:
    """Format tokens/s, and the peak memory of the GPU, else of this process."""
    memory = logs.get("memory_peak_bytes", logs.get("host_memory_bytes"))
    shown = {"speed": f"{logs['tokens_per_second']:,.0f} tokens/s"} if "tokens_per_second" in logs else {}
    return {**shown, "memory": f"{memory / GIB:.1f} GiB"} if memory else shown
