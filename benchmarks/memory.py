"""Compare the plan's memory forecast with the peaks of real runs of six steps.

    .venv/bin/python benchmarks/memory.py [CASE …] [--again]

On a CPU the tiny recipe, four times as wide, with every parallelism strategy, by torch's profiler: the largest sum of
allocations of a rank during training steps. On a GPU recipes of 1B to 8B from random weights, by
`max_memory_allocated`; runs are terminated after their last step. Each completed case is written at once to
`results/memory-MACHINE.json`, and repeated at the same commit only with `--again`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
from bench import ON_ONE_GPU, Case, from_scratch, train, write_rows

from sft_recipes.config import loader
from sft_recipes.launch.topology import gpu_type_of, visible_gpus

WIDER = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 2}
STEPS = 6
# Python imports a sitecustomize module first. This one tracks the allocations of rank 0, and writes the peak at exit.
_TRACKER = f"""
import os, sys
if "sft_recipes.training.main" in sys.orig_argv and os.environ.get("RANK", "0") == "0":
    sys.path.insert(0, {str(machine.HERE)!r})
    import machine
    sys.path.pop(0)
    from torch.profiler import ProfilerActivity, profile, record_function
    from transformers import Trainer
    tracker = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    tracker.start()
    loop, leave = Trainer._inner_training_loop, os._exit
    def named(self, *words, **more):
        with record_function("training"):
            return loop(self, *words, **more)
    def write(code):
        tracker.stop()
        with open(os.environ["TRACKED"], "w") as file:
            print(machine.peak_allocated(tracker, "training"), file=file)
        leave(code)
    Trainer._inner_training_loop, os._exit = named, write
"""


def cases(on_gpu: bool) -> dict[str, Case]:
    """The cases by name."""
    if not on_gpu:
        architecture = {**loader.load("tiny").model.architecture, **WIDER}
        words = (f"model.architecture={json.dumps(architecture)}",)
        of = {
            "one process": ((), ()),
            "one process, checkpointing": ((), ("trainer.gradient_checkpointing=true",)),
            "one process, two micro-batches": ((), ("batch.max_per_device_batch_size=1",)),
            "one process, bf16": ((), ("precision=bf16",)),
            "one process, bf16, checkpointing": ((), ("precision=bf16", "trainer.gradient_checkpointing=true")),
            "one process, LoRA": ((), ("lora.r=16",)),
        }
        for engine in ("ddp", "zero1", "zero2", "zero3", "fsdp2"):
            of[engine] = (("--processes", "2"), (f"parallelism={engine}",))
        return {name: Case("tiny", options, (*words, *more)) for name, (options, more) in of.items()}
    found = {}
    for name in ("1b", "3b", "8b-lora", "8b"):
        for length in (2048, 4096, 8192):
            for recomputes in (True,) if name == "8b" else (True, False):
                label = f"{name}, {length // 1024}k{', checkpointing' if recomputes else ''}"
                words = (f"trainer.max_length={length}", f"trainer.gradient_checkpointing={str(recomputes).lower()}")
                found[label] = Case(name, ("--gpus", "1"), (*from_scratch(name), *words, *ON_ONE_GPU.get(name, ())))
    found["1b, 2k, fp32"] = Case(
        "1b", ("--gpus", "1"), (*from_scratch("1b"), "trainer.max_length=2048", "precision=fp32")
    )
    return found


def main() -> int:
    """Measure the requested cases; return 1 if a run failed, whose error is in the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    card = gpu_type_of(visible_gpus())
    known = cases(card is not None)
    if unknown := [name for name in options.cases if name not in known]:
        print(f"error: CASE: unknown case: found {unknown[0]!r}, expected one of: {'; '.join(known)}", file=sys.stderr)
        return 2
    target = machine.results("memory", card)
    content, now = machine.begun(target), machine.commit()
    if card:
        write_rows()
    failed = False
    with tempfile.TemporaryDirectory() as runs:
        for number, name in enumerate(options.cases or known):
            before = content["rows"].get(name, {})
            if before.get("commit") == now and "failed" not in before and not options.again:
                continue
            found = content["rows"][name] = {"commit": now, **measure(known[name], card, Path(runs), str(number))}
            failed |= "failed" in found
            print(name, found.get("peak over planned", found.get("said")), flush=True)
            machine.write(target, content)
    print(table(content))
    return int(failed)


def measure(case: Case, card: str | None, runs: Path, name: str) -> dict[str, Any]:
    """A few steps of a case: forecast and peak in bytes, and their ratio; or its error."""
    tracked, environment = runs / f"{name}.bytes", {"REPORT_TO": "none"}
    if card:
        case = Case(case.recipe, (*case.options, "--gpu-type", card), case.words)
    else:
        (runs / "sitecustomize.py").write_text(_TRACKER)
        environment["TRACKED"] = str(tracked)
    code, output, _, _ = train(case, runs, name, STEPS, environment)
    if code:
        return {"failed": code, "said": output.strip().splitlines()[-1][:300]}
    plan, manifest = (json.loads((runs / name / f"{kind}.json").read_text()) for kind in ("plan", "manifest"))
    planned = plan["memory_bytes_per_gpu"]
    lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    peak = max(line.get("memory_peak_bytes", 0) for line in lines) if card else int(tracked.read_text())
    return {
        "planned_bytes": planned["total"],
        "peak_bytes": peak,
        "peak over planned": round(peak / planned["total"], 3),
        "parts": planned,
        "versions": manifest["starts"][0]["versions"],
    }


def table(content: dict[str, Any]) -> str:
    """The rows as a table."""
    lines = ["| | planned, MiB | peak, MiB | peak over planned |", "|---|---|---|---|"]
    for name, row in content["rows"].items():
        if "failed" in row:
            lines.append(f"| {name} | | | failed: {row['said']} |")
        else:
            planned, peak = row["planned_bytes"] / 2**20, row["peak_bytes"] / 2**20
            lines.append(f"| {name} | {planned:,.0f} | {peak:,.0f} | {row['peak over planned']:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
