"""This project beside what a user would run instead: same rows, model and hyperparameters, from command to saved model.

    benchmarks/peers/install.sh PEERS                             # once: LLaMA-Factory and ms-swift
    .venv/bin/python benchmarks/beside.py [--peers PEERS] [--rounds 3] [--steps 40] [--recipe 1b]

On a CPU the tiny recipe; with a GPU and `--recipe 1b` that one, from random weights (not run yet: no GPU was at hand).

Each round runs every way once, so that a machine that slows down slows all of them, and ratios are taken within a
round; every way prepares its rows anew. Instants are those at which a line of its log came: of a step, between two
lines with no evaluation in between; of an evaluation, from the line of its step to its own; of a save, what the next
line is late. Preparation is how much later the first step comes than in a last run that finds its rows prepared. The
loss is one measure for every saved model: the mean over the answers' tokens of the rows held out, in fp32.
Writes `results/beside-N-cores.json`, which names machine and versions.

The ways differ in what they do besides: only this project's look at the answers' tokens alone, try the run before it
begins (`with its trial`), write checksums and wait until the disk has them.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import machine

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
sys.path.insert(0, str(REPOSITORY))

from bench import from_scratch  # noqa: E402

from sft_recipes.launching.topology import card_of, visible_gpus  # noqa: E402

LIBRARIES = ("torch", "transformers", "trl", "accelerate", "datasets")
EVERY = 5  # steps between two lines of a log
HELD_OUT, ROWS = 300, 12000
EXAMPLES_A_ROW = 13  # of 512 tokens, for the way that cannot pack here
OURS = "sft-recipes"
_STEP = re.compile(r"^step \d+/\d+ .* loss|'loss': ")
_EVALUATION = re.compile(r"eval_loss")


@dataclass(frozen=True)
class Place:
    """Where a way finds the rows and the model, and what it is asked for."""

    recipe: str
    rows: Path
    model: Path
    steps: int

    @property
    def on_gpu(self) -> bool:
        """Whether the recipe is trained on a GPU, in bf16 and with activations computed again."""
        return self.recipe != "tiny"

    @property
    def length(self) -> str:
        """Tokens of a packed row."""
        return "2048" if self.on_gpu else "512"

    @property
    def shared(self) -> dict[str, str]:
        """What transformers' Trainer calls by these names, and all but ours are built on."""
        half = str(self.steps // 2)
        return {
            "learning_rate": "2.0e-3", "weight_decay": "0.01", "lr_scheduler_type": "cosine",
            "per_device_train_batch_size": "4", "per_device_eval_batch_size": "4", "gradient_accumulation_steps": "8",
            "max_steps": str(self.steps), "logging_steps": str(EVERY), "logging_first_step": "true",
            "eval_steps": half, "save_steps": half,
        }  # fmt: skip


@dataclass(frozen=True)
class Way:
    """How to train: the command for an output folder, where the model is behind it, the environment it needs."""

    command: Callable[[Place, Path], list[str]]
    model: Callable[[Path], Path]
    environment: dict[str, str]
    note: str


def main() -> None:
    """Runs all ways in turn and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--recipe", default="tiny")
    asked = parser.parse_args()
    ways = {name: way for name, way in every_way(asked.peers).items() if way is not None}
    with tempfile.TemporaryDirectory() as folder:
        place, held_out = _prepare(Path(folder), asked.recipe, asked.steps)
        rounds = []
        for number in range(asked.rounds):
            row = {}
            for at, (name, way) in enumerate(ways.items()):
                output = Path(folder) / f"{at}-{number}"
                row[name] = run(way, place, output, "anew")
                row[name]["loss"] = _loss(way.model(output / "anew"), held_out)
                print(name, row[name], flush=True)
            rounds.append(row)
        short = dataclasses.replace(place, steps=2 * EVERY)
        for at, (name, way) in enumerate(ways.items()):
            found = run(way, short, Path(folder) / f"{at}-{asked.rounds - 1}", "prepared")["first"]
            rounds[-1][name]["preparation"] = round(max(rounds[-1][name]["first"] - found, 0), 2)
    content = {
        "machine": machine.described(),
        "versions": {name: metadata.version(name) for name in LIBRARIES},
        "left out": [name for name, way in every_way(asked.peers).items() if way is None],
        "steps": asked.steps,
        "notes": {name: way.note for name, way in ways.items()},
        "rounds": rounds,
        "rows": {name: _summary(rounds, name) for name in ways},
    }
    card = card_of(visible_gpus()) if place.on_gpu else None
    named = f"{asked.recipe}-{card}" if card else f"{os.cpu_count()}-cores"
    target = HERE / "results" / f"beside-{named}.json"
    target.write_text(json.dumps(content, indent=2) + "\n")
    print(table(content))
    print(f"written: {target.relative_to(REPOSITORY)}")


def every_way(peers: Path | None) -> dict[str, Way | None]:
    """All ways by name; None where a peer is not installed."""
    found: dict[str, Way | None] = {
        OURS: Way(_ours, lambda folder: folder / "final", {"SANITY": "skip"}, "this project, without its trial"),
        f"{OURS}, with its trial": Way(
            _ours, lambda folder: folder / "final", {"SANITY": ""}, "as `make train` runs it: tried before it begins"
        ),
        "the documents' script": Way(
            _documents, lambda folder: folder / "final", {}, "repaired to run; bf16 weights, a loss over all tokens"
        ),
        "trl sft": Way(_trl, lambda folder: folder, {}, "stock; a loss over all tokens"),
        "LLaMA-Factory 0.9.5": None,
        "ms-swift 4.6.0": None,
    }
    if peers is not None and (peers / "llamafactory" / "installed").is_file():
        found["LLaMA-Factory 0.9.5"] = Way(
            lambda place, output: _llama_factory(peers / "llamafactory", place, output),
            lambda folder: folder, {"USE_MODELSCOPE_HUB": "0"}, "neat packing; a loss over answers",
        )  # fmt: skip
    if peers is not None and (peers / "ms-swift" / "installed").is_file():
        found["ms-swift 4.6.0"] = Way(
            lambda place, output: _swift(peers / "ms-swift", place, output),
            lambda folder: folder / "last-checkpoint", {},
            f"{4 * EXAMPLES_A_ROW} examples a micro-batch: its packing wants flash attention; a loss over answers",
        )  # fmt: skip
    return found


def _prepare(folder: Path, recipe: str, steps: int) -> tuple[Place, Path]:
    """The embedded rows as files, the model that all begin with, and the rows held out as token ids and labels."""
    from sft_recipes.data import embedded, prepare
    from sft_recipes.planning import plan as plans
    from sft_recipes.planning import recipes

    rows = folder / "rows"
    rows.mkdir()
    for split, held_out in (("train", False), ("validation", True)):
        lines = (json.dumps(row) + "\n" for row in embedded.rows(HELD_OUT if held_out else ROWS, held_out))
        (rows / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    words = from_scratch(recipe) if recipe != "tiny" else ()
    data = (f"data.train={rows}/train.jsonl", f"data.validation={rows}/validation.jsonl")
    loaded = recipes.load(recipe, [*words, *data, "trainer.max_length=512"])
    prepared = prepare.prepare(plans.make(loaded, plans.Topology(gpus=0, processes=1)), folder / "prepared")
    return Place(recipe, rows, Path(str(prepared.model)), steps), Path(prepared.folder) / "validation"


def _ours(place: Place, output: Path) -> list[str]:
    half = place.steps // 2
    words = (
        f"data.train={place.rows}/train.jsonl", f"data.validation={place.rows}/validation.jsonl",
        f"model.name_or_path={place.model}", "model.from_scratch=false", "model.architecture={}",
        "batch.effective_batch_size=32", "batch.per_device_at_most=4", "batch.min_optimizer_steps=1",
        "outside_range=[effective_batch_size, weight_decay]", "answers.show=0", "answers.exact_match=0",
        "trainer.learning_rate=2.0e-3", "trainer.weight_decay=0.01", f"trainer.max_steps={place.steps}",
        f"trainer.logging_steps={EVERY}", f"trainer.eval_steps={half}", f"trainer.save_steps={half}",
    )  # fmt: skip
    hardware = ("--gpus", "1") if place.on_gpu else ()
    words = (*words, f"trainer.max_length={place.length}")
    return [sys.executable, "-m", "sft_recipes", "train", place.recipe, *hardware, "--name", output.name, *words]


def _documents(place: Place, output: Path) -> list[str]:
    stock = {key: value for key, value in place.shared.items() if key != "lr_scheduler_type"}
    values = {**stock, "logging_first_step": "1", "warmup_steps": "0.1", "max_length": place.length}
    words = [f"{key}={value}" for key, value in values.items()]
    return [
        sys.executable,
        str(HERE / "peers" / "documents.py"),
        str(place.model),
        str(place.rows),
        str(output),
        *words,
    ]


def _trl(place: Place, output: Path) -> list[str]:
    values = {
        **place.shared, "warmup_steps": "0.1", "max_length": place.length, "model_name_or_path": str(place.model),
        "dataset_name": str(place.rows), "dataset_test_split": "validation", "eval_strategy": "steps",
        "dtype": "float32", "bf16": str(place.on_gpu), "gradient_checkpointing": str(place.on_gpu),
        "report_to": "tensorboard",
        "output_dir": str(output),
    }  # fmt: skip
    words = [word for key, value in values.items() for word in (f"--{key}", value)]
    return [str(Path(sys.executable).parent / "trl"), "sft", *words, "--packing"]


def _llama_factory(environment: Path, place: Place, output: Path) -> list[str]:
    import yaml

    tags = {f"{role}_tag": role for role in ("role", "content", "user", "assistant", "system")}
    kind = {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    sets = {split: {"file_name": str(place.rows / f"{split}.jsonl"), **kind} for split in ("train", "validation")}
    (place.rows / "dataset_info.json").write_text(json.dumps(sets))
    values = {
        **{key: yaml.safe_load(value) for key, value in place.shared.items()},
        "model_name_or_path": str(place.model), "stage": "sft", "do_train": True, "finetuning_type": "full",
        "dataset": "train", "eval_dataset": "validation", "dataset_dir": str(place.rows), "template": "chatml",
        "cutoff_len": int(place.length), "packing": True, "neat_packing": True, "eval_strategy": "steps",
        "warmup_steps": max(place.steps // 10, 1), "report_to": "tensorboard", "use_cpu": not place.on_gpu,
        "flash_attn": "auto" if place.on_gpu else "sdpa", "bf16": place.on_gpu,
        "disable_gradient_checkpointing": not place.on_gpu, "output_dir": str(output),
    }  # fmt: skip
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(values))
    return [str(environment / "bin" / "llamafactory-cli"), "train", str(file)]


def _swift(environment: Path, place: Place, output: Path) -> list[str]:
    micro_batch = str(4 * EXAMPLES_A_ROW)
    values = {
        **place.shared, "per_device_train_batch_size": micro_batch, "per_device_eval_batch_size": micro_batch,
        "model": str(place.model), "model_type": "llama", "template": "chatml", "tuner_type": "full",
        "torch_dtype": "bfloat16" if place.on_gpu else "float32", "dataset": str(place.rows / "train.jsonl"),
        "val_dataset": str(place.rows / "validation.jsonl"), "warmup_ratio": "0.1", "max_length": place.length,
        "eval_strategy": "steps", "add_version": "false", "use_cpu": str(not place.on_gpu).lower(),
        "gradient_checkpointing": str(place.on_gpu).lower(),
        "attn_impl": "sdpa", "report_to": "tensorboard", "output_dir": str(output),
    }  # fmt: skip
    return [
        str(environment / "bin" / "swift"),
        "sft",
        *(word for kv in values.items() for word in (f"--{kv[0]}", kv[1])),
    ]


def run(way: Way, place: Place, output: Path, name: str) -> dict[str, float]:
    """One training into `output`/`name`: seconds of all, to the first step's line, of a step, an evaluation, a save.

    What is prepared is kept below `output`, for another run to find.

    Raises:
        CalledProcessError: it did not end well; what it said is printed.
    """
    output.mkdir(exist_ok=True)
    environment = {
        **os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(output / "cache"), "MODELSCOPE_CACHE": str(output / "cache"),
        "RUNS_DIR": str(output), "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ""), **way.environment,
    }  # fmt: skip
    command = way.command(place, output / name)
    began, lines = time.monotonic(), []
    with subprocess.Popen(
        command,
        env=environment,
        cwd=output,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append((time.monotonic() - began, line))
    ended = time.monotonic() - began
    if process.returncode:
        print("".join(line for _, line in lines[-40:]), file=sys.stderr)
        raise subprocess.CalledProcessError(process.returncode, command)
    return {"seconds": round(ended, 2), **of_log(lines)}


def of_log(lines: list[tuple[float, str]]) -> dict[str, float]:
    """Seconds by the instants of a log's lines; the first two steps' lines are no pair, since it is shorter."""
    seen = [("evaluation" if _EVALUATION.search(line) else "step", at) for at, line in lines if _is_figure(line)]
    pairs = list(itertools.pairwise(seen[1:]))
    steps = [after[1] - before[1] for before, after in pairs if (before[0], after[0]) == ("step", "step")]
    found = {"first": round(seen[0][1], 2)}
    if not steps:
        return found
    found["step"] = round(statistics.median(steps) / EVERY, 4)
    evaluations = [after[1] - before[1] for before, after in pairs if (before[0], after[0]) == ("step", "evaluation")]
    late = [after[1] - before[1] for before, after in pairs if (before[0], after[0]) == ("evaluation", "step")]
    if evaluations and late:
        found["evaluation"] = round(statistics.median(evaluations), 3)
        found["save"] = round(max(statistics.median(late) - statistics.median(steps), 0), 3)
    return found


def _is_figure(line: str) -> bool:
    return bool(_STEP.search(line) or _EVALUATION.search(line))


def _loss(model: Path, held_out: Path) -> float:
    """The mean loss over the answers' tokens of the rows held out, in fp32."""
    import torch
    from datasets import load_from_disk
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    total, tokens = 0.0, 0
    for row in load_from_disk(str(held_out)):
        at = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            ids, labels = (torch.tensor(row[key][at : at + length]) for key in ("input_ids", "labels"))
            with torch.no_grad():
                logits = loaded(ids[None]).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum"))
            tokens += int((labels[1:] != -100).sum())
            at += length
    return round(total / tokens, 4)


def _summary(rounds: list[dict[str, dict[str, float]]], name: str) -> dict[str, Any]:
    """Medians of a way, and how many times as long as ours it takes within a round."""
    keys = ("seconds", "first", "step", "evaluation", "save", "loss")
    figures = {key: statistics.median(row[name][key] for row in rounds) for key in keys}
    ratios = {
        f"{key} / ours": round(statistics.median(row[name][key] / row[OURS][key] for row in rounds), 2)
        for key in ("seconds", "first", "step")
    }
    return {**figures, "preparation": rounds[-1][name]["preparation"], **ratios}


def table(content: dict[str, Any]) -> str:
    """The results as a table."""
    lines = [
        "| | whole job, s | to the first step, s | of it preparation | a step, s | an evaluation, s | a save, s "
        "| loss on held-out answers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in content["rows"].items():
        cells = [f"{row['seconds']:.1f} ({row['seconds / ours']:.2f}x)", f"{row['first']:.1f}"]
        cells += [f"{row['preparation']:.1f}", f"{row['step']:.3f} ({row['step / ours']:.2f}x)"]
        cells += [f"{row['evaluation']:.2f}", f"{row['save']:.2f}", f"{row['loss']:.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
