"""Host memory of each rank while a model of about 1B random parameters is loaded, engine by engine, on the CPU.

    python benchmarks/loading.py            # writes benchmarks/results/loading-N-cores.json

Loading alone, through the run's own `load_model`, without optimizer. What counts is anonymous memory, sampled every
5 ms: the pages of the weights' files are mapped and the system takes them back when it needs them. On a CPU a rank's
own shard is in that memory too; on a GPU it is not.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from sft_recipes.config import loader  # noqa: E402
from sft_recipes.launch import command  # noqa: E402
from sft_recipes.planner import plan as plans  # noqa: E402
from sft_recipes.planner.plan import Topology  # noqa: E402
from sft_recipes.runtime.run_dir import RunDir  # noqa: E402

MEASURED = (("ddp", 2), ("zero2", 2), ("fsdp2", 2), ("zero3", 2), ("zero3", 4))
# Llama 3.2 1B's layers with a vocabulary of 32,000: no single tensor is a large part of the model.
ARCHITECTURE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32_000,
}


def main() -> None:
    """Measures each engine in turn and writes the results."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        subprocess.run([sys.executable, __file__, "write", str(model)], check=True)
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        found = [
            {"engine": engine, "ranks": measure(engine, ranks, model, Path(folder) / f"{engine}-{ranks}")}
            for engine, ranks in MEASURED
        ]
    machine = {"cores": os.cpu_count(), "system": platform.platform()}
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "accelerate", "deepspeed")}
    content = {"model_bytes": size, "rows": found, "machine": machine, "versions": versions}
    target = REPOSITORY / "benchmarks" / "results" / f"loading-{os.cpu_count()}-cores.json"
    target.write_text(json.dumps(content, indent=2) + "\n")
    print(f"peak anonymous memory of each rank, in whole copies of the model ({size:,} bytes)")
    for row in found:
        peaks = ", ".join(f"{rank['peak_anonymous_bytes'] / size:.2f}" for rank in row["ranks"])
        print(f"{row['engine']} on {len(row['ranks'])}: {peaks}")


def measure(engine: str, ranks: int, model: Path, folder: Path) -> list[dict[str, int]]:
    """Peak bytes of each rank, above what it held before it began to load."""
    folder.mkdir()
    words = ["model.from_scratch=false", f"model.name_or_path={model}", f"parallelism={engine}", "precision=bf16"]
    recipe = loader.load("tiny", [*words, "batch.effective_batch_size=4"])
    plan = plans.resolve(recipe, Topology(gpus=0, processes=ranks))
    run = RunDir(folder)
    plans.write(plan, run.plan)
    command.write_accelerate_config(plan, run)
    start = command.launch(plan, run)
    start = [*start[: start.index("sft_recipes.training.main") - 1], __file__, "rank", str(model), str(folder)]
    subprocess.run(start, check=True, cwd=REPOSITORY, env=command.environment(plan, os.environ))
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def rank(model: Path, folder: Path) -> None:
    """What each rank of the measured program does."""
    from sft_recipes.training.library_logging import silence_libraries

    silence_libraries()
    from sft_recipes.training import model as training_model
    from sft_recipes.training import patches, sft_config

    plan = plans.read(folder / "plan.json")
    plan.sections.model.architecture = {}
    arguments = sft_config.make_sft_config(plan, RunDir(folder))
    patches.apply_to_process_group(plan)
    before = memory()
    peak = dict(before)
    loaded = threading.Event()

    def watch() -> None:
        while not loaded.is_set():
            for kind, number in memory().items():
                peak[kind] = max(peak[kind], number)
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    model_here = training_model.load_model(plan, str(model))
    seconds = time.monotonic() - started
    loaded.set()
    watcher.join()
    held = sum(parameter.data.numel() * parameter.data.element_size() for parameter in model_here.parameters())
    shard = sum(getattr(parameter, "ds_tensor", parameter).numel() * 2 for parameter in model_here.parameters())
    after = memory()
    result = {
        "peak_anonymous_bytes": peak["RssAnon"] - before["RssAnon"],
        "anonymous_bytes_after": after["RssAnon"] - before["RssAnon"],
        "peak_file_bytes": peak["RssFile"] - before["RssFile"],
        "whole_parameter_bytes": held,
        "own_parameter_bytes": shard,
        "seconds": round(seconds, 2),
    }
    (folder / f"rank-{arguments.process_index}.json").write_text(json.dumps(result))


def memory() -> dict[str, int]:
    """Resident bytes of this process, anonymous and of mapped files (proc_pid_status(5))."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {kind: int(lines[kind].split()[0]) * 1024 for kind in ("RssAnon", "RssFile")}


def write(model: Path) -> None:
    """A Llama of 1.1 billion random weights, in bf16 and files of 1 GB."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **ARCHITECTURE)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(model, max_shard_size="1GB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        rank(Path(sys.argv[2]), Path(sys.argv[3]))
    elif sys.argv[1:2] == ["write"]:
        write(Path(sys.argv[2]))
    else:
        main()
