"""Ways to attend, side by side: time and memory of forward and backward through two decoder layers, and their error.

    .venv/bin/python benchmarks/attention.py [--rounds 5]

Rows of 1k to 16k tokens (on a CPU up to 4k), of one example and packed of many. Every way gets what a run gives it: the
same tokens, laid out by the run's own collator. Layers are of the 8B recipe's shape in bf16 on a GPU, an eighth as wide
in fp32 on a CPU. Ways take turns within a round, and ratios are to eager attention's middle time. The error is the
largest of an element against float64 by the definition, relative to the largest element. Peak memory is what the pass
adds to weights and gradients. Writes `results/attention-MACHINE.json`; plots.py draws it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import machine

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from sft_recipes.config import loader  # noqa: E402
from sft_recipes.launch.topology import gpu_type_of, visible_gpus  # noqa: E402
from sft_recipes.planner import plan as plans  # noqa: E402

WAYS = ("eager", "sdpa", "varlen", "flash_attention_2")
MEAN_EXAMPLE = 600  # tokens, about what the recipes' data has


def main() -> None:
    """Measures all ways that there are here and writes the results file."""
    import torch

    from sft_recipes.training import attention

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=machine.at_least_one, default=5)
    asked = parser.parse_args()
    card = gpu_type_of(visible_gpus())
    device, dtype = ("cuda", torch.bfloat16) if card else ("cpu", torch.float32)
    errors, absent = {}, {}
    for name, kernel in (("varlen", attention.varlen), ("flash_attention_2", attention.flash)):
        try:
            errors[name] = attention.measure_errors(kernel, device, dtype)
        except (ImportError, RuntimeError, TypeError) as missing:
            absent[name] = " ".join(str(missing).split())[:200]
    models = {name: _model(name, device, dtype) for name in WAYS if name not in absent}
    rows: list[dict[str, Any]] = []
    for length in (1024, 2048, 4096, 8192, 16384) if card else (1024, 2048, 4096):
        for packed in (False, True):
            batches = {name: _batch(name, length, packed, device) for name in models}
            found: dict[str, list[float]] = {name: [] for name in models}
            memory = {name: _peak_bytes(model, batches[name]) for name, model in models.items()}
            for _ in range(asked.rounds):
                for name in [name for name in models if memory[name] is not None]:
                    found[name].append(_seconds(models[name], batches[name]))
            eager = statistics.median(found["eager"]) if found["eager"] else None
            for name in models:
                seconds = statistics.median(found[name]) if found[name] else None
                ratio = eager / seconds if eager and seconds else None
                row = {"way": name, "tokens": length, "packed": packed, "seconds": seconds, "eager over it": ratio}
                rows.append({**row, "bytes": memory[name]})
                print(rows[-1], flush=True)
    content = {
        "machine": machine.described(), "card": card, "commit": machine.commit(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "trl")},
        "rounds": asked.rounds, "errors": errors, "absent": absent, "rows": rows,
    }  # fmt: skip
    target = machine.results("attention", card)
    machine.write(target, content)
    print(table(content))
    print(f"written: {target.relative_to(REPOSITORY)}")


def table(content: dict[str, Any]) -> str:
    """The rows as a table, a way a column: milliseconds, how many times as fast as eager attention, MiB."""
    rows = {(row["tokens"], row["packed"], row["way"]): row for row in content["rows"]}
    ways = list(dict.fromkeys(row["way"] for row in content["rows"]))
    lines = ["| row | " + " | ".join(ways) + " |", "|---|" + "---|" * len(ways)]
    for tokens, packed in dict.fromkeys((row["tokens"], row["packed"]) for row in content["rows"]):
        cells = []
        for way in ways:
            row = rows[tokens, packed, way]
            if row["seconds"] is None:
                cells.append("does not fit")
                continue
            ratio = f" ({row['eager over it']:.1f}x)" if row["eager over it"] else ""
            cells.append(f"{row['seconds'] * 1000:.0f} ms{ratio}, {row['bytes'] / 2**20:,.0f} MiB")
        lines.append(f"| {tokens:,}, {'packed' if packed else 'one example'} | {' | '.join(cells)} |")
    errors = [
        f"{way} {of['forward']:.0e} forward, {of['backward']:.0e} backward" for way, of in content["errors"].items()
    ]
    absent = [f"{way}: {why}" for way, why in content["absent"].items()]
    return "\n".join(
        [*lines, "", f"Off by, against float64: {'; '.join(errors)}. Not here: {'; '.join(absent) or '-'}."]
    )


def _model(way: str, device: str, dtype: Any) -> Any:
    """Two decoder layers in training, without a head."""
    import torch
    from transformers import AutoConfig, AutoModel

    architecture = {**loader.load("8b").model.architecture, "num_hidden_layers": 2, "vocab_size": 1024}
    if device == "cpu":
        eighths = ("hidden_size", "intermediate_size", "num_attention_heads")
        architecture.update({key: architecture[key] // 8 for key in eighths}, num_key_value_heads=1)
    architecture["max_position_embeddings"] = 16384
    torch.manual_seed(0)
    config = AutoConfig.for_model(**architecture, attn_implementation=way)
    return AutoModel.from_config(config, dtype=dtype).to(device).train()


def _batch(way: str, length: int, packed: bool, device: str) -> dict[str, Any]:
    """One row as a run collates it for a way."""
    from accelerate.utils import send_to_device

    from sft_recipes.training import dataset

    draw, lengths = random.Random(0), [length]
    if packed:
        lengths = []
        while sum(lengths) < length:
            lengths.append(min(draw.randint(MEAN_EXAMPLE // 3, MEAN_EXAMPLE * 5 // 3), length - sum(lengths)))
    ids = [draw.randrange(1024) for _ in range(length)]
    plan = plans.resolve(loader.load("tiny"), plans.Topology(gpus=0, processes=1))
    row = {"input_ids": ids, "labels": ids, "seq_lengths": lengths, "row": 0}
    batch = dataset.make_collator(plan, 0, way)([row])
    return send_to_device({key: batch[key] for key in batch if key not in ("labels", "row")}, device)


def _pass(model: Any, batch: dict[str, Any]) -> None:
    import torch

    model(**batch, use_cache=False).last_hidden_state.float().square().mean().backward()
    model.zero_grad()
    if batch["input_ids"].is_cuda:
        torch.cuda.synchronize()


def _seconds(model: Any, batch: dict[str, Any]) -> float:
    began = time.perf_counter()
    _pass(model, batch)
    return time.perf_counter() - began


def _peak_bytes(model: Any, batch: dict[str, Any]) -> int | None:
    """What a pass has allocated at its peak beyond what there was before; None where it does not fit."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if batch["input_ids"].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            _pass(model, batch)
        except torch.OutOfMemoryError:
            model.zero_grad()
            return None
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as tracker:
        _pass(model, batch)
    return machine.peak_allocated(tracker)


if __name__ == "__main__":
    main()
