"""Sends figures to TensorBoard and W&B, under the names that transformers gives them there.

Neither can stop a run or slow it: TensorBoard's writer is a local file, and W&B is spoken to by a thread of its own,
which goes on offline where W&B does not answer. `metrics.jsonl` holds the same figures whatever becomes of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import html
import json
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from transformers import TrainerCallback
from transformers.integrations.integration_utils import rewrite_logs

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime import timeouts
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.training.callbacks.graceful_stop import GracefulStopCallback
from sft_recipes.training.callbacks.metrics import final

PROJECT = "sft-recipes"
# Bounds on what W&B may take. Training waits for none of them, only the end of a run does, for what is left.


class TrackerCallback(TrainerCallback):
    """Hands each log record to the trackers, on rank 0."""

    def __init__(self, trackers: Sequence[Any], stopping: GracefulStopCallback):
        self.trackers = trackers
        self.stopping = stopping
        self.trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Opens them; a resumed run goes on behind its checkpoint's step."""
        if state.is_world_process_zero:
            for tracker in self.trackers:
                tracker.begin(state.global_step)

    def write_summary(self, state: Any) -> None:
        """The summary of a run whose last step an earlier start took."""
        self.on_train_begin(None, state, None)
        self.on_train_end(None, state, None)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """The figures of a log record."""
        if state.is_world_process_zero and logs:
            figures = rewrite_logs({key: value for key, value in logs.items() if isinstance(value, (int, float))})
            for tracker in self.trackers:
                tracker.figures(state.global_step, figures)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The summary of a run that came to its end, and the end of all."""
        if state.is_world_process_zero:
            for tracker in self.trackers:
                if not self.stopping.stopped:
                    tracker.summary(state.global_step, final(state))
                tracker.end()

    def end(self) -> None:
        """For a run that did not come to its end."""
        for tracker in self.trackers:
            tracker.end()


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, plan: Plan, folder: RunDir, say: Callable[[str], None]):
        self._plan = plan
        self._folder = folder
        self._say = say
        self._writer: Any = None

    def begin(self, step: int) -> None:
        """What an interrupted start wrote behind this step is not shown."""
        from torch.utils.tensorboard import SummaryWriter

        with self._tolerated(step):
            self._writer = SummaryWriter(str(self._folder.tensorboard), purge_step=step + 1 if step else None)
            self._writer.add_text("plan", f"```json\n{json.dumps(asdict(self._plan), indent=2)}\n```")

    def figures(self, step: int, figures: dict[str, float]) -> None:
        """Scalars under their names."""
        if self._writer is None:
            return
        with self._tolerated(step):
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """A text a prompt."""
        with self._tolerated(step):
            for number, sample in enumerate(samples) if self._writer else ():
                parts = (f"**{name}**\n\n{_indented(sample[name])}" for name in ("prompt", "wanted", "said"))
                self._writer.add_text(f"samples/{number}", "\n\n".join(parts), step)

    def summary(self, step: int, figures: dict[str, float]) -> None:
        """The documents' names as they are."""
        self.figures(step, figures)

    def end(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):  # what it holds back is lost with a disk that takes no more
            if self._writer is not None:
                self._writer.close()
        self._writer = None

    @contextlib.contextmanager
    def _tolerated(self, step: int) -> Iterator[None]:
        """What the disk refuses costs these curves and nothing else; the writer's thread hands it on, and ends."""
        try:
            yield
        except OSError as error:
            self._writer = None
            self._say(
                f"TensorBoard's figures end at step {step} ({error.strerror}); {self._folder.metrics.name} goes on"
            )


def _indented(text: str) -> str:
    """As Markdown shows it letter by letter."""
    return "\n".join(f"    {line}" for line in text.splitlines()) or "    (nothing)"


class WeightsAndBiases:
    """A run in W&B with an id of its own, so that a start that goes on goes on in the same one.

    WANDB_PROJECT, WANDB_NAME, WANDB_ENTITY, WANDB_MODE and WANDB_BASE_URL are W&B's own variables.
    """

    def __init__(self, plan: Plan, folder: RunDir, say: Callable[[str], None]):
        self._plan = plan
        self._folder = folder
        self._say = say
        self._jobs: queue.Queue[Callable[[Any], None] | None] = queue.Queue()
        self._thread: threading.Thread | None = None

    def begin(self, step: int) -> None:
        """Starts the thread that speaks to W&B."""
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def figures(self, step: int, figures: dict[str, float]) -> None:
        """Scalars over `train/global_step`, as transformers has them."""
        self._jobs.put(lambda run: run.log({**figures, "train/global_step": step}))

    def samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """A page of the step's answers."""
        import wandb

        rows = "".join(
            "<tr>" + "".join(f"<td><pre>{html.escape(str(sample[name]))}</pre></td>" for name in _COLUMNS) + "</tr>"
            for sample in samples
        )
        head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
        page = f"<table><tr>{head}</tr>{rows}</table>"
        self._jobs.put(lambda run: run.log({"samples": wandb.Html(page), "train/global_step": step}))

    def summary(self, step: int, figures: dict[str, float]) -> None:
        """The documents' names as they are."""
        self._jobs.put(lambda run: run.summary.update(figures))

    def end(self) -> None:
        """Waits a bounded time for what is left."""
        if self._thread is None:
            return
        self._jobs.put(None)
        self._thread.join(timeouts.TRACKER_INIT + timeouts.TRACKER_FINISH)
        if self._thread.is_alive():
            self._say(
                f"W&B did not take the last figures in time; send them with: wandb sync {self._folder.path}/wandb/*"
            )
        self._thread = None

    def _work(self) -> None:
        try:
            run = self._begin()
            while (job := self._jobs.get()) is not None:
                job(run)
            run.finish()
        except Exception as error:
            self._say(f"W&B: {error}; the figures are in {self._folder.metrics}")

    def _begin(self) -> Any:
        import wandb

        mode = os.environ.pop("WANDB_MODE", "") or "online"  # W&B reads a wrong word from there again
        try:
            if mode == "online":
                _connect(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
            return self._init(mode)
        except (wandb.errors.Error, OSError, ValueError) as error:  # no answer, no key, a word that W&B does not know
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self._say(
                f"no W&B run online ({reason}); the run goes on offline: "
                f"wandb sync {self._folder.path}/wandb/offline-* sends it"
            )
            wandb.teardown()  # the service holds the run's id for the attempt that failed
            return self._init("offline")

    def _init(self, mode: str) -> Any:
        import wandb

        settings = wandb.Settings(
            init_timeout=timeouts.TRACKER_INIT,
            finish_timeout=timeouts.TRACKER_FINISH,
            console="off",
            silent=True,
            save_code=False,
        )
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or self._folder.name,
            id=run_id(self._plan, self._folder),
            resume="allow",
            dir=str(self._folder.path),
            config=asdict(self._plan),
            mode=mode,  # type: ignore[arg-type]
            settings=settings,
        )
        run.define_metric("train/global_step")
        run.define_metric("*", step_metric="train/global_step", step_sync=True)
        return run


def _connect(url: str) -> None:
    """Tells in seconds what W&B itself needs its whole time-out for: that nothing listens there.

    Raises:
        OSError: it cannot be reached.
    """
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if not getproxies():  # a proxy reaches what this machine does not
        socket.create_connection((parts.hostname or "", port), timeouts.TRACKER_CONNECT).close()


_COLUMNS = ("prompt", "wanted", "said")


def run_id(plan: Plan, folder: RunDir) -> str:
    """The same at every start of a run, and another for another run of that name: a plan keeps its date."""
    return f"{folder.name}-{hashlib.sha256(f'{plan.created} {folder.path.absolute()}'.encode()).hexdigest()[:8]}"
