"""Trackers: transformers' own callbacks for the names in REPORT_TO, none of which can end a run.

`metrics.jsonl` holds the same metrics whatever happens to a tracker.
"""

import contextlib
import functools
import logging
import os
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import integration_utils as integrations

from sft_recipes.planner import plan as plans
from sft_recipes.runtime import env, timeouts
from sft_recipes.training.callbacks.metrics import final

log = logging.getLogger(__name__)

_SAMPLE_KEYS = ("prompt", "reference", "completion")


class TrackerCallback(TrainerCallback):
    """Forward the Trainer's events to one tracker, on rank 0; disable the tracker if it raises.

    Args:
        name: as in REPORT_TO.
    """

    trainer: Any = None

    def __init__(self, name: str):
        self.name = name
        self._tracker: Any = None
        for event in dir(TrainerCallback):
            if event.startswith("on_") and event not in vars(TrackerCallback):
                setattr(self, event, functools.partial(self._forward, event))

    def on_train_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        """Create the tracker."""
        if state.is_world_process_zero:
            os.environ.setdefault("CLEARML_LOG_MODEL", "FALSE")  # ClearML uploads weights otherwise (transformers 5.23)
            own = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}.get(self.name)
            with self._disabled_if_it_raises():
                self._tracker = own(self.trainer) if own else integrations.INTEGRATION_TO_CALLBACK[self.name]()
                self._tracker.on_init_end(args, state, control, **context)
                self._tracker.on_train_begin(args, state, control, **context)

    def on_train_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        """Write the summary of a finished run, and close the tracker."""
        if not self.trainer.stopping.stopped:
            if hasattr(self._tracker, "log_summary"):
                self._forward("log_summary", state.global_step, final(state))
            else:
                self._forward("on_log", args, state, control, logs=final(state), **context)
        self._forward("on_train_end", args, state, control, **context)
        self._tracker = None

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Log completions of held-out prompts, if the tracker has a page or a table for them."""
        if hasattr(self._tracker, "log_samples"):
            self._forward("log_samples", step, samples)

    def end(self) -> None:
        """Close the tracker of a run that did not finish."""
        trainer = self.trainer
        self._forward("on_train_end", trainer.args, trainer.state, trainer.control, model=trainer.model)
        self._tracker = None

    def _forward(self, method: str, *arguments: Any, **context: Any) -> None:
        if self._tracker is not None:
            with self._disabled_if_it_raises():
                getattr(self._tracker, method)(*arguments, **context)

    @contextlib.contextmanager
    def _disabled_if_it_raises(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._tracker = None
            log.warning("%s: %s; disabled, metrics.jsonl has all metrics", self.name, _first_line(error))


class TensorBoard(integrations.TensorBoardCallback):  # type: ignore[misc]
    """Event files in the run's directory; a resumed run purges what an interrupted one wrote after its checkpoint."""

    def __init__(self, trainer: Any):
        super().__init__()
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        """Open the writer and write the plan."""
        purge_step = state.global_step + 1 if state.global_step else None
        self.logging_dir = str(self.trainer.folder.tensorboard)
        self.tb_writer = self._SummaryWriter(self.logging_dir, purge_step=purge_step)
        super().on_train_begin(args, state, control, **context)
        self.tb_writer.add_text("plan", f"```json\n{plans.to_json(self.trainer.plan)}\n```")

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """One text per prompt, as Markdown code blocks."""
        for number, sample in enumerate(samples):
            parts = [f"**{key}**\n\n{textwrap.indent(str(sample[key]), '    ')}" for key in _SAMPLE_KEYS]
            self.tb_writer.add_text(f"samples/{number}", "\n\n".join(parts), step)

    def log_summary(self, step: int, summary: dict[str, float]) -> None:
        """Scalars, under their names as they are."""
        for name, value in summary.items():
            self.tb_writer.add_scalar(name, value, step)


class WeightsAndBiases(integrations.WandbCallback):  # type: ignore[misc]
    """A W&B run with a fixed id, which a resumed run continues; offline if W&B cannot be reached.

    WANDB_PROJECT, WANDB_NAME, WANDB_ENTITY, WANDB_MODE, WANDB_BASE_URL, WANDB_LOG_MODEL, WANDB_INIT_TIMEOUT and
    WANDB_FINISH_TIMEOUT are W&B's own variables.
    """

    def __init__(self, trainer: Any):
        super().__init__()
        self.plan, self.folder = trainer.plan, trainer.folder
        if self.plan.strategy.shards_parameters and self._log_model == integrations.WandbLogModel.END:
            self._log_model = integrations.WandbLogModel.FALSE
            log.warning("WANDB_LOG_MODEL=end: ignored, since %s shards the weights", self.plan.parallelism)

    def setup(self, args: Any, state: Any, model: Any, **context: Any) -> None:
        """Start the W&B run, then let transformers add its config."""
        mode = os.environ.get("WANDB_MODE") or "online"
        try:
            self._start(mode, args.project)
        except (self._wandb.errors.Error, OSError, ValueError) as error:  # no answer, no key, an invalid setting
            sync = f"wandb sync {self.folder.path}/wandb/offline-*"
            log.warning("wandb: %s; logging offline. Upload it later: %s", _first_line(error), sync)
            self._wandb.teardown()  # the service holds the run's id for the attempt that failed
            self._start("offline", args.project)
        super().setup(args, state, model, **context)

    def _start(self, mode: str, project: str) -> None:
        limits = {"init_timeout": timeouts.TRACKER_INIT, "finish_timeout": timeouts.TRACKER_FINISH}
        for variable in env.WANDB_TIMEOUTS:
            if os.environ.get(variable):
                del limits[variable.removeprefix("WANDB_").lower()]
            else:
                os.environ.pop(variable, None)  # W&B rejects an empty one
        self._wandb.init(
            project=os.environ.get("WANDB_PROJECT") or project,
            name=os.environ.get("WANDB_NAME") or self.folder.name,
            id=f"{self.folder.name}-{self.plan.run_id[:8]}",  # the same at every attempt of a run
            resume="allow",
            dir=str(self.folder.path),
            config=asdict(self.plan),
            mode=mode,
            settings=self._wandb.Settings(
                **limits, finish_timeout_raises=True, console="off", silent=True, save_code=False
            ),
        )

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """A table with the step's completions."""
        table = self._wandb.Table(list(_SAMPLE_KEYS), [[sample[key] for key in _SAMPLE_KEYS] for sample in samples])
        self._wandb.log({"samples": table, "train/global_step": step})

    def log_summary(self, _step: int, summary: dict[str, float]) -> None:
        """The run's summary, under the metrics' names as they are."""
        self._wandb.run.summary.update(summary)

    def on_train_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        """Finish the W&B run; a TimeoutError tells that not all of it was uploaded in time."""
        super().on_train_end(args, state, control, **context)
        self._wandb.finish()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
