"""Compare this project with other trainers: same rows, model and hyperparameters, from command to saved model.

    benchmarks/baselines/install.sh FOLDER                        # once: LLaMA-Factory and ms-swift
    .venv/bin/python benchmarks/comparison.py [TRAINER …] [--baselines FOLDER] [--rounds 3] [--steps 40]
        [--rows ROWS] [--recipe 1b | 8b-lora] [--again]

On a CPU the tiny recipe; on a GPU `--recipe` sets one, with random weights and bf16 for all trainers. `--rows` is a
folder with train.jsonl and validation.jsonl, chats under `messages`; by default rows are generated.

Each round runs every trainer once, so that noise of the machine affects all of them, and ratios are taken within a
round; no trainer finds cached data. Times are read from the log lines as they arrive: a step from two lines without an
evaluation in between; an evaluation from the line of its step to its own; a save from the delay of the next line.
Preparation is the delay of the first step compared with a short second run that finds the rows prepared. The loss is
computed alike for every saved model: the mean over the completion tokens of the validation rows, in fp32. Each
completed run is written at once to `results/comparison-MACHINE.json`; runs of the same commit, versions, rows and steps
are kept. A trainer that fails is a row with its error.

The trainers differ in more than speed: only this project's restricts the loss to completion tokens by default, runs a
sanity check first, writes checksums and syncs checkpoints to disk.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
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
from bench import from_scratch

from sft_recipes.launch.topology import gpu_type_of, visible_gpus

REPOSITORY = machine.HERE.parent

LIBRARIES = ("torch", "transformers", "trl", "accelerate", "datasets")
EVERY = 5  # steps between two lines of a log
HELD_OUT, ROWS = 300, 12000
BASELINES = ("llamafactory", "ms-swift")
OURS = "sft-recipes"
GUIDE = "the documents' script"  # a key of the results files  # language: ok
_LABELS = {GUIDE: "SFT guide's script", f"{OURS}, with its trial": f"{OURS}, with sanity check"}
_STEP = re.compile(r"^step \d+/\d+ .* loss|'loss': ")
_EVALUATION = re.compile(r"eval_loss")


@dataclass(frozen=True)
class Job:
    """What each trainer gets: recipe, rows, model and number of steps."""

    recipe: str
    rows: Path
    model: Path
    steps: int
    examples_a_row: int  # that pack into one, for the trainer that cannot pack on a CPU

    @property
    def on_gpu(self) -> bool:
        """Whether the recipe is trained on a GPU, in bf16 and with activation recomputation."""
        return self.recipe != "tiny"

    @property
    def adapters(self) -> dict[str, int]:
        """LoRA's rank and alpha, on all linear layers; empty for full fine-tuning."""
        return {"r": 16, "alpha": 32} if self.recipe.endswith("lora") else {}

    @property
    def length(self) -> str:
        """Tokens per packed row."""
        return str(length_of(self.recipe))

    @property
    def rate(self) -> str:
        """The learning rate of all trainers."""
        return {"tiny": "2.0e-3", "1b": "5.0e-5", "8b-lora": "1.0e-4"}[self.recipe]

    @property
    def shared(self) -> dict[str, str]:
        """Arguments of transformers' Trainer, on which all baselines are built."""
        half = str(self.steps // 2)
        return {
            "learning_rate": self.rate, "weight_decay": "0.01", "lr_scheduler_type": "cosine",
            "per_device_train_batch_size": "4", "per_device_eval_batch_size": "4", "gradient_accumulation_steps": "8",
            "max_steps": str(self.steps), "logging_steps": str(EVERY), "logging_first_step": "true",
            "eval_steps": half, "save_steps": half,
        }  # fmt: skip


@dataclass(frozen=True)
class TrainerCommand:
    """A trainer: its command for an output folder, the path of its model, its environment."""

    command: Callable[[Job, Path], list[str]]
    model: Callable[[Path], Path]
    environment: dict[str, str]
    note: str


def main() -> int:
    """Run the trainers in turn; return 1 if one failed, whose last lines are in the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainers", nargs="*", metavar="TRAINER")
    parser.add_argument("--baselines", type=Path)
    parser.add_argument("--rounds", type=machine.at_least_one, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--recipe", default="tiny", choices=("tiny", "1b", "8b-lora"))
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    known = all_trainers(options.baselines)
    if wrong := _wrong(options, known):
        print(f"error: {wrong}", file=sys.stderr)
        return 2
    card = gpu_type_of(visible_gpus()) if options.recipe != "tiny" else None
    target = machine.results("comparison", f"{options.recipe}-{card}" if card else None)
    failed = set()
    with tempfile.TemporaryDirectory() as folder:
        job, held_out = _prepare(Path(folder), options)
        content = {
            **_begun(target, options, job),
            "left out": [name for name, trainer in known.items() if trainer is None],
        }
        for number in range(options.rounds):
            if number == len(content["rounds"]):
                content["rounds"].append({})
            for name, trainer in known.items():
                done = content["rounds"][number]
                if trainer is None or name in failed or name in done or name not in (options.trainers or known):
                    continue
                try:
                    done[name] = _round(trainer, job, Path(folder) / "run", held_out)
                except subprocess.CalledProcessError as error:
                    failed.add(name)
                    content["failed"][name] = f"{error.returncode}: {error.output.strip()[-300:]}"
                print(name, done.get(name, content["failed"].get(name)), flush=True)
                content["notes"][name] = trainer.note
                content["rows"] = {name: _summary(content, name) for name in known if known[name]}
                machine.write(target, content)
    print(table(content))
    print(f"written: {target.relative_to(REPOSITORY)}")
    return int(bool(failed))


def _wrong(options: argparse.Namespace, known: dict[str, TrainerCommand | None]) -> str | None:
    """What is wrong with the command line, or None."""
    for name in options.trainers:
        if known.get(name) is None:
            why = "is not installed (--baselines)" if name in known else "is unknown"
            available = "; ".join(name for name, trainer in known.items() if trainer)
            return f"TRAINER: {name!r} {why}: expected one of: {available}"
    if options.baselines and not any((options.baselines / baseline / "installed").is_file() for baseline in BASELINES):
        folder = options.baselines
        return f"--baselines: nothing is installed in {folder}. Run benchmarks/baselines/install.sh {folder}"
    absent = [
        name for name in ("train.jsonl", "validation.jsonl") if options.rows and not (options.rows / name).is_file()
    ]
    if absent:
        return f"--rows: {options.rows} has no {absent[0]}. Set a folder with train.jsonl and validation.jsonl"
    if options.steps < 4 * EVERY or options.steps % (2 * EVERY):
        return f"--steps: found {options.steps}, expected a multiple of {2 * EVERY}, at least {4 * EVERY}"
    return None


def _begun(target: Path, options: argparse.Namespace, job: Job) -> dict[str, Any]:
    """The results file, with the runs of the same commit, versions, rows and steps; failed ones are repeated."""
    circumstances = {
        "commit": machine.commit(),
        "versions": {name: metadata.version(name) for name in LIBRARIES},
        "steps": options.steps,
        "rows of": hashlib.sha256((job.rows / "train.jsonl").read_bytes()).hexdigest()[:16],
    }
    return {"rounds": [], "notes": {}, **machine.begun(target, options.again, **circumstances), "failed": {}}


def _round(trainer: TrainerCommand, job: Job, folder: Path, held_out: Path) -> dict[str, float]:
    """One run in a new folder, and a short second one that finds the rows prepared."""
    try:
        result = run(trainer, job, folder, "first")
        result["loss"] = _loss(trainer.model(folder / "first"), held_out)
        shutil.rmtree(folder / "first")
        cached = run(trainer, dataclasses.replace(job, steps=2 * EVERY), folder, "cached")
        result["preparation"] = round(max(result["first"] - cached["first"], 0), 2)
        return result
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def length_of(recipe: str) -> int:
    """Tokens per packed row."""
    return 512 if recipe == "tiny" else 2048


def all_trainers(baselines: Path | None) -> dict[str, TrainerCommand | None]:
    """All trainers by name; None if a baseline is not installed."""
    found: dict[str, TrainerCommand | None] = {
        OURS: TrainerCommand(
            _ours, lambda folder: folder / "final", {"SANITY": "skip"}, "this project, without sanity check"
        ),
        f"{OURS}, with its trial": TrainerCommand(
            _ours, lambda folder: folder / "final", {"SANITY": ""}, "as `make train` runs it"
        ),
        GUIDE: TrainerCommand(
            _sft_guide, lambda folder: folder / "final", {}, "repaired to run; bf16 weights, loss on all tokens"
        ),
        "trl sft": TrainerCommand(_trl, lambda folder: folder, {}, "stock; loss on all tokens"),
    }
    for name, baseline, make in (("LLaMA-Factory", "llamafactory", _llama_factory), ("ms-swift", "ms-swift", _swift)):
        found[name] = (
            make(baselines / baseline) if baselines and (baselines / baseline / "installed").is_file() else None
        )
    return found


def installed(baselines: str) -> list[str]:
    """The names of the trainers that can run here."""
    return [name for name, trainer in all_trainers(Path(baselines)).items() if trainer]


def _version(environment: Path, package: str) -> str:
    """The version that an environment has of a package."""
    arguments = [
        environment / "bin" / "python",
        "-c",
        f"from importlib import metadata; print(metadata.version({package!r}))",
    ]
    return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.strip()


def _prepare(folder: Path, options: argparse.Namespace) -> tuple[Job, Path]:
    """The rows as files, the initial model, and the validation rows as token ids and labels."""
    from sft_recipes.config import loader
    from sft_recipes.data import prepare
    from sft_recipes.data.toy import toy_dataset
    from sft_recipes.planner import plan as plans

    rows = folder / "rows"
    rows.mkdir()
    for split, held_out in (("train", False), ("validation", True)):
        if options.rows:
            shutil.copy(options.rows / f"{split}.jsonl", rows)
            continue
        lines = (json.dumps(row) + "\n" for row in toy_dataset.rows(HELD_OUT if held_out else ROWS, held_out))
        (rows / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    arguments = from_scratch(options.recipe) if options.recipe != "tiny" else ()
    data = (f"data.train={rows}/train.jsonl", f"data.validation={rows}/validation.jsonl")
    loaded = loader.load(options.recipe, [*arguments, *data, f"trainer.max_length={length_of(options.recipe)}"])
    prepared = prepare.prepare(plans.resolve(loaded, plans.Topology(gpus=0, processes=1)), folder / "prepared")
    details = json.loads((Path(prepared.folder) / "details.json").read_text())
    examples_a_row = round(details["train"]["examples"] / details["rows"])
    job = Job(options.recipe, rows, Path(str(prepared.model)), options.steps, examples_a_row)
    return job, Path(prepared.folder) / "validation"


def _ours(job: Job, output: Path) -> list[str]:
    half = job.steps // 2
    arguments = (
        f"data.train={job.rows}/train.jsonl", f"data.validation={job.rows}/validation.jsonl",
        f"model.name_or_path={job.model}", "model.from_scratch=false", "model.architecture={}",
        "batch.effective_batch_size=32", "batch.max_per_device_batch_size=4", "batch.min_optimizer_steps=1",
        "generation.show=0", "generation.score=0",
        f"trainer.learning_rate={job.rate}", "trainer.weight_decay=0.01",
        "allow_out_of_range=[effective_batch_size, learning_rate, weight_decay]", f"trainer.max_steps={job.steps}",
        f"trainer.logging_steps={EVERY}", f"trainer.eval_steps={half}", f"trainer.save_steps={half}",
    )  # fmt: skip
    hardware = ("--gpus", "1") if job.on_gpu else ()
    arguments = (*arguments, f"trainer.max_length={job.length}")
    return [sys.executable, "-m", "sft_recipes", "train", job.recipe, *hardware, "--name", output.name, *arguments]


def _sft_guide(job: Job, output: Path) -> list[str]:
    stock = {key: value for key, value in job.shared.items() if key != "lr_scheduler_type"}
    values = {**stock, "logging_first_step": "1", "warmup_steps": "0.1", "max_length": job.length}
    arguments = [f"{key}={value}" for key, value in values.items()]
    arguments += [f"lora_{key}={value}" for key, value in job.adapters.items()]
    script = machine.HERE / "baselines" / "sft_guide.py"
    return [sys.executable, str(script), str(job.model), str(job.rows), str(output), *arguments]


def _trl(job: Job, output: Path) -> list[str]:
    values = {
        **job.shared, "warmup_steps": "0.1", "max_length": job.length, "model_name_or_path": str(job.model),
        "dataset_name": str(job.rows), "dataset_test_split": "validation", "eval_strategy": "steps",
        "dtype": "float32", "bf16": str(job.on_gpu), "gradient_checkpointing": str(job.on_gpu),
        "report_to": "tensorboard", "output_dir": str(output),
        **({"use_peft": "True", "lora_target_modules": "all-linear"} if job.adapters else {}),
        **{f"lora_{key}": str(value) for key, value in job.adapters.items()},
    }  # fmt: skip
    arguments = [argument for key, value in values.items() for argument in (f"--{key}", value)]
    return [sys.executable, "-c", "from trl.cli import main; main()", "sft", *arguments, "--packing"]


def _llama_factory(environment: Path) -> TrainerCommand:
    def command(job: Job, output: Path) -> list[str]:
        import yaml

        tags = {f"{role}_tag": role for role in ("role", "content", "user", "assistant", "system")}
        kind = {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
        sets = {split: {"file_name": str(job.rows / f"{split}.jsonl"), **kind} for split in ("train", "validation")}
        (job.rows / "dataset_info.json").write_text(json.dumps(sets))
        values = {
            **{key: yaml.safe_load(value) for key, value in job.shared.items()},
            "model_name_or_path": str(job.model), "stage": "sft", "do_train": True,
            "finetuning_type": "lora" if job.adapters else "full",
            "dataset": "train", "eval_dataset": "validation", "dataset_dir": str(job.rows), "template": "chatml",
            "cutoff_len": int(job.length), "packing": True, "neat_packing": True, "eval_strategy": "steps",
            "warmup_steps": max(job.steps // 10, 1), "report_to": "tensorboard", "use_cpu": not job.on_gpu,
            "flash_attn": "auto" if job.on_gpu else "sdpa", "bf16": job.on_gpu,
            "disable_gradient_checkpointing": not job.on_gpu, "output_dir": str(output),
            **({"lora_target": "all", "lora_rank": job.adapters["r"], "lora_alpha": job.adapters["alpha"]}
               if job.adapters else {}),
        }  # fmt: skip
        file = output.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(values))
        return [str(environment / "bin" / "llamafactory-cli"), "train", str(file)]

    note = f"{_version(environment, 'llamafactory')}; neat packing; loss on completions"
    return TrainerCommand(command, lambda folder: folder, {"USE_MODELSCOPE_HUB": "0"}, note)


def _swift(environment: Path) -> TrainerCommand:
    def command(job: Job, output: Path) -> list[str]:
        micro_batch = str(4 * job.examples_a_row)
        values = {
            **job.shared, "per_device_train_batch_size": micro_batch, "per_device_eval_batch_size": micro_batch,
            "model": str(job.model), "model_type": "llama", "template": "chatml",
            "tuner_type": "lora" if job.adapters else "full",
            "torch_dtype": "bfloat16" if job.on_gpu else "float32", "dataset": str(job.rows / "train.jsonl"),
            "val_dataset": str(job.rows / "validation.jsonl"), "warmup_ratio": "0.1", "max_length": job.length,
            "eval_strategy": "steps", "add_version": "false", "use_cpu": str(not job.on_gpu).lower(),
            "gradient_checkpointing": str(job.on_gpu).lower(),
            "attn_impl": "sdpa", "report_to": "tensorboard", "output_dir": str(output),
            **({"target_modules": "all-linear", "lora_rank": str(job.adapters["r"]),
                "lora_alpha": str(job.adapters["alpha"])} if job.adapters else {}),
        }  # fmt: skip
        arguments = (argument for key, value in values.items() for argument in (f"--{key}", value))
        return [str(environment / "bin" / "swift"), "sft", *arguments]

    note = f"{_version(environment, 'ms-swift')}; not packed, equal tokens: its packing needs flash attention; "
    return TrainerCommand(command, lambda folder: folder / "last-checkpoint", {}, f"{note}loss on completions")


def run(trainer: TrainerCommand, job: Job, output: Path, name: str) -> dict[str, float]:
    """Train into `output`/`name`; return seconds in total, to the first step's line, per step, evaluation and save.

    Prepared data is cached below `output`, for another run.

    Raises:
        CalledProcessError: it failed; its last lines are printed.
    """
    output.mkdir(exist_ok=True)
    environment = {
        **os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": machine.python_path(REPOSITORY), "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(output / "cache"), "MODELSCOPE_CACHE": str(output / "cache"),
        "RUNS_DIR": str(output), "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0" if job.on_gpu else ""),
        **trainer.environment,
    }  # fmt: skip
    command = trainer.command(job, output / name)
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
        note = "".join(line for _, line in lines[-40:])
        print(note, file=sys.stderr)
        raise subprocess.CalledProcessError(process.returncode, command, note)
    return {"seconds": round(ended, 2), **of_log(lines)}


def of_log(lines: list[tuple[float, str]]) -> dict[str, float]:
    """Seconds from the times of log lines; the first interval is shorter and left out."""
    seen = [("evaluation" if _EVALUATION.search(line) else "step", at) for at, line in lines if _is_metrics(line)]
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


def _is_metrics(line: str) -> bool:
    return bool(_STEP.search(line) or _EVALUATION.search(line))


def _loss(model: Path, held_out: Path) -> float:
    """The mean loss over the completion tokens of the validation rows, in fp32."""
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


def _summary(content: dict[str, Any], name: str) -> dict[str, Any]:
    """Medians of a trainer, and ratios to this project within a round; or its failure."""
    rounds = [row for row in content["rounds"] if name in row]
    if not rounds:
        return {"failed": f"failed: {content['failed'][name]}" if name in content["failed"] else "not run"}
    keys = ("seconds", "first", "preparation", "step", "evaluation", "save", "loss")
    paired = [row for row in rounds if OURS in row]
    ratios = {
        f"{key} / ours": round(statistics.median(row[name][key] / row[OURS][key] for row in paired), 2)
        for key in ("seconds", "first", "step")
        if paired
    }
    medians = {key: statistics.median(row[name][key] for row in rounds) for key in keys}
    return {"runs": len(rounds), **medians, **ratios}


def table(content: dict[str, Any]) -> str:
    """The results as a table."""
    lines = [
        "| | runs | job, s | first step, s | of which preparation | step, s | evaluation, s | save, s "
        "| validation loss |",
        "|" + "---|" * 9,
    ]
    for name, row in content["rows"].items():
        if "failed" in row:
            lines.append(f"| {_LABELS.get(name, name)} | {' '.join(row['failed'].split())} |{' |' * 7}")
            continue
        cells = [f"{row['runs']}", f"{row['seconds']:.1f}{_times(row, 'seconds')}", f"{row['first']:.1f}"]
        cells += [f"{row['preparation']:.1f}", f"{row['step']:.3f}{_times(row, 'step')}"]
        cells += [f"{row['evaluation']:.2f}", f"{row['save']:.2f}", f"{row['loss']:.3f}"]
        lines.append(f"| {_LABELS.get(name, name)} | {' | '.join(cells)} |")
    notes = [f"{_LABELS.get(name, name)}: {note}." for name, note in content["notes"].items()]
    absent = [f"{name} was not installed." for name in content["left out"]]
    return "\n".join([*lines, "", " ".join([*notes, *absent])])


def _times(row: dict[str, Any], key: str) -> str:
    return f" ({row[f'{key} / ours']:.2f}x)" if f"{key} / ours" in row else ""


if __name__ == "__main__":
    sys.exit(main())
