"""Measure end-to-end training, from the command to the last step: throughput and memory.

    make bench                                                    # every case that fits this machine
    .venv/bin/python benchmarks/bench.py [CASE …] [--repeats 3] [--again]
    .venv/bin/python benchmarks/bench.py --ablations              # one option changed at a time

A case is one `train RECIPE` of 25 steps on a model with random weights; the first five steps are left out. Cases
alternate over the repeats. Each completed run is written at once to `results/bench-MACHINE.json` (ablations:
`ablations-MACHINE.json`); runs of the same commit are kept and only missing ones measured, unless `--again` is set.
On a GPU a run is terminated after its last step, before it saves: checkpoints of 8B need 200 GB of disk, and
`saving.py` measures the cost of a save.

FLOPs per token are counted in two ways: causal (`planner/cost.py`: weights that are multiplied, the output layer for
supervised tokens, causal attention by the lengths that examples have) and by PaLM's formula (arXiv:2204.02311, appendix
B: all weights, attention over whole rows). Utilization is relative to the data sheet's bf16 FLOP/s, and to
what one large matrix product reaches on this machine. HFU includes recomputed activations.
"""

from __future__ import annotations

import argparse
import json
import math
import operator
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from sft_recipes.config import gpu_types, loader  # noqa: E402
from sft_recipes.launch.topology import ask_nvidia, gpu_type_of, plan_topology, visible_gpus  # noqa: E402
from sft_recipes.planner import cost  # noqa: E402
from sft_recipes.planner import plan as plans  # noqa: E402
from sft_recipes.planner.plan import Plan  # noqa: E402

STEPS, WARM_UP = 25, 5
ROWS, MEAN_TOKENS = Path(tempfile.gettempdir()) / f"sft-recipes-benchmark-rows-{os.getuid()}", 1374
DEFAULT = "as shipped"
CACHED, PREPARED = "found", "prepared anew"  # keys of the results files  # language: ok
_DATA = {CACHED: "cached", PREPARED: "prepared"}
SHORT = (
    "trainer.eval_steps=1000", "trainer.save_steps=1000", "trainer.logging_steps=1", "generation.show=0",
    "generation.score=0", "data.max_eval_samples=50", "batch.min_optimizer_steps=1",
)  # fmt: skip
# What has a recipe for more GPUs fit on one of 141 GB.
ON_ONE_GPU = {"8b": ("parallelism=single", "trainer.optim=adamw_8bit"), "3b": ("parallelism=single",)}
# Python runs a module of this name, where it finds one, before anything else. A run that is ended before it saves needs
# no room for its saves.
_ANY_DISK = """
import sys
if "train" in sys.orig_argv:
    from sft_recipes.launch import topology
    topology.check_disk = lambda _plan, _folder: None
"""
_SPEEDS = ("padded_tokens_per_second", "tokens_per_second", "supervised_tokens_per_second")
# A matrix product that is large enough to reach what the device can, in the precision that recipes train in.
_PRODUCT = """
import sys, time, torch
on_gpu = torch.cuda.is_available()
size, kind, device = (8192, torch.bfloat16, "cuda") if on_gpu else (2048, torch.float32, "cpu")
left, right = (torch.randn(size, size, dtype=kind, device=device) for _ in range(2))
def seconds():
    began = time.perf_counter()
    left @ right
    if on_gpu: torch.cuda.synchronize()
    return time.perf_counter() - began
print(2 * size**3 / sorted(seconds() for _ in range(30))[3])
"""


@dataclass(frozen=True)
class Case:
    """A recipe, and what is changed of it."""

    recipe: str
    options: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


def cases(on_gpu: bool) -> dict[str, Case]:
    """What is measured, by name."""
    if not on_gpu:
        return {
            "tiny": Case("tiny"),
            "tiny, not packed": Case("tiny", words=("trainer.packing=false",)),
            "tiny, two ranks": Case("tiny", options=("--processes", "2")),
            **{
                f"tiny, two ranks, {said}": Case("tiny", ("--processes", "2"), (f"parallelism={engine}",))
                for said, engine in (("ZeRO-2", "zero2"), ("ZeRO-3", "zero3"), ("FSDP2", "fsdp2"))
            },
        }
    found = {}
    for name in ("1b", "3b", "8b", "8b-lora"):
        for length in (2048, 4096, 8192, 16384):
            for packing in (True, False) if length == 4096 else (True,):
                said = f"{name}, {length // 1024}k{'' if packing else ', not packed'}"
                words = (*as_many_tokens(name, length), f"trainer.packing={str(packing).lower()}")
                found[said] = Case(name, ("--gpus", "1"), (*from_scratch(name), *words, *ON_ONE_GPU.get(name, ())))
    for name in ("1b", "3b"):  # what a card of 141 GB has room for
        words = (*as_many_tokens(name, 4096), "trainer.gradient_checkpointing=false", *from_scratch(name))
        found[f"{name}, 4k, activations kept"] = Case(name, ("--gpus", "1"), (*words, *ON_ONE_GPU.get(name, ())))
    return found


def own_plan(name: str) -> plans.Plan:
    """The plan of a recipe on the hardware that it names."""
    recipe = loader.load(name)
    return plans.resolve(recipe, plan_topology(recipe))


def as_many_tokens(name: str, length: int) -> tuple[str, ...]:
    """Rows of this length, as many that a step and a forward pass have the tokens that the recipe's own have."""
    plan = own_plan(name)
    rows = {
        "effective_batch_size": plan.effective_batch_size,
        "max_per_device_batch_size": plan.per_device_train_batch_size,
    }
    words = [f"batch.{key}={max(many * plan.max_length // length, 1)}" for key, many in rows.items()]
    return (f"trainer.max_length={length}", *words, "allow_out_of_range=[effective_batch_size]")


def ablations(on_gpu: bool) -> dict[str, Case]:
    """The default, and one changed option per case; docs/design/decisions.md has the conclusions."""
    name, options, words = ("1b", ("--gpus", "1"), from_scratch("1b")) if on_gpu else ("tiny", (), ())
    plan = own_plan(name)
    most, recomputes = plan.per_device_train_batch_size, plan.sections.trainer["gradient_checkpointing"]
    words = (*words, f"batch.max_per_device_batch_size={most}", f"trainer.gradient_checkpointing={recomputes}".lower())
    larger = () if on_gpu else (f"batch.effective_batch_size={2 * most}", "allow_out_of_range=[effective_batch_size]")
    changed: dict[str, tuple[str, ...]] = {
        DEFAULT: (),
        "masked attention (sdpa)": ("model.attention=sdpa",),
        "eager attention": ("model.attention=eager",),
        f"checkpointing {'off' if recomputes else 'on'}": (
            f"trainer.gradient_checkpointing={str(not recomputes).lower()}",
        ),
        "half the micro-batch": (f"batch.max_per_device_batch_size={max(most // 2, 1)}",),
        "twice the micro-batch": (f"batch.max_per_device_batch_size={2 * most}", *larger),
        "torch.compile": ("trainer.torch_compile=true",),
        "AdamW not fused": ("trainer.optim=adamw_torch",),
    }
    if not on_gpu:
        changed["a data worker"] = ("trainer.dataloader_num_workers=1",)
    else:
        changed["no data workers"] = ("trainer.dataloader_num_workers=0",)
        changed["no fused kernels"] = ("model.fused_kernels=false",)
        changed["attention by varlen"] = ("model.attention=varlen",)
        changed["flash-attn 2"] = ("model.attention=flash_attention_2",)  # instead of 3, where that is installed
        changed["ZeRO-2"], changed["FSDP2"] = ("parallelism=zero2",), ("parallelism=fsdp2",)
        changed["ZeRO-3"], changed["ZeRO-3, offload"] = ("parallelism=zero3",), ("parallelism=zero3_offload",)
    found = {label: Case(name, options, (*words, *more)) for label, more in changed.items()}
    if on_gpu:
        found["no expandable segments"] = Case(name, options, words, (("PYTORCH_CUDA_ALLOC_CONF", ""),))
    return found


def from_scratch(name: str) -> tuple[str, ...]:
    """Overrides that train a recipe's architecture from random weights, on generated rows."""
    architecture = {
        **loader.load(name).model.architecture, "max_position_embeddings": 16384, "dtype": "bfloat16"
    }  # fmt: skip
    return (
        "model.name_or_path=", "model.from_scratch=true", f"model.architecture={json.dumps(architecture)}",
        f"data.train={ROWS / 'train.jsonl'}", f"data.validation={ROWS / 'validation.jsonl'}",
    )  # fmt: skip


def write_rows() -> None:
    """Chats as long as those that the recipes are made for, once a machine: their mean is UltraChat's
    (docs/models.md), their spread a guess: log-normal, so that one in twenty is four times as long as the middle one.
    """
    if (ROWS / "validation.jsonl").is_file():
        return
    ROWS.mkdir(parents=True, exist_ok=True)
    draw, spread = random.Random(0), 0.85
    known = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(20_000)]
    for split, many in (("train", 6000), ("validation", 100)):
        with (ROWS / f"{split}.jsonl").open("w") as file:
            for _ in range(many):
                length = max(int(draw.lognormvariate(math.log(MEAN_TOKENS) - spread**2 / 2, spread)), 16)
                asked, answered = (" ".join(draw.choices(known, k=part)) for part in (length // 4, length * 3 // 4))
                turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
                print(json.dumps({"messages": turns}), file=file)


def main() -> int:
    """Measure the requested cases; return 1 if a run failed, whose last line is in the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--repeats", type=machine.at_least_one, default=3)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--ablations", action="store_true")
    options = parser.parse_args()
    card = gpu_type_of(visible_gpus())
    known = ablations(card is not None) if options.ablations else cases(card is not None)
    if unknown := [name for name in options.cases if name not in known]:
        print(f"error: CASE: unknown case: found {unknown[0]!r}, expected one of: {'; '.join(known)}", file=sys.stderr)
        return 2
    target = machine.results("ablations" if options.ablations else "bench", card)
    content, now = machine.begun(target), machine.commit()
    if "operations_per_second" not in content:
        content = {**content, **_device(card), "steps": {"all": STEPS, "left out": WARM_UP}, "runs": {}}
    if card:
        write_rows()
    names, failed = options.cases or list(known), set()
    for name in names:
        if options.again or content["rows"].get(name, {}).get("commit") != now:
            content["runs"].pop(name, None)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.repeats):
            for name in names:
                if name in failed or len(content["runs"].get(name, [])) > number:
                    continue
                found = measure(known[name], Path(folder), f"{list(known).index(name)}-{number}")
                if "failed" in found:
                    failed.add(name)
                    content["rows"][name] = {"commit": now, **found}
                else:
                    content["runs"].setdefault(name, []).append(found)
                    row = summary(content["runs"][name], content["operations_per_second"])
                    content["rows"][name] = {"commit": now, **row}
                machine.write(target, content)
                print(f"{name:28} {found.get('step_seconds', 'failed')} s per step", flush=True)
    print(table(content))
    print(f"written: {target.relative_to(REPOSITORY)}")
    return int(bool(failed))


def _device(card: str | None) -> dict[str, Any]:
    """FLOP/s of a large matrix product on this machine, and of the data sheet."""
    product = subprocess.run([sys.executable, "-c", _PRODUCT], capture_output=True, text=True, check=True)
    return {
        "gpus": ask_nvidia("name,driver_version,clocks.sm,clocks.max.sm,power.limit") if card else [],
        "operations_per_second": {
            "matrix product, measured": float(product.stdout),
            "data sheet": gpu_types.peak_flops(card),
        },
    }


def train(
    case: Case, runs: Path, name: str, steps: int, environment: Mapping[str, str]
) -> tuple[int, str, float, float]:
    """Run a case.

    Returns: exit code, output, seconds to the first log line, seconds in total. On a GPU the run is terminated after
        its last step, which counts as exit code 0.
    """
    command = [sys.executable, "-m", "sft_recipes", "train", case.recipe, "--name", name, *case.options, *SHORT]
    on_gpu, lines, began, first = "--gpus" in case.options, runs / name / "metrics.jsonl", time.monotonic(), 0.0
    path = machine.python_path(runs, REPOSITORY)
    if on_gpu:
        (runs / "sitecustomize.py").write_text(_ANY_DISK)
    with (runs / f"{name}.txt").open("w+") as said:
        process = subprocess.Popen(
            [*command, *case.words, f"trainer.max_steps={steps}"], stdout=said, stderr=said,
            env={**os.environ, "RUNS_DIR": str(runs), "SANITY": "skip", "PYTHONPATH": path, **environment},
        )  # fmt: skip
        while process.poll() is None:
            time.sleep(0.02)
            if not first and lines.is_file():
                first = time.monotonic() - began
            if on_gpu and first and f'"step": {steps}' in lines.read_text():
                _end(process.pid)
                return 0, "", first, time.monotonic() - began
        said.seek(0)
        return process.wait(), said.read(), first, time.monotonic() - began


def _end(pid: int) -> None:
    """Kill a process and its children."""
    root = psutil.Process(pid)
    processes = [root, *root.children(recursive=True)]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes)


def measure(case: Case, runs: Path, name: str) -> dict[str, Any]:
    """One run: medians over the steps after the warm-up; or exit code and last line if it failed."""
    already = set(runs.rglob("details.json"))
    code, said, first, seconds = train(case, runs, name, STEPS, dict(case.environment))
    folder = runs / name
    if code:
        print(said[-3000:], file=sys.stderr)
        return {"failed": code, "said": said.strip().splitlines()[-1][:300]}
    plan, manifest, prepared = (
        json.loads((folder / f"{kind}.json").read_text()) for kind in ("plan", "manifest", "prepared")
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step_seconds" in line and line["step"] > WARM_UP]
    assert len(steps) == STEPS - WARM_UP, f"{len(steps)} steps were logged"
    return {
        "plan": {key: plan[key] for key in ("parallelism", "precision", "packing", "max_length", "world_size")},
        "versions": manifest["starts"][0]["versions"],
        "step_seconds": statistics.median(line["step_seconds"] for line in steps),
        "quartiles": statistics.quantiles((line["step_seconds"] for line in steps), n=4),
        **{key: statistics.median(line[key] for line in steps) for key in _SPEEDS},
        "operations_per_token": _operations(plans.read(folder / "plan.json"), Path(prepared["folder"])),
        "peak_bytes": max((line.get("memory_peak_bytes", 0) for line in steps), default=0) or None,
        "planned_bytes": (plan["memory_bytes_per_gpu"] or {}).get("total") if plan["gpus"] else None,
        "host_bytes": max(line["host_memory_bytes"] for line in steps),
        "first_step_seconds": first,
        "data": CACHED if Path(prepared["folder"]) / "details.json" in already else PREPARED,
        "seconds": seconds,
    }


def _operations(plan: Plan, prepared: Path) -> dict[str, float | None]:
    """FLOPs of forward and backward pass per token without padding: causal, by PaLM's formula, and executed."""
    from datasets import load_from_disk

    rows = load_from_disk(str(prepared / "train"))
    lengths = (
        [length for row in rows["seq_lengths"] for length in row]
        if "seq_lengths" in rows.column_names
        else [len(row) for row in rows["input_ids"]]
    )
    attended = sum(length * (length + 1) for length in lengths) / sum(lengths)
    architecture = plan.sections.model.architecture
    supervised = 1.0 if plan.supervised_share is None else plan.supervised_share
    load = plans.memory_inputs(plan, architecture)
    flops = cost.flops_per_token(load, attended, supervised) if load else None
    return {
        "causal": flops and flops.model,
        "PaLM": load and cost.palm_flops_per_token(load, plan.max_length),
        "hardware": flops and flops.hardware,
    }


def summary(rows: list[dict[str, Any]], per_second: dict[str, float | None]) -> dict[str, Any]:
    """Summarize the repeats of a case: medians, spread, utilization."""
    first, medians = rows[0], sorted(row["step_seconds"] for row in rows)
    tokens = statistics.median(row["tokens_per_second"] for row in rows)
    # The product uses all cores of a CPU, which its ranks share; each rank has its own GPU.
    devices = first["plan"]["world_size"] if first["peak_bytes"] else 1
    utilization = {
        f"{count}, {denominator}": round(tokens * operations / (able * devices), 4)
        for count, operations in first["operations_per_token"].items()
        for denominator, able in per_second.items()
        if operations and able
    }
    return {
        **first["plan"],
        "versions": first["versions"],
        "repeats": len(rows),
        "step_seconds": {
            "median": statistics.median(medians), "least": medians[0], "most": medians[-1],
            "quartiles within a run": first["quartiles"],
        },
        **{key: round(statistics.median(row[key] for row in rows), 1) for key in _SPEEDS},
        "operations_per_token": first["operations_per_token"],
        "mfu": {key: share for key, share in utilization.items() if not key.startswith("hardware")},
        "tokens_per_second_of_each_run": [round(row["tokens_per_second"], 1) for row in rows],
        "hfu": {key.replace("hardware", "causal"): share for key, share in utilization.items() if "hardware" in key},
        "peak_bytes": first["peak_bytes"],
        "planned_bytes": first["planned_bytes"],
        "host_bytes": max(row["host_bytes"] for row in rows),
        "first_step_seconds": _first(rows),
        "seconds_of_the_whole_run": round(statistics.median(row["seconds"] for row in rows), 2),
    }  # fmt: skip


def _first(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds to the first log line, by whether the data was prepared or cached."""
    of: dict[str, list[float]] = {}
    for row in rows:
        of.setdefault(row["data"], []).append(row["first_step_seconds"])
    return {data: round(statistics.median(seconds), 2) for data, seconds in of.items()}


def table(content: dict[str, Any]) -> str:
    """A results file as a table, with the ratio to the default if that is a row."""
    lines = [
        "| case | runs | step, s (least to most) | tokens/s | padded tokens/s | supervised tokens/s "
        "| MFU of product, of data sheet | MFU (PaLM) | HFU | peak memory | first step, s |",
        "|" + "---|" * 11,
    ]
    for name, row in content["rows"].items():
        if "failed" in row:
            lines.append(f"| {name} | failed: {row['said']} |{' |' * 9}")
            continue
        seconds, memory = row["step_seconds"], row["peak_bytes"] or row["host_bytes"]
        lines.append(
            f"| {name} | {row['repeats']} | {seconds['median']:.3f} ({seconds['least']:.3f} to {seconds['most']:.3f}) "
            f"| {row['tokens_per_second']:,.0f}{_relative_to_default(row, content['rows'])} "
            f"| {row['padded_tokens_per_second']:,.0f} | {row['supervised_tokens_per_second']:,.0f} "
            f"| {_shares(row['mfu'], 'causal')} | {_shares(row['mfu'], 'PaLM')} | {_shares(row['hfu'], 'causal')} "
            f"| {memory / 2**30:.1f} GiB "
            f"| {', '.join(f'{seconds:.1f} ({_DATA[data]})' for data, seconds in row['first_step_seconds'].items())} |"
        )
    return "\n".join(lines)


def _shares(of: dict[str, float], count: str) -> str:
    """Utilization relative to the measured product and, if there is one, to the data sheet."""
    return ", ".join(
        f"{of[key]:.1%}" for key in (f"{count}, matrix product, measured", f"{count}, data sheet") if key in of
    )


def _relative_to_default(row: dict[str, Any], rows: dict[str, Any]) -> str:
    """Throughput relative to the default: the median of the ratios within a round."""
    if DEFAULT not in rows or "failed" in rows[DEFAULT]:
        return ""
    key = "tokens_per_second_of_each_run"
    return f" ({statistics.median(map(operator.truediv, row[key], rows[DEFAULT][key])):.2f}x)"


if __name__ == "__main__":
    sys.exit(main())
