"""Measure the overhead of a training step over a minimal loop, for this project and for TRL's SFTTrainer.

    .venv/bin/python benchmarks/metrics.py [--device cuda] [ROUNDS]

Before each step of a trainer a minimal loop takes one step, with a separate model and optimizer and prepared batches:
forward over the supervised positions, backward, clip, step. Noise of the machine affects both, and the median ratio of
the pairs is reported. Also, what this project adds to a step (counts, meter, alerts, digest, trackers at log steps) is
timed function by function: exact on the CPU, where calls are synchronous. SFTTrainer gets our batches, attention and
scoring. Both trainers log at every tenth step, to TensorBoard too. The overhead hardly grows with the model, so a wider
one is measured too. Writes `results/metrics-HOST.json`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any

import machine

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from sft_recipes.launch.topology import gpu_type_of, visible_gpus  # noqa: E402

STEPS = 60
SKIPPED = 10  # of each round, to warm up
LOGGING_STEPS = 10
WIDE = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 2}
SIZES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {  # whose architecture, what is changed of it, words
    "tiny": ("tiny", {}, ()),
    "tiny, four times as wide": ("tiny", WIDE, ()),
}
ON_A_GPU = {"1b": ("1b", {"dtype": "bfloat16"}, ("precision=bf16", "trainer.max_length=2048"))}
OVERRIDES = (f"trainer.max_steps={STEPS}", f"trainer.logging_steps={LOGGING_STEPS}", "trainer.eval_steps=100000",
             "trainer.save_steps=100000", "generation.show=0", "generation.score=0")  # fmt: skip
SPENT: dict[str, float] = defaultdict(float)


def main() -> int:
    """Alternate rounds of both trainers and write the results file; return 2 if the device is not available."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rounds", nargs="?", type=machine.at_least_one, default=6)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parsed = parser.parse_args()
    if parsed.device == "cuda" and gpu_type_of(visible_gpus()) is None:
        print("error: --device: no supported GPU found. Set --device cpu", file=sys.stderr)
        return 2
    if parsed.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    _clock_what_is_added()
    rows = {}
    for size, of in (ON_A_GPU if parsed.device == "cuda" else SIZES).items():
        SPENT.clear()
        pairs: dict[str, list[tuple[float, float]]] = {"stock": [], "ours": []}
        with tempfile.TemporaryDirectory() as place:
            prepared = _prepare(Path(place), parsed.device, *of)
            for number in range(parsed.rounds):
                for name, build in (("stock", _stock), ("ours", _ours)):
                    loop = _MinimalLoop(_ours(Path(place) / f"bare-{name}-{number}", *prepared))
                    pairs[name] += _pairs(build(Path(place) / f"{name}-{number}", *prepared), loop)
                print(size, {name: f"{_ratio(steps):.3f}" for name, steps in pairs.items()}, flush=True)
        rows[size] = _summary(parsed.rounds * STEPS, pairs)
    _write(parsed, rows)
    return 0


def _prepare(place: Path, device: str, recipe: str, changed: dict[str, Any], words: tuple[str, ...]) -> tuple[Any, Any]:
    from sft_recipes.config import loader
    from sft_recipes.data.prepare import prepare
    from sft_recipes.planner import plan as plans
    from sft_recipes.planner.plan import Topology
    from sft_recipes.training.library_logging import silence_libraries

    silence_libraries()
    architecture = json.dumps({**loader.load(recipe).model.architecture, **changed})
    loaded = loader.load("tiny", [*OVERRIDES, f"model.architecture={architecture}", *words])
    plan = plans.resolve(loaded, Topology(gpus=1 if device == "cuda" else 0, processes=1))
    found = prepare(plan, place / "prepared")
    return plans.with_prepared_data(plan, found), found


def _clock_what_is_added() -> None:
    """Time each function that this project adds to a step; reductions over ranks are not included."""
    from sft_recipes.training.callbacks import alerts, console, graceful_stop, metrics, trackers
    from sft_recipes.training.nan_guard import NanGuard
    from sft_recipes.training.throughput import ThroughputMeter

    for owner, names in (
        (NanGuard, ("_record_non_finite", "check_loss", "check_gradients")),
        (ThroughputMeter, ("begin_step", "add_batches", "end_step", "read")),
        (alerts.AlertCallback, ("on_step_end", "on_log")),
        (metrics.MetricsCallback, ("on_log",)),
        (console.ConsoleCallback, ("on_step_end", "on_log")),
        (graceful_stop.GracefulStopCallback, ("on_step_end",)),
        (trackers.TensorBoard, ("on_log",)),
    ):
        for name in names:
            setattr(owner, name, _clocked(getattr(owner, name), f"{owner.__name__}.{name}"))


def _clocked(function: Any, name: str) -> Any:
    @functools.wraps(function)
    def clocked(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            SPENT[name] += time.perf_counter() - began

    return clocked


def _ours(folder: Path, plan: Any, found: Any) -> Any:
    """As a run builds it, with every callback of one."""
    from dataclasses import asdict

    from sft_recipes.runtime.run_dir import RunDir
    from sft_recipes.training import main

    folder.mkdir()
    trainer = main.build(plan, RunDir(folder), main.configure(plan, RunDir(folder)), asdict(found))
    trainer.add_callbacks([one for one in main.make_callbacks() if type(one).__name__ != "RetentionCallback"])
    return trainer


def _stock(folder: Path, plan: Any, found: Any) -> Any:
    """TRL's trainer with the same model, rows, collator and arguments, logging to TensorBoard."""
    from transformers import PrinterCallback
    from trl import SFTTrainer

    from sft_recipes.data.tokenizer import load_tokenizer
    from sft_recipes.runtime.run_dir import RunDir, read_json
    from sft_recipes.training import attention, dataset, main
    from sft_recipes.training import model as training_model

    folder.mkdir()
    arguments = main.configure(plan, RunDir(folder))
    arguments.report_to, arguments.eval_strategy = ["tensorboard"], "no"
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder)
    tokenizer = load_tokenizer(found.model, None, False)
    details = read_json(Path(found.folder) / "details.json")
    rows, _, _ = dataset.read_rows(Path(found.folder), details, plan.per_device_train_batch_size)
    model = training_model.load_model(plan, found.model)
    way = attention.select(plan, model).name
    stock = SFTTrainer(
        model, arguments, train_dataset=rows, processing_class=tokenizer,
        data_collator=dataset.make_collator(plan, tokenizer.pad_token_id, way),
    )  # fmt: skip
    stock.remove_callback(PrinterCallback)
    return stock


class _MinimalLoop:
    """A minimal training loop over the model and batches of a trainer that is never started."""

    def __init__(self, subject: Any):
        loader = iter(subject.get_train_dataloader())
        self.batches = [[next(loader) for _ in range(subject.args.gradient_accumulation_steps)] for _ in range(STEPS)]
        self.subject, self.model = subject, subject.model.to(subject.args.device).train()
        subject.create_optimizer()
        self.optimizer = subject.optimizer

    def step(self, number: int) -> float:
        """Seconds of one step."""
        import torch

        _wait_for(self.subject)
        began = time.perf_counter()
        batches = self.batches[number]
        supervised = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        for batch in batches:
            labels = batch["labels"][:, 1:]
            inputs = {key: batch[key] for key in batch if key not in ("labels", "row")}
            with self.subject.compute_loss_context_manager():
                states = self.model.model(**inputs, use_cache=False)[0][:, :-1]
                logits = self.model.lm_head(states[labels != -100])
            loss = torch.nn.functional.cross_entropy(logits.float(), labels[labels != -100], reduction="sum")
            (loss / supervised).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.subject.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        _wait_for(self.subject)
        return time.perf_counter() - began


def _wait_for(subject: Any) -> None:
    import torch

    if subject.args.device.type == "cuda":
        torch.cuda.synchronize()


def _pairs(subject: Any, loop: _MinimalLoop) -> list[tuple[float, float]]:
    """Seconds of each step of a short training and of the minimal step before it, without the first ones."""
    from transformers import TrainerCallback

    steps: list[tuple[float, float]] = []

    class Stopwatch(TrainerCallback):  # type: ignore[misc]
        """From the start of a step to that of the next, logging included."""

        began: float | None = None

        def on_step_begin(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
            _wait_for(subject)
            if self.began is not None:
                steps.append((time.perf_counter() - self.began, self.bare))
            self.bare = loop.step(state.global_step)
            self.began = time.perf_counter()

    subject.add_callback(Stopwatch())
    subject.train()
    return steps[SKIPPED:]


def _ratio(pairs: list[tuple[float, float]]) -> float:
    return statistics.median(step / bare for step, bare in pairs)


def _summary(steps: int, pairs: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    milliseconds = {name: statistics.median(step for step, _ in of) * 1000 for name, of in pairs.items()}
    milliseconds["bare"] = statistics.median(bare for _, bare in pairs["ours"]) * 1000
    parts = {name: spent / steps for name, spent in SPENT.items() if spent}
    return {
        "step_milliseconds": {name: round(one, 3) for name, one in milliseconds.items()},
        "added_milliseconds_a_step": {name: round(one * 1000, 4) for name, one in sorted(parts.items())},
        "added_share_of_a_step": round(sum(parts.values()) * 1000 / milliseconds["ours"], 5),
        "step_over_a_bare_one": {name: round(_ratio(of), 4) for name, of in pairs.items()},
    }


def _write(parsed: argparse.Namespace, rows: dict[str, Any]) -> None:
    result = {
        "machine": machine.described(),
        "device": parsed.device,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "trl", "accelerate")},
        "commit": machine.commit(),
        "rounds": parsed.rounds, "steps_a_round": STEPS, "logging_steps": LOGGING_STEPS, "rows": rows,
    }  # fmt: skip
    file = machine.results("metrics", gpu_type_of(visible_gpus()) if parsed.device == "cuda" else None)
    machine.write(file, result)
    print(json.dumps(result, indent=2))
    print(f"written: {file.relative_to(REPOSITORY)}")


def table(content: dict[str, Any]) -> str:
    """The rows as a table."""
    lines = [
        "| | minimal step, ms | this project | TRL's trainer | added by this project, share of a step |",
        "|---|---|---|---|---|",
    ]
    for name, row in content["rows"].items():
        over = row["step_over_a_bare_one"]
        lines.append(
            f"| {name} | {row['step_milliseconds']['bare']:.0f} | {over['ours']:.3f}x | {over['stock']:.3f}x "
            f"| {row['added_share_of_a_step']:.2%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
