"""Data preparation at scale: time, processor time and memory by number of rows, compared with TRL and the tokenizer.

    SFT_GSM8K=train.jsonl SFT_TOKENIZER=tokenizer.json .venv/bin/python benchmarks/data_scale.py --rows 100000 1000000

The rows are chats of one to three turns, put together from the question/answer rows in `SFT_GSM8K`, each with a unique
number; `--short` takes one turn and the beginning of its texts. `SFT_TOKENIZER` is a `tokenizer.json` with ChatML's
tokens. Without them, the toy rows and a tokenizer trained on them stand in, and the results file says so. The ways:

- `ours`: `prepare.prepare`: reads JSONL, checks, renders, tokenizes, masks, holds rows out, compares both parts, packs,
  writes, hashes; all that a run needs.
- `TRL`: `load_dataset`, `train_test_split` of the same fraction, and what `SFTTrainer` does before training:
  assistant-only loss, packing `bfd`, `dataset_num_proc` = cores.
- `encoding`: `encode_batch` of the tokenizer, on all cores, of texts that are rendered already; keeps nothing.

Each runs in a separate process, in every round all of them, the first another one each time; imports are not timed,
since the trainer imports them anyway. Processor time includes the workers'. Memory is sampled ten times per second in
`/proc`: the largest process by resident memory, which includes pages of memory-mapped files, and by anonymous memory,
which the kernel cannot reclaim. Writes `results/data-scale-N-cores.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

WAYS = ("ours", "TRL", "encoding")
MAX_LENGTH = 4096
HELD_OUT = 0.02
TEXTS_PER_CALL = 1000


def main() -> None:
    """Measure every way at every number of rows and write the results file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--short", action="store_true", help="rows of one turn with short texts")
    parser.add_argument("--name", default="data-scale", help="of the results file, which keeps rounds of this commit")
    parser.add_argument("--run", choices=WAYS, help=argparse.SUPPRESS)  # in the process that is measured
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run(arguments.run, arguments.folder)))
        return
    import machine

    results = REPOSITORY / "benchmarks" / "results" / f"{arguments.name}-{os.cpu_count()}-cores.json"
    content = json.loads(results.read_text()) if results.is_file() else {"rows": {}}
    content["machine"] = {**machine.described(), "usable_cores": len(os.sched_getaffinity(0))}
    for count in arguments.rows:
        with tempfile.TemporaryDirectory(prefix="data-scale-") as name:
            folder = Path(name)
            content["rows_from"], content["tokenizer"] = write_model(folder), os.environ.get("SFT_TOKENIZER") or "toy"
            content["tokenizer"] = Path(content["tokenizer"]).name
            size = write_rows(folder / "rows.jsonl", count, arguments.short)
            key = f"{count}{' short' if arguments.short else ''}"
            earlier = content["rows"].get(key, {"commit": ""})
            rounds: list[dict[str, Any]] = earlier["rounds"] if earlier["commit"] == commit() else []
            for number in range(len(rounds), len(rounds) + arguments.rounds):
                shift = number % len(arguments.ways)
                ways = [*arguments.ways[shift:], *arguments.ways[:shift]]
                rounds.append({way: measure(way, folder) for way in ways})
                print(json.dumps({"rows": count, **rounds[-1]}), flush=True)
            content["rows"][key] = {"commit": commit(), "bytes": size, "ratios": ratios(rounds), "rounds": rounds}
        results.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {results.relative_to(REPOSITORY)}")


def ratios(rounds: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return how many times as long as ours each other way takes: the median over the rounds."""
    return {
        way: {
            key: round(statistics.median(one[way][key] / one["ours"][key] for one in rounds), 3)
            for key in ("seconds", "processor_seconds")
        }
        for way in rounds[0]
        if way != "ours" and "ours" in rounds[0]
    }


def table(content: dict[str, Any]) -> str:
    """Return the table for README.md: medians over the rounds, of memory the largest."""
    lines = [
        f"Rows from {content['rows_from']}, tokenizer {content['tokenizer']}.\n",
        "| rows | way | rounds | s | processor s | rows/s | time of ours | processor time of ours | peak memory, MiB: "
        "largest process | anonymous | anonymous, workers |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, size in content["rows"].items():
        for way in size["rounds"][0]:
            of_way = [one[way] for one in size["rounds"]]
            seconds, used = (statistics.median(one[key] for one in of_way) for key in ("seconds", "processor_seconds"))
            peaks = (
                max(one[f"peak_{key}_mib"] for one in of_way) for key in ("rss", "anonymous", "anonymous_of_workers")
            )
            times = size["ratios"].get(way, {"seconds": 1.0, "processor_seconds": 1.0})
            cells = (name, f"{way}, {of_way[0]['tokens']:,} tokens", len(of_way), f"{seconds:.0f}", f"{used:.0f}")
            speed = f"{int(name.split()[0]) / seconds:,.0f}"
            ratio = (f"{times['seconds']:.2f}x", f"{times['processor_seconds']:.2f}x")
            lines.append(f"| {' | '.join(map(str, (*cells, speed, *ratio, *peaks)))} |")
    return "\n".join(lines)


def commit() -> str:
    """Return the commit, with `+` if the working tree differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.strip()

    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "sft_recipes") else "")


def pairs() -> tuple[list[tuple[str, str]], str]:
    """Return questions with answers, and where they are from."""
    from sft_recipes.data.toy import toy_dataset

    if file := os.environ.get("SFT_GSM8K"):
        rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
        return [(row["question"], row["answer"]) for row in rows], Path(file).name
    chats = (row["messages"][-2:] for row in toy_dataset.rows(toy_dataset.TRAIN_ROWS, held_out=False))
    return [(question["content"], answer["content"]) for question, answer in chats], "toy rows"


def write_rows(file: Path, count: int, short: bool) -> int:
    """Write the chats and return the size of the file."""
    texts, draw = pairs()[0], random.Random(0)
    with file.open("w", encoding="utf-8") as lines:
        for number in range(count):
            messages = []
            for _ in range(1 if short else draw.choice((1, 1, 2, 2, 3))):
                question, answer = draw.choice(texts)
                question, answer = (question[:60], answer[:80].strip()) if short else (question, answer)
                messages.append({"role": "user", "content": f"{question} ({number})"})
                messages.append({"role": "assistant", "content": answer})
            lines.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return file.stat().st_size


def write_model(folder: Path) -> str:
    """Write a very small model with the tokenizer to `folder/model`; return where the rows are from."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from sft_recipes.data.toy import toy_model

    texts, origin = pairs()
    if file := os.environ.get("SFT_TOKENIZER"):
        special = {"eos_token": toy_model.END, "pad_token": toy_model.PADDING}
        added = [toy_model.START, toy_model.END_OF_TEXT]
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, additional_special_tokens=added, **special)
        tokenizer.chat_template = toy_model.CHAT_TEMPLATE
    else:
        tokenizer = toy_model.train_tokenizer((text for pair in texts for text in pair), 4096)
    tokenizer.save_pretrained(folder / "model")
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=MAX_LENGTH, **size)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    return origin


# Measuring, from outside


def measure(way: str, folder: Path) -> dict[str, Any]:
    """Run a way in a separate process; return its times, and the peak memory of its largest process."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    command = [sys.executable, __file__, "--run", way, "--folder", str(folder)]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, env=environment)
        peaks = {"rss": 0, "anonymous": 0, "anonymous_of_workers": 0}
        while process.poll() is None:
            for pid in family(process.pid):
                resident, anonymous = memory(pid)
                peaks["rss"] = max(peaks["rss"], resident)
                name = "anonymous" if pid == process.pid else "anonymous_of_workers"
                peaks[name] = max(peaks[name], anonymous)
            time.sleep(0.1)
        if process.returncode:
            sys.exit(f"{way}: exit code {process.returncode}")
        output.seek(0)
        measured: dict[str, Any] = json.loads(output.read().splitlines()[-1])
    subprocess.run(["rm", "-rf", str(folder / "cache"), str(folder / "store")], check=True)
    return measured | {f"peak_{name}_mib": round(kib / 1024) for name, kib in peaks.items()}


def family(pid: int) -> Iterator[int]:
    """Yield a process and its descendants."""
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from family(int(child))


def memory(pid: int) -> tuple[int, int]:
    """Return a process's resident and anonymous memory in KiB; zeros if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {line.split()[0]: int(line.split()[1]) for line in lines if line.startswith(("Rss", "VmRSS"))}
    return sizes.get("VmRSS:", 0), sizes.get("RssAnon:", 0)


# The ways, each in its own process


def run(way: str, folder: Path) -> dict[str, Any]:
    """Return the times of a way, and its tokens."""
    prepared = {"ours": ours, "TRL": trl, "encoding": encoding}[way](folder)
    next(prepared)  # imports
    before, started = processor_seconds(), time.perf_counter()
    tokens = next(prepared)
    seconds, used = time.perf_counter() - started, processor_seconds() - before
    return {"seconds": round(seconds, 2), "processor_seconds": round(used, 2), "tokens": tokens}


def processor_seconds() -> float:
    """Return the processor time of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def ours(folder: Path) -> Iterator[int]:
    """Prepare the rows as a run does."""
    import datasets  # noqa: F401  imports are not timed
    from transformers import AutoConfig, AutoTokenizer

    from sft_recipes.config import loader
    from sft_recipes.data import prepare
    from sft_recipes.planner import plan as plans
    from sft_recipes.planner.plan import Topology

    data = [f"data.train={folder / 'rows.jsonl'}", "data.validation=", f"data.validation_fraction={HELD_OUT}"]
    model = [f"model.name_or_path={folder / 'model'}", "model.from_scratch=false", f"trainer.max_length={MAX_LENGTH}"]
    plan = plans.resolve(loader.load("tiny", [*data, *model, "data.max_eval_samples=null"]), Topology(0, 1))
    AutoConfig.from_pretrained(folder / "model"), AutoTokenizer.from_pretrained(folder / "model")  # imports torch
    yield 0
    prepared = prepare.prepare(plan, folder / "store")
    details = json.loads((Path(prepared.folder) / "details.json").read_text())
    yield details["train"]["tokens"] + details["validation"]["tokens"]


def trl(folder: Path) -> Iterator[int]:
    """Load, split and prepare the rows as a script with `SFTTrainer` does."""
    import datasets
    from data import MARKED_TEMPLATE
    from transformers import AutoTokenizer, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = (kind.from_pretrained(folder / "model") for kind in (LlamaForCausalLM, AutoTokenizer))
    tokenizer.chat_template = MARKED_TEMPLATE
    settings = SFTConfig(
        output_dir=str(folder / "trl"),
        max_length=MAX_LENGTH,
        packing=True,
        packing_strategy="bfd",
        eval_packing=True,
        assistant_only_loss=True,
        dataset_num_proc=len(os.sched_getaffinity(0)),
        eval_strategy="epoch",
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    datasets.disable_progress_bars()
    yield 0
    rows = datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
    parts = rows.train_test_split(HELD_OUT, seed=0)
    sets = {"train_dataset": parts["train"], "eval_dataset": parts["test"]}
    trainer = SFTTrainer(model=model, args=settings, processing_class=tokenizer, **sets)
    yield sum(sum(map(sum, each["seq_lengths"])) for each in (trainer.train_dataset, trainer.eval_dataset))


def encoding(folder: Path) -> Iterator[int]:
    """Encode the texts only, in batches, on all cores; reading and rendering are not timed."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    texts = []
    with (folder / "rows.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            texts.append(tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False))
    encode = tokenizer.backend_tokenizer.encode_batch
    yield 0
    tokens = 0
    for first in range(0, len(texts), TEXTS_PER_CALL):
        tokens += sum(map(len, encode(texts[first : first + TEXTS_PER_CALL], add_special_tokens=False)))
    yield tokens


if __name__ == "__main__":
    main()
