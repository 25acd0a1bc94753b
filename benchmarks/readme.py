"""Writes the tables and drawings of all results files into benchmarks/README.md; no figure there is typed by hand.

.venv/bin/python benchmarks/readme.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attention
import bench
import beside
import memory
import metrics
import plots
import published
import threads

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- readme.py writes from here -->\n", "<!-- to here -->"


def main() -> None:
    """Draws, then puts each table under its heading."""
    plots.main()
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    sections = "".join(section(*of) for of in SECTIONS) + PUBLISHED + published.table() + "\n"
    readme.write_text(before + BEGIN + sections + END + rest.partition(END)[2])


def section(kind: str, heading: str, reading: str, table: Callable[[dict[str, Any]], str]) -> str:
    """The results files of a kind, each with the machine and commit that it is from; nothing where there is none."""
    parts = []
    for file in sorted((HERE / "results").glob(f"{kind}-*.json")):
        content = json.loads(file.read_text())
        machine = content["machine"]
        of = content.get("card") or f"{machine['processor']}, {machine['cores']} cores"
        parts.append(f"`results/{file.name}`: {of}; commit {_commits(content)}\n\n{table(content)}\n")
        if (HERE / "plots" / f"{file.stem}.svg").is_file():
            parts.append(f"![{heading}](plots/{file.stem}.svg)\n")
    return f"\n## {heading}\n\n{reading}\n\n" + "\n".join(parts) + "\n" if parts else ""


def _commits(content: dict[str, Any]) -> str:
    """Of the file, or of its rows, `-dirty` where the code was not a commit's."""
    rows = content["rows"].values() if isinstance(content["rows"], dict) else []
    found = {content["commit"]} if "commit" in content else {row["commit"] for row in rows}
    return ", ".join(sorted(f"{one[:7]}{'-dirty' * one.endswith('-dirty')}" for one in found))


# Not measured here, so without a results file.
PUBLISHED = """
## Memory, forecast and published

The forecast next to peaks that others published (`published.py`). Nothing was measured here. A row above 1.10 says
why. The reserve is what the fit test adds for driver, CUDA context, NCCL and fragmentation.

"""

SECTIONS = (
    (
        "bench",
        "Whole training",
        "Twenty steps behind a warm-up of five, the cases' runs in turn; `first step` is from the command to the\n"
        "first step's figures, the data prepared anew or found. MFU counts operations causally, by the lengths that\n"
        "examples have; PaLM's count is beside it; HFU counts what is computed again. They are shares of what a large\n"
        "matrix product reaches here, and of the data sheet. On a CPU memory is the process's own, the product fp32.\n"
        "Rows of commit a44e3b1 count the output layer for every token and leave recomputed logits out of HFU, so\n"
        "their MFU is too high and their HFU not comparable; later ones count as `planner/cost.py` says.",
        bench.table,
    ),
    (
        "ablations",
        "One knob at a time",
        "As above, each beside the default of the same round; what was kept and why: "
        "[decisions](../docs/design/decisions.md).",
        bench.table,
    ),
    (
        "beside",
        "Beside what else a user would run",
        "Same rows, model, batch, rate and steps, from the command to the saved model, rows prepared anew; how\n"
        "instants are taken stands in `beside.py`. The trial costs the seconds between this project's two rows, and\n"
        "finds what would be found hours later; its saves have checksums and wait for the disk.",
        beside.table,
    ),
    (
        "metrics",
        "A step beside a bare one",
        "A bare step: forward over the supervised positions, backward, clip, step, on batches that are there. The\n"
        "rest is what a trainer pays, which hardly grows with the model. TRL's own trainer gets our batches,\n"
        "attention and scoring of supervised positions alone, so that the trainer differs. Middle ratios of pairs.",
        metrics.table,
    ),
    (
        "attention",
        "Ways to attend",
        "Forward and backward through two decoder layers, with the batch that a run would collate.",
        attention.table,
    ),
    (
        "memory",
        "Memory, told and measured",
        "The plan's figure for a rank beside the largest sum of what its training had allocated.",
        memory.table,
    ),
    (
        "threads",
        "OpenMP threads that spin",
        "The tiny recipe's training with each bound on how long waiting threads spin, alone and next to one process\n"
        "that keeps a core busy. The ratio is to libgomp's default (300000) alone.",
        threads.table,
    ),
)

if __name__ == "__main__":
    main()
