"""Measures what a start costs: how long Python takes to import what trains, and to exit; and how long `train` takes to
its first step, where the sanity check runs before it (two starts of the ranks) and where it has passed already.

    .venv/bin/python benchmarks/start.py [--rounds 7] [--trains 3]
    .venv/bin/python benchmarks/start.py --against COMMIT [--trains 3]

Each row is a separate process; rows alternate, so that noise of the machine affects all of them. Writes
`results/start-HOST.json`. With `--against`, it compares a complete first `train tiny` of an earlier commit with one of
this commit, with the same libraries: seconds to the first line of output, to the first step, and to the end; and writes
`results/start-against-HOST.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import machine

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results" / f"start-{os.cpu_count()}-cores.json"
LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "wandb")
MODULE = "sft_recipes.training.trainer"
PLAN = (
    "from sft_recipes.config import loader; from sft_recipes.planner import plan; "
    "from sft_recipes.runtime import library_imports; "
    "plan = plan.resolve(loader.load('tiny'), plan.Topology(gpus=0, processes=1)); "
)
END = f"import {MODULE}, time; print(time.time())"
WITHOUT_GC = (
    f"\nwith library_imports.without_garbage_collection():\n    import {MODULE}\nimport time; print(time.time())"
)
VARIANTS = {
    "with garbage collection": PLAN + END,
    "without garbage collection, as a rank": PLAN + WITHOUT_GC,
}
# The process that starts the ranks: accelerate's command line imports all of its subcommands, of which one is needed.
LAUNCHER = (
    "from sft_recipes.runtime import library_imports\n"
    "with library_imports.without_garbage_collection():\n    import {}\nimport time; print(time.time())"
)
VARIANTS |= {
    "the launcher, by accelerate's command line": LAUNCHER.format("accelerate.commands.accelerate_cli"),
    "the launcher, as it is": LAUNCHER.format("accelerate.commands.launch, torch.distributed.run"),
}


def main() -> None:
    """Starts each variant once a round and writes the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--trains", type=int, default=3)
    parser.add_argument("--against", metavar="COMMIT")
    asked = parser.parse_args()
    if asked.against:
        _compare(asked.against, asked.trains)
        return
    rounds = asked.rounds
    seconds: dict[str, list[tuple[float, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant, code in VARIANTS.items():
            seconds[variant].append(_start_and_end(code))
    medians = {
        variant: {"start": round(_median(both, 0), 2), "end": round(_median(both, 1), 2)}
        for variant, both in seconds.items()
    }
    first, last, *_ = (row["start"] + row["end"] for row in medians.values())
    content = {
        "machine": machine.described(),
        "versions": {name: metadata.version(name) for name in LIBRARIES},
        "rounds": rounds,
        "seconds (median)": medians,
        "with / without garbage collection": round(first / last, 2),
        "trains": asked.trains,
        "seconds to the first step of the tiny recipe (median)": _to_the_first_step(asked.trains),
    }
    RESULTS.write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps({name: value for name, value in content.items() if name.startswith("seconds")}, indent=2))
    print(f"with garbage collection, start and end take {first / last:.2f} times as long")
    print(f"written: {RESULTS.relative_to(REPOSITORY)}")


def _start_and_end(code: str) -> tuple[float, float]:
    """Seconds until everything is imported, and from then until the process is gone."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "REPORT_TO": "none"}
    began = time.time()
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    ended, imported = time.time(), float(done.stdout.split()[-1])
    return imported - began, ended - imported


# A line of `train` that begins like this ends a part of a start; parts that a start does not have take no time.
PARTS = {
    "data, prepared or found": ("data: ",),
    "sanity check: trial": ("PASS ", "FAIL "),
    "sanity check: reload, in new processes": ("PASS  checkpoint", "FAIL  checkpoint"),
    "the run, to its first step": ("step 1/",),
}


def _to_the_first_step(trains: int) -> dict[str, dict[str, float]]:
    """Medians of each part, and of the whole: of the first start of a plan, and of a start that finds its receipt."""
    seconds: dict[str, list[dict[str, float]]] = {"first start": [], "later start": []}
    for _ in range(trains):
        with tempfile.TemporaryDirectory() as runs:
            for name, measured in seconds.items():
                measured.append(_parts_of_a_start(Path(runs), name.replace(" ", "-")))
    return {
        name: {part: round(statistics.median(start[part] for start in starts), 2) for part in starts[0]}
        for name, starts in seconds.items()
    }


def _parts_of_a_start(runs: Path, name: str) -> dict[str, float]:
    """Seconds of each part of a start, which is stopped after its first step."""
    environment = {**os.environ, "RUNS_DIR": str(runs), "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "REPORT_TO": "none", "SANITY": ""}
    command = [sys.executable, "-m", "sft_recipes", "train", "tiny", "--name", name]
    began = last = time.monotonic()
    parts, left = dict.fromkeys(PARTS, 0.0), list(PARTS)
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            reached = next((part for part in left if line.startswith(PARTS[part])), None)
            if reached:
                now = time.monotonic()
                parts[reached], last = now - last, now
                left = left[left.index(reached) + 1 :]
                if not left:
                    process.send_signal(signal.SIGTERM)
    if left:
        raise SystemExit(f"{name}: train ended before: {left[0]}")
    return {**parts, "sum": last - began}


def _compare(commit: str, trains: int) -> None:
    """Write the seconds of complete first starts of this checkout and of another commit, and their ratios."""
    git = ("git", "-C", str(REPOSITORY))
    with tempfile.TemporaryDirectory(prefix="start-") as name:
        folder = Path(name)
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(folder / "earlier"), commit], check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
        subprocess.run([sys.executable, "-m", "compileall", "-q", str(folder / "earlier" / "sft_recipes")], check=True)
        checkouts = {"earlier": folder / "earlier", "this": REPOSITORY}
        try:
            rounds = [
                {
                    which: _complete_start(checkouts[which], folder / f"{which}-{number}")
                    for which in (list(checkouts), list(checkouts)[::-1])[number % 2]
                }
                for number in range(trains)
            ]
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(folder / "earlier")], check=True)
    ratios = {
        part: round(statistics.median(each["earlier"][part] / each["this"][part] for each in rounds), 2)
        for part in rounds[0]["this"]
    }
    content = {
        "machine": machine.described(), "commits": {"earlier": commit, "this": head},
        "versions": {name: metadata.version(name) for name in LIBRARIES},
        "earlier / this (median)": ratios, "seconds": rounds,
    }  # fmt: skip
    file = RESULTS.with_name(RESULTS.name.replace("start-", "start-against-"))
    file.write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(ratios, indent=2), f"written: {file.relative_to(REPOSITORY)}", sep="\n")


def _complete_start(checkout: Path, runs: Path) -> dict[str, float]:
    """Train the tiny recipe of a checkout to its end, and return the seconds to each part."""
    environment = {
        **os.environ,
        "RUNS_DIR": str(runs),
        "PYTHONPATH": str(checkout),
        "PYTHONUNBUFFERED": "1",
        "SANITY": "",
    }
    began, seconds = time.monotonic(), dict[str, float]()

    def note(part: str) -> None:
        seconds.setdefault(part, round(time.monotonic() - began, 2))

    command = [sys.executable, "-m", "sft_recipes", "train", "tiny", "--name", "start"]
    with subprocess.Popen(
        command, env=environment, cwd=runs.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        lines = []
        for line in process.stdout or ():
            note("first line")
            lines.append(line)
            if line.lstrip().startswith("step 1/"):
                note("first step")
    note("end")
    if process.returncode or len(seconds) != 3:
        raise SystemExit(f"{checkout}: exit code {process.returncode}, {seconds}: {''.join(lines[-5:])}")
    return seconds


def _median(pairs: list[tuple[float, float]], index: int) -> float:
    return statistics.median(pair[index] for pair in pairs)


if __name__ == "__main__":
    main()
