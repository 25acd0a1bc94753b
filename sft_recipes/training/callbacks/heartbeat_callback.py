"""Heartbeat of this rank: one beat for each event of the Trainer, with the step and the activity."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from sft_recipes.training import rank_heartbeat


class HeartbeatCallback(TrainerCallback):
    """Beats on every rank, in the same order; saves and waits for other ranks beat where they happen."""

    trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Model, rows and optimizer are loaded."""
        rank_heartbeat.beat(state.global_step + 1, "step")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The first micro-batch is loaded."""
        rank_heartbeat.beat(state.global_step + 1, "step")

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A micro-batch's gradients are accumulated."""
        rank_heartbeat.beat(state.global_step + 1, "step")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """All gradients are accumulated."""
        rank_heartbeat.beat(state.global_step + 1, "step")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The optimizer step is taken."""
        rank_heartbeat.beat(state.global_step, "step")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A forward pass of an evaluation is done."""
        rank_heartbeat.beat(state.global_step, "evaluating")

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The evaluation is done."""
        rank_heartbeat.beat(state.global_step, "step")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The checkpoint is written."""
        rank_heartbeat.beat(state.global_step, "step")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Training ended; the model is published and completions are generated next."""
        rank_heartbeat.beat(state.global_step, "ending")
