"""Moves this rank's pulse as the Trainer comes along: what it computes, evaluates, and when its steps are over."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from sft_recipes.training import rank_heartbeat


class HeartbeatCallback(TrainerCallback):
    """On every rank, and the same moves on each. Who saves or waits for other ranks says so at that place."""

    trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Model, rows and optimizer are there."""
        rank_heartbeat.beat(state.global_step + 1, "step")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The first micro-batch is there."""
        rank_heartbeat.beat(state.global_step + 1, "step")

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A micro-batch's gradients are added."""
        rank_heartbeat.beat(state.global_step + 1, "step")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """All gradients are there."""
        rank_heartbeat.beat(state.global_step + 1, "step")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The step is taken."""
        rank_heartbeat.beat(state.global_step, "step")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A forward pass of an evaluation."""
        rank_heartbeat.beat(state.global_step, "evaluating")

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The evaluation is over."""
        rank_heartbeat.beat(state.global_step, "step")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The checkpoint is written."""
        rank_heartbeat.beat(state.global_step, "step")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What is left is to publish and to answer."""
        rank_heartbeat.beat(state.global_step, "ending")
