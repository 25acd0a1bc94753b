"""Write run directories of simulated runs: a plan of the real planner, and metrics with realistic noise."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path

from sft_recipes.config import loader
from sft_recipes.monitor.metrics_log import Run, read
from sft_recipes.planner import batch
from sft_recipes.planner import plan as plans
from sft_recipes.planner.lr_schedule import Schedule
from sft_recipes.planner.plan import Topology
from sft_recipes.runtime.run_dir import RunDir

GIB = 2**30


@dataclass
class Simulated:
    """A healthy run until a test changes its metrics; `until` is the completed share of the planned steps."""

    recipe: str = "8b"
    steps: int = 1000
    lines: int = 100
    evaluations: int = 10
    seed: int = 0
    noise: float = 0.05
    overrides: tuple[str, ...] = ()
    state: str = "finished"
    gpu: bool = True
    retain: bool = False
    begin: float = 1.4
    end: float = 1.1
    until: float = 1.0
    accuracy: float = 0.7
    gap: float = 0.03
    manifest: dict = field(default_factory=dict)
    warnings: list[dict] = field(default_factory=list)
    samples: list[dict] = field(default_factory=list)
    changes: list = field(default_factory=list)

    def loss(self, share: float) -> float:
        """Falls fast at first, then slowly, as in fine-tuning."""
        fallen = 0.6 * (1 - math.exp(-share * 12)) + 0.4 * share
        return self.begin * (self.end / self.begin) ** fallen

    def change(self, key: str, value) -> Simulated:
        """Replace `key` of each line by `value(present value, share of the run)`."""
        self.changes.append((key, value))
        return self

    def plan(self):
        recipe = loader.load(self.recipe, self.overrides)
        gpus = 0 if self.recipe == "tiny" else recipe.hardware.gpus
        made = plans.resolve(recipe, Topology(gpus, 1, recipe.hardware.nodes, recipe.hardware.gpu_type))
        return dataclasses.replace(
            made,
            data_prepared=True,
            optimizer_steps=self.steps,
            steps_per_epoch=max(1, math.ceil(self.steps / made.num_train_epochs)),
            warmup_steps=batch.warmup_steps(self.steps, made.warmup_ratio),
        )

    def metrics(self, plan) -> list[dict]:
        draw = random.Random(self.seed)
        every = max(1, self.steps // self.lines)
        logged = {1, *range(every, self.steps + 1, every)}
        evaluated = {round(self.steps * part / self.evaluations) for part in range(1, self.evaluations + 1)}
        lines = [{"step": 0, "eval_retention_loss": 0.9}] if self.retain else []
        for step in sorted(logged | evaluated):
            share = step / self.steps
            if share > self.until:
                break
            if step in logged:
                lines.append(self._altered(self._training(plan, step, share, draw, every), share))
            if step in evaluated:
                lines.append(self._altered(self._validation(step, share, draw), share))
                trained = next((line["loss"] for line in reversed(lines) if "loss" in line), None)
                lines[-1] |= {"train_eval_gap": lines[-1]["eval_loss"] - trained} if trained is not None else {}
        if self.state == "finished":
            best = min((line["eval_loss"] for line in lines if "eval_loss" in line), default=None)
            lines.append({"step": self.steps, "final/total_steps": self.steps, "final/best_eval_loss": best})
        return lines

    def _training(self, plan, step, share, draw, every) -> dict:
        speed = draw.gauss(1, 0.07) * (0.8 if draw.random() < 0.1 else 1)  # a line with an evaluation is slower
        options = plan.sections.trainer.get("lr_scheduler_kwargs") or {}
        schedule = Schedule(plan.lr_scheduler_type, plan.learning_rate, plan.warmup_steps, self.steps, options)
        line = {
            "step": step,
            "epoch": share * plan.num_train_epochs,
            "loss": self.loss(share) * max(0.2, draw.gauss(1, self.noise)),
            "grad_norm": 1.2 * math.exp(draw.gauss(0, 0.35)) * (4 if step == 1 else 1),
            "learning_rate": schedule.learning_rate(step - 1),
            "mean_token_accuracy": self.accuracy + draw.gauss(0, 0.01),
            "supervised_tokens_seen": step * 20_000,
            "step_seconds": 2.0 / speed,
            "data_wait_fraction": 0.6 if step == 1 else abs(draw.gauss(0.01, 0.01)),
            "padded_tokens_per_second": 33_000 * speed,
            "tokens_per_second": 32_000 * speed,
            "supervised_tokens_per_second": 20_000 * speed,
            "host_memory_bytes": int(9 * GIB * (1 + 0.05 * min(1, share * 10)) + draw.gauss(0, 0.02) * GIB),
        }
        if self.gpu:
            held = 40 * GIB * (1 + (0.15 if share > 1 / self.evaluations else 0)) + draw.gauss(0, 0.1) * GIB
            line |= {"memory_allocated_bytes": int(held), "memory_reserved_bytes": int(1.3 * held)}
            line |= {"memory_peak_bytes": int(1.25 * held), "mfu": 0.42 * speed}
            line |= {"hfu": 0.55 * speed}
        return line

    def _validation(self, step, share, draw) -> dict:
        loss = self.loss(share) + self.gap
        line = {"step": step, "eval_loss": loss * draw.gauss(1, 0.003), "eval_mean_token_accuracy": self.accuracy}
        if self.retain:
            line["eval_retention_loss"] = 0.9 * (1 + 0.02 * share) * draw.gauss(1, 0.003)
        return line

    def _altered(self, line: dict, share: float) -> dict:
        for key, value in self.changes:
            if key in line:
                line[key] = value(line[key], share)
        return line

    def write(self, folder: Path) -> Run:
        """Write the run directory, and read it."""
        folder.mkdir(parents=True, exist_ok=True)
        plan, run = self.plan(), RunDir(folder)
        plans.write(plan, run.plan)
        start = {"at": "2026-11-21T06:00:00+00:00", "host": {"name": "node-1", "gpus": ["NVIDIA H100 80GB HBM3"] * 8}}
        start |= {"versions": {"python": "3.11.7", "torch": "2.13.0"}, "code": {"commit": "0e9e39f2", "dirty": False}}
        recorded = {"state": self.state, "starts": [start], "training_seconds": 5400.0, "peak_memory_bytes": 60 * GIB}
        run.manifest.write_text(json.dumps({**recorded, **self.manifest}))
        for path, lines in (
            (run.metrics, self.metrics(plan)),
            (run.warnings, self.warnings),
            (run.samples, self.samples),
        ):
            path.write_text("".join(json.dumps(with_text_for_non_finite(line)) + "\n" for line in lines))
        return read(run)


def with_text_for_non_finite(line: dict) -> dict:
    """NaN and Inf as text, as in `metrics.jsonl`, so that every line is valid JSON."""
    names = {math.inf: "Infinity", -math.inf: "-Infinity"}
    return {
        key: value if not isinstance(value, float) or math.isfinite(value) else names.get(value, "NaN")
        for key, value in line.items()
    }
