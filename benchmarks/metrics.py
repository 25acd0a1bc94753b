"""Measures what a step pays for being measured and guarded, against stock SFTTrainer on the same rows in one process.

    .venv/bin/python benchmarks/metrics.py [--device cuda] [ROUNDS]

Two figures. The first is the time that a step spends in what this project adds to it (counts, meter, guards, digest,
trackers at log steps), clocked by a stopwatch round each of those functions, over the time of the step: exact on the
CPU, where nothing runs behind a call's back. The second is the ratio of step times, ours over stock's, in rounds that
alternate: it holds everything, and the machine's noise. Both log at every tenth step, to TensorBoard too.
Writes `results/metrics-HOST.json`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any

import machine

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
STEPS = 60
SKIPPED = 10  # of each round, to warm up
LOGGING_STEPS = 10
OVERRIDES = (f"trainer.max_steps={STEPS}", f"trainer.logging_steps={LOGGING_STEPS}", "trainer.eval_steps=100000",
             "trainer.save_steps=100000", "answers.show=0", "answers.exact_match=0")  # fmt: skip
SPENT: dict[str, float] = defaultdict(float)


def main() -> None:
    """Alternates rounds of both trainers and writes the results file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rounds", nargs="?", type=int, default=6)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parsed = parser.parse_args()
    if parsed.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    seconds: dict[str, list[float]] = {"stock": [], "ours": []}
    with tempfile.TemporaryDirectory() as place:
        prepared = _prepare(Path(place), parsed.device)
        _clock_what_is_added()
        for number in range(parsed.rounds):
            for name, build in (("stock", _stock), ("ours", _ours)):
                seconds[name] += _steps(build(Path(place) / f"{name}-{number}", *prepared))
            print({name: f"{statistics.median(times) * 1000:.2f} ms" for name, times in seconds.items()}, flush=True)
    _write(parsed, seconds)


def _prepare(place: Path, device: str) -> tuple[Any, Any]:
    from sft_recipes.data.prepare import prepare
    from sft_recipes.planning import plan as plans
    from sft_recipes.planning import recipes
    from sft_recipes.planning.plan import Topology
    from sft_recipes.training.quiet import quiet

    quiet()
    gpus = 1 if device == "cuda" else 0
    plan = plans.make(recipes.load("tiny", OVERRIDES), Topology(gpus=gpus, processes=1))
    found = prepare(plan, place / "prepared")
    return plans.settle(plan, found), found


def _clock_what_is_added() -> None:
    """A stopwatch round each function that this project adds to a step; reductions over ranks are not met here."""
    from sft_recipes.training import trainer
    from sft_recipes.training.callbacks import guards, metrics, progress, stop, trackers
    from sft_recipes.training.divergence import Watch
    from sft_recipes.training.metering import Meter

    for owner, names in (
        (Watch, ("_look", "saw", "gradients")),
        (Meter, ("_before_forward", "_after_forward", "step_begins", "saw", "step_ends", "read")),
        (guards.Guard, ("on_step_end", "on_log")),
        (metrics.WriteMetrics, ("on_log",)),
        (progress.ShowProgress, ("on_step_end", "on_log")),
        (stop.StopTogether, ("on_step_end",)),
        (trackers.TensorBoard, ("figures",)),
    ):
        for name in names:
            setattr(owner, name, _clocked(getattr(owner, name), f"{owner.__name__}.{name}"))
    trainer.tokens_digest = _clocked(trainer.tokens_digest, "tokens_digest")


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

    from sft_recipes.planning.run_folder import RunFolder
    from sft_recipes.training import run

    folder.mkdir()
    parts = run.build(plan, RunFolder(folder), run.configure(plan, RunFolder(folder)), asdict(found))
    parts.trainer.say = parts.progress.say
    watchers = run.watchers(plan, RunFolder(folder), Path(found.folder), parts)
    parts.trainer.add_callbacks([one for one in watchers if type(one).__name__ != "KeepBest"])
    return parts.trainer


def _stock(folder: Path, plan: Any, found: Any) -> Any:
    """TRL's trainer with the same model, rows, collator and arguments, logging to TensorBoard."""
    from transformers import PrinterCallback
    from trl import SFTTrainer

    from sft_recipes.data.tokenizer import load_tokenizer
    from sft_recipes.planning.run_folder import RunFolder, read_json
    from sft_recipes.training import run, trainer

    folder.mkdir()
    arguments = run.configure(plan, RunFolder(folder))
    arguments.report_to, arguments.eval_strategy = ["tensorboard"], "no"
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder)
    tokenizer = load_tokenizer(found.model, None, False)
    details = read_json(Path(found.folder) / "details.json")
    rows, _, _ = trainer.read_rows(Path(found.folder), details, plan.per_device_train_batch_size)
    stock = SFTTrainer(
        run.load_model(plan, found.model), arguments, train_dataset=rows, processing_class=tokenizer,
        data_collator=trainer.collator(plan, tokenizer.pad_token_id),
    )  # fmt: skip
    stock.remove_callback(PrinterCallback)
    return stock


def _steps(subject: Any) -> list[float]:
    """Seconds of each step of a short training, the first ones left out."""
    from transformers import TrainerCallback

    ends: list[float] = []

    class Stopwatch(TrainerCallback):  # type: ignore[misc]
        """An instant at each step's beginning, which the last step's log record lies before."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    subject.add_callback(Stopwatch())
    subject.train()
    return [after - now for now, after in zip(ends[SKIPPED:], ends[SKIPPED + 1 :], strict=False)]


def _write(parsed: argparse.Namespace, seconds: dict[str, list[float]]) -> None:
    steps = parsed.rounds * STEPS
    step = statistics.median(seconds["ours"])
    parts = {name: spent / steps for name, spent in SPENT.items() if spent}
    result = {
        "machine": machine.described(),
        "device": parsed.device,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "trl", "accelerate")},
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, capture_output=True, text=True, check=False
        ).stdout.strip(),
        "recipe": "tiny", "rounds": parsed.rounds, "steps_a_round": STEPS, "logging_steps": LOGGING_STEPS,
        "step_milliseconds": {name: round(statistics.median(times) * 1000, 3) for name, times in seconds.items()},
        "added_milliseconds_a_step": {name: round(one * 1000, 4) for name, one in sorted(parts.items())},
        "added_share_of_a_step": round(sum(parts.values()) / step, 5),
        "ratio_of_step_times": round(step / statistics.median(seconds["stock"]), 4),
    }  # fmt: skip
    file = HERE / "results" / f"metrics-{os.cpu_count()}-cores{'' if parsed.device == 'cpu' else '-gpu'}.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    print(f"written: {file.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
