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

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- readme.py writes from here -->\n", "<!-- to here -->"


def main() -> None:
    """Draws, then puts each table under its heading."""
    plots.main()
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    sections = "".join(section(*of) for of in SECTIONS)
    readme.write_text(before + BEGIN + sections + END + rest.partition(END)[2])


def section(kind: str, heading: str, reading: str, table: Callable[[dict[str, Any]], str]) -> str:
    """The results files of a kind, each with the machine and commit that it is from; nothing where there is none."""
    parts = []
    for file in sorted((HERE / "results").glob(f"{kind}-*.json")):
        content = json.loads(file.read_text())
        machine, commit = content["machine"], content.get("commit")
        of = content.get("card") or f"{machine['processor']}, {machine['cores']} cores"
        parts.append(f"`results/{file.name}`: {of}{f'; commit {commit[:7]}' if commit else ''}\n\n{table(content)}\n")
        if (HERE / "plots" / f"{file.stem}.svg").is_file():
            parts.append(f"![{heading}](plots/{file.stem}.svg)\n")
    return f"\n## {heading}\n\n{reading}\n\n" + "\n".join(parts) + "\n" if parts else ""


SECTIONS = (
    (
        "bench",
        "Whole training",
        "Twenty steps behind a warm-up of five, three runs of each case in turn; `first step` is from the command\n"
        "to the first step's figures, the data prepared anew or found. On a CPU memory is the process's own, and MFU\n"
        "is a share of what a large matrix product in fp32 reaches on the same cores.",
        bench.table,
    ),
    (
        "ablations",
        "One knob at a time",
        "As above, each beside the default of the same round; what was kept and why: [docs/LOG.md](../docs/LOG.md).",
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
        "rest is what a trainer pays, which hardly grows with the model.",
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
)

if __name__ == "__main__":
    main()
