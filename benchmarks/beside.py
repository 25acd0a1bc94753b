"""This project beside what a user would run instead: same rows, model and hyperparameters, from command to saved model.

    benchmarks/peers/install.sh PEERS                             # once: LLaMA-Factory and ms-swift
    .venv/bin/python benchmarks/beside.py [WAY …] [--peers PEERS] [--rounds 3] [--steps 40] [--rows ROWS]
        [--recipe 1b | 8b-lora] [--again]

On a CPU the tiny recipe; on a GPU `--recipe` names one, which begins from random weights and in which all ways compute
in bf16. `--rows` is a folder with train.jsonl and validation.jsonl, chats under `messages`; without it rows are made.

Each round runs every way once, so that a machine that slows down slows all of them, and ratios are taken within a
round; every way prepares its rows anew. Instants are those at which a line of its log came: of a step, between two
lines with no evaluation in between; of an evaluation, from the line of its step to its own; of a save, what the next
line is late. Preparation is how much later the first step comes than in a short run behind it that finds the rows
prepared. The loss is one measure for every saved model: the mean over the answers' tokens of the rows held out, in
fp32. Each run that is done is written at once to `results/beside-MACHINE.json`; where some are there of the same
commit, versions, rows and steps, the rest is measured. A way that fails is a row that says so.

The ways differ in what they do besides: only this project's look at the answers' tokens alone, try the run before it
begins (`with its trial`), write checksums and wait until the disk has them.
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
PEERS = ("llamafactory", "ms-swift")
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
    examples_a_row: int  # that pack into one, for the way that cannot pack here

    @property
    def on_gpu(self) -> bool:
        """Whether the recipe is trained on a GPU, in bf16 and with activations computed again."""
        return self.recipe != "tiny"

    @property
    def adapters(self) -> dict[str, int]:
        """LoRA's rank and alpha, on all linear layers; nothing where all weights are trained."""
        return {"r": 16, "alpha": 32} if self.recipe.endswith("lora") else {}

    @property
    def length(self) -> str:
        """Tokens of a packed row."""
        return str(length_of(self.recipe))

    @property
    def rate(self) -> str:
        """The learning rate of all ways."""
        return {"tiny": "2.0e-3", "1b": "5.0e-5", "8b-lora": "1.0e-4"}[self.recipe]

    @property
    def shared(self) -> dict[str, str]:
        """What transformers' Trainer calls by these names, and all but ours are built on."""
        half = str(self.steps // 2)
        return {
            "learning_rate": self.rate, "weight_decay": "0.01", "lr_scheduler_type": "cosine",
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


def main() -> int:
    """Runs the ways that are asked for in turn; 1 where one failed, whose last words stand in the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", metavar="WAY")
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--rounds", type=machine.at_least_one, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--recipe", default="tiny", choices=("tiny", "1b", "8b-lora"))
    parser.add_argument("--again", action="store_true")
    asked = parser.parse_args()
    known = every_way(asked.peers)
    if wrong := _wrong(asked, known):
        print(f"error: {wrong}", file=sys.stderr)
        return 2
    card = gpu_type_of(visible_gpus()) if asked.recipe != "tiny" else None
    target = machine.results("beside", f"{asked.recipe}-{card}" if card else None)
    failed = set()
    with tempfile.TemporaryDirectory() as folder:
        place, held_out = _prepare(Path(folder), asked)
        content = {**_begun(target, asked, place), "left out": [name for name, way in known.items() if way is None]}
        for number in range(asked.rounds):
            if number == len(content["rounds"]):
                content["rounds"].append({})
            for name, way in known.items():
                done = content["rounds"][number]
                if way is None or name in failed or name in done or name not in (asked.ways or known):
                    continue
                try:
                    done[name] = _round(way, place, Path(folder) / "run", held_out)
                except subprocess.CalledProcessError as error:
                    failed.add(name)
                    content["failed"][name] = f"{error.returncode}: {error.output.strip()[-300:]}"
                print(name, done.get(name, content["failed"].get(name)), flush=True)
                content["notes"][name] = way.note
                content["rows"] = {name: _summary(content, name) for name in known if known[name]}
                machine.write(target, content)
    print(table(content))
    print(f"written: {target.relative_to(REPOSITORY)}")
    return int(bool(failed))


def _wrong(asked: argparse.Namespace, known: dict[str, Way | None]) -> str | None:
    """What of the command line cannot be done, in one line."""
    for name in asked.ways:
        if known.get(name) is None:
            why = "is not installed (--peers)" if name in known else "is none of them"
            return f"WAY: {name!r} {why}; there are: {'; '.join(name for name, way in known.items() if way)}"
    if asked.peers and not any((asked.peers / peer / "installed").is_file() for peer in PEERS):
        return f"--peers: nothing is installed in {asked.peers}; benchmarks/peers/install.sh {asked.peers} does it"
    absent = [name for name in ("train.jsonl", "validation.jsonl") if asked.rows and not (asked.rows / name).is_file()]
    if absent:
        return f"--rows: {asked.rows} has no {absent[0]}; name a folder with train.jsonl and validation.jsonl"
    if asked.steps < 4 * EVERY or asked.steps % (2 * EVERY):
        return f"--steps: {asked.steps}; wanted a multiple of {2 * EVERY}, at least {4 * EVERY}"
    return None


def _begun(target: Path, asked: argparse.Namespace, place: Place) -> dict[str, Any]:
    """The results file, with the runs of the same commit, versions, rows and steps; what failed is tried again."""
    circumstances = {
        "commit": machine.commit(),
        "versions": {name: metadata.version(name) for name in LIBRARIES},
        "steps": asked.steps,
        "rows of": hashlib.sha256((place.rows / "train.jsonl").read_bytes()).hexdigest()[:16],
    }
    return {"rounds": [], "notes": {}, **machine.begun(target, asked.again, **circumstances), "failed": {}}


def _round(way: Way, place: Place, folder: Path, held_out: Path) -> dict[str, float]:
    """One run of a way in a folder of its own, and a short one behind it that finds the rows prepared."""
    try:
        found = run(way, place, folder, "anew")
        found["loss"] = _loss(way.model(folder / "anew"), held_out)
        shutil.rmtree(folder / "anew")
        again = run(way, dataclasses.replace(place, steps=2 * EVERY), folder, "prepared")
        found["preparation"] = round(max(found["first"] - again["first"], 0), 2)
        return found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def length_of(recipe: str) -> int:
    """Tokens of a packed row."""
    return 512 if recipe == "tiny" else 2048


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
    }
    for name, peer, make in (("LLaMA-Factory", "llamafactory", _llama_factory), ("ms-swift", "ms-swift", _swift)):
        found[name] = make(peers / peer) if peers and (peers / peer / "installed").is_file() else None
    return found


def installed(peers: str) -> list[str]:
    """The names of the ways that can run here."""
    return [name for name, way in every_way(Path(peers)).items() if way]


def _version(environment: Path, package: str) -> str:
    """The version that an environment has of a package."""
    words = [
        environment / "bin" / "python",
        "-c",
        f"from importlib import metadata; print(metadata.version({package!r}))",
    ]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def _prepare(folder: Path, asked: argparse.Namespace) -> tuple[Place, Path]:
    """The rows as files, the model that all begin with, and the rows held out as token ids and labels."""
    from sft_recipes.config import loader
    from sft_recipes.data import prepare
    from sft_recipes.data.toy import toy_dataset
    from sft_recipes.planner import plan as plans

    rows = folder / "rows"
    rows.mkdir()
    for split, held_out in (("train", False), ("validation", True)):
        if asked.rows:
            shutil.copy(asked.rows / f"{split}.jsonl", rows)
            continue
        lines = (json.dumps(row) + "\n" for row in toy_dataset.rows(HELD_OUT if held_out else ROWS, held_out))
        (rows / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    words = from_scratch(asked.recipe) if asked.recipe != "tiny" else ()
    data = (f"data.train={rows}/train.jsonl", f"data.validation={rows}/validation.jsonl")
    loaded = loader.load(asked.recipe, [*words, *data, f"trainer.max_length={length_of(asked.recipe)}"])
    prepared = prepare.prepare(plans.resolve(loaded, plans.Topology(gpus=0, processes=1)), folder / "prepared")
    details = json.loads((Path(prepared.folder) / "details.json").read_text())
    examples_a_row = round(details["train"]["examples"] / details["rows"])
    place = Place(asked.recipe, rows, Path(str(prepared.model)), asked.steps, examples_a_row)
    return place, Path(prepared.folder) / "validation"


def _ours(place: Place, output: Path) -> list[str]:
    half = place.steps // 2
    words = (
        f"data.train={place.rows}/train.jsonl", f"data.validation={place.rows}/validation.jsonl",
        f"model.name_or_path={place.model}", "model.from_scratch=false", "model.architecture={}",
        "batch.effective_batch_size=32", "batch.max_per_device_batch_size=4", "batch.min_optimizer_steps=1",
        "generation.show=0", "generation.exact_match=0",
        f"trainer.learning_rate={place.rate}", "trainer.weight_decay=0.01",
        "allow_out_of_range=[effective_batch_size, learning_rate, weight_decay]", f"trainer.max_steps={place.steps}",
        f"trainer.logging_steps={EVERY}", f"trainer.eval_steps={half}", f"trainer.save_steps={half}",
    )  # fmt: skip
    hardware = ("--gpus", "1") if place.on_gpu else ()
    words = (*words, f"trainer.max_length={place.length}")
    return [sys.executable, "-m", "sft_recipes", "train", place.recipe, *hardware, "--name", output.name, *words]


def _documents(place: Place, output: Path) -> list[str]:
    stock = {key: value for key, value in place.shared.items() if key != "lr_scheduler_type"}
    values = {**stock, "logging_first_step": "1", "warmup_steps": "0.1", "max_length": place.length}
    words = [f"{key}={value}" for key, value in values.items()]
    words += [f"lora_{key}={value}" for key, value in place.adapters.items()]
    script = machine.HERE / "peers" / "documents.py"
    return [sys.executable, str(script), str(place.model), str(place.rows), str(output), *words]


def _trl(place: Place, output: Path) -> list[str]:
    values = {
        **place.shared, "warmup_steps": "0.1", "max_length": place.length, "model_name_or_path": str(place.model),
        "dataset_name": str(place.rows), "dataset_test_split": "validation", "eval_strategy": "steps",
        "dtype": "float32", "bf16": str(place.on_gpu), "gradient_checkpointing": str(place.on_gpu),
        "report_to": "tensorboard", "output_dir": str(output),
        **({"use_peft": "True", "lora_target_modules": "all-linear"} if place.adapters else {}),
        **{f"lora_{key}": str(value) for key, value in place.adapters.items()},
    }  # fmt: skip
    words = [word for key, value in values.items() for word in (f"--{key}", value)]
    return [sys.executable, "-c", "from trl.cli import main; main()", "sft", *words, "--packing"]


def _llama_factory(environment: Path) -> Way:
    def command(place: Place, output: Path) -> list[str]:
        import yaml

        tags = {f"{role}_tag": role for role in ("role", "content", "user", "assistant", "system")}
        kind = {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
        sets = {split: {"file_name": str(place.rows / f"{split}.jsonl"), **kind} for split in ("train", "validation")}
        (place.rows / "dataset_info.json").write_text(json.dumps(sets))
        values = {
            **{key: yaml.safe_load(value) for key, value in place.shared.items()},
            "model_name_or_path": str(place.model), "stage": "sft", "do_train": True,
            "finetuning_type": "lora" if place.adapters else "full",
            "dataset": "train", "eval_dataset": "validation", "dataset_dir": str(place.rows), "template": "chatml",
            "cutoff_len": int(place.length), "packing": True, "neat_packing": True, "eval_strategy": "steps",
            "warmup_steps": max(place.steps // 10, 1), "report_to": "tensorboard", "use_cpu": not place.on_gpu,
            "flash_attn": "auto" if place.on_gpu else "sdpa", "bf16": place.on_gpu,
            "disable_gradient_checkpointing": not place.on_gpu, "output_dir": str(output),
            **({"lora_target": "all", "lora_rank": place.adapters["r"], "lora_alpha": place.adapters["alpha"]}
               if place.adapters else {}),
        }  # fmt: skip
        file = output.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(values))
        return [str(environment / "bin" / "llamafactory-cli"), "train", str(file)]

    said = f"{_version(environment, 'llamafactory')}; neat packing; a loss over answers"
    return Way(command, lambda folder: folder, {"USE_MODELSCOPE_HUB": "0"}, said)


def _swift(environment: Path) -> Way:
    def command(place: Place, output: Path) -> list[str]:
        micro_batch = str(4 * place.examples_a_row)
        values = {
            **place.shared, "per_device_train_batch_size": micro_batch, "per_device_eval_batch_size": micro_batch,
            "model": str(place.model), "model_type": "llama", "template": "chatml",
            "tuner_type": "lora" if place.adapters else "full",
            "torch_dtype": "bfloat16" if place.on_gpu else "float32", "dataset": str(place.rows / "train.jsonl"),
            "val_dataset": str(place.rows / "validation.jsonl"), "warmup_ratio": "0.1", "max_length": place.length,
            "eval_strategy": "steps", "add_version": "false", "use_cpu": str(not place.on_gpu).lower(),
            "gradient_checkpointing": str(place.on_gpu).lower(),
            "attn_impl": "sdpa", "report_to": "tensorboard", "output_dir": str(output),
            **({"target_modules": "all-linear", "lora_rank": str(place.adapters["r"]),
                "lora_alpha": str(place.adapters["alpha"])} if place.adapters else {}),
        }  # fmt: skip
        words = (word for key, value in values.items() for word in (f"--{key}", value))
        return [str(environment / "bin" / "swift"), "sft", *words]

    said = f"{_version(environment, 'ms-swift')}; not packed, as many tokens: its packing wants flash attention; "
    return Way(command, lambda folder: folder / "last-checkpoint", {}, f"{said}a loss over answers")


def run(way: Way, place: Place, output: Path, name: str) -> dict[str, float]:
    """One training into `output`/`name`: seconds of all, to the first step's line, of a step, an evaluation, a save.

    What is prepared is kept below `output`, for another run to find.

    Raises:
        CalledProcessError: it did not end well; what it said last is printed, and its output.
    """
    output.mkdir(exist_ok=True)
    environment = {
        **os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": machine.python_path(REPOSITORY), "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(output / "cache"), "MODELSCOPE_CACHE": str(output / "cache"),
        "RUNS_DIR": str(output), "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0" if place.on_gpu else ""), **way.environment,
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
        said = "".join(line for _, line in lines[-40:])
        print(said, file=sys.stderr)
        raise subprocess.CalledProcessError(process.returncode, command, said)
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


def _summary(content: dict[str, Any], name: str) -> dict[str, Any]:
    """Medians of a way, and how many times as long as ours it takes within a round; or why there are none."""
    rounds = [row for row in content["rounds"] if name in row]
    if not rounds:
        return {"failed": f"failed: {content['failed'][name]}" if name in content["failed"] else "not run"}
    keys = ("seconds", "first", "preparation", "step", "evaluation", "save", "loss")
    beside = [row for row in rounds if OURS in row]
    ratios = {
        f"{key} / ours": round(statistics.median(row[name][key] / row[OURS][key] for row in beside), 2)
        for key in ("seconds", "first", "step")
        if beside
    }
    medians = {key: statistics.median(row[name][key] for row in rounds) for key in keys}
    return {"runs": len(rounds), **medians, **ratios}


def table(content: dict[str, Any]) -> str:
    """The results as a table."""
    lines = [
        "| | runs | whole job, s | to the first step, s | of it preparation | a step, s | an evaluation, s | a save, s "
        "| loss on held-out answers |",
        "|" + "---|" * 9,
    ]
    for name, row in content["rows"].items():
        if "failed" in row:
            lines.append(f"| {name} | {' '.join(row['failed'].split())} |{' |' * 7}")
            continue
        cells = [f"{row['runs']}", f"{row['seconds']:.1f}{_times(row, 'seconds')}", f"{row['first']:.1f}"]
        cells += [f"{row['preparation']:.1f}", f"{row['step']:.3f}{_times(row, 'step')}"]
        cells += [f"{row['evaluation']:.2f}", f"{row['save']:.2f}", f"{row['loss']:.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    notes = [f"{name}: {note}." for name, note in content["notes"].items()]
    absent = [f"{name} was not installed." for name in content["left out"]]
    return "\n".join([*lines, "", " ".join([*notes, *absent])])


def _times(row: dict[str, Any], key: str) -> str:
    return f" ({row[f'{key} / ours']:.2f}x)" if f"{key} / ours" in row else ""


if __name__ == "__main__":
    sys.exit(main())
