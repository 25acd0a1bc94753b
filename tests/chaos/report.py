"""Write docs/CHAOS.md from the results of `make chaos`."""

from __future__ import annotations

import statistics
from collections.abc import Collection
from typing import Any

from chaos.faults import FAULTS
from chaos.kills import SECONDS

HEAD = """# Fault injection results

Written by `make chaos` (tests/chaos/), on {machine}, seed {seed}; not edited by hand. Faults are injected into real runs
of a small model, which are then restarted with the same command (and `--resume`, which also restarts a run after several
attempts without progress). Each start must resume from the latest complete checkpoint. *Equal* means bit for bit: loss and
rows of each step, every file of each checkpoint (except the times in `trainer_state.json`), the best, final and last
models, none missing, compared with an uninterrupted run. Exit codes are those of the command, one per start: 1 a rank was
killed, failed or stalled (in some rows to bring the run into the state that the fault needs), 2 a rejected start, 4 the
third attempt without progress, 75 saved and stopped, -9 the command itself was killed; no fault is injected into the last
start.
"""


def page(
    results: dict[str, Any], covered: dict[str, tuple[str, str]], not_covered: dict[str, str], chains: Collection[str]
) -> str:
    """Return the page; faults and chains of kills that were not run yet are listed as such."""
    lines = [HEAD.format(**results)]
    lines += [
        "## Faults",
        "",
        "| | fault | setup | exit codes | result |",
        "|---|---|---|---|---|",
    ]
    for row in results.get("faults", []):
        result = (
            "equal"
            if not row["differences"]
            else "**differs**: " + "; ".join(row["differences"])[:200].replace("\n", " ")
        )
        lines.append(
            f"| {row['number']} | {row['what']} | {row['setup']} | {', '.join(map(str, row['codes']))} | {result} |"
        )
    lines += ["", "Covered by other tests:", "", "| | fault | where |", "|---|---|---|"]
    lines += [f"| {number} | {what} | {where} |" for number, (what, where) in covered.items()]
    lines += ["", "Not covered:", ""]
    lines += [f"- {number}: {reason}." for number, reason in not_covered.items()]
    run = {(row["number"], row["what"], row["setup"]) for row in results.get("faults", [])}
    missing = [fault for fault in FAULTS if (fault.number, fault.what, fault.setup) not in run]
    lines += [f"- {fault.number} ({fault.what}, {fault.setup}): not run yet on this machine." for fault in missing]
    for name in sorted(set(chains) - results.get("points", {}).keys()):
        lines.append(f"- Kills at every file operation, {name}: not finished yet on this machine.")
    if "random" not in results:
        lines.append("- Kills at random times: not run yet on this machine.")
    for name, points in results.get("points", {}).items():
        lines += ["", *_points(name, points)]
    if "random" in results:
        lines += ["", *_random(results["random"])]
    return "\n".join(lines) + "\n"


def _points(name: str, points: list[dict[str, Any]]) -> list[str]:
    differ = sum(bool(point["differences"]) for point in points)
    lines = [
        f"## Killed before every file operation: {name}",
        "",
        f"{len(points)} kills, {differ} with another result than the uninterrupted run. `N` is the step being saved; the "
        "next start, itself killed one operation later, resumed from the step in the last but one column.",
        "",
        "| | operation | file | resumed from | result |",
        "|---|---|---|---|---|",
    ]
    for point in points:
        back = point["resumed_from"] - point["saving"]
        origin = "step 0" if not point["resumed_from"] else "N" if not back else f"N{back:+}"
        lines.append(
            f"| {point['number']} | {point['call']} | `{point['path'] or '.'}` | {origin} | "
            f"{'equal' if not point['differences'] else '**differs**: ' + '; '.join(point['differences'])[:120]} |"
        )
    return lines


def _within(event: str) -> str:
    first, last = SECONDS[event]
    return f"{first:g} to {last:g} s"


def _random(results: dict[str, Any]) -> list[str]:
    kills = results["kills"]
    lost = sorted(max(kill["step"] - kill["resumed_from"], 0) for kill in kills)
    lines = [
        "## Killed at random times",
        "",
        f"{len(kills)} kills, half of them {_within('start')} after a start, half {_within('first step')} after its first "
        f"new step; all resumed. Steps lost per kill: median "
        f"{statistics.median(lost):.0f}, max {lost[-1]}, with a checkpoint every 20 steps. Final weights: "
        f"{'bitwise equal to the uninterrupted run in each setup' if not results['differences'] else 'DIFFER: ' + '; '.join(results['differences'])}.",
        "",
        "| setup | killed | kills | steps lost, median | max |",
        "|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[int]] = {}
    for kill in kills:
        groups.setdefault((kill["setup"], kill["target"]), []).append(max(kill["step"] - kill["resumed_from"], 0))
    lines += [
        f"| {setup} | {target} | {len(steps)} | {statistics.median(steps):.0f} | {max(steps)} |"
        for (setup, target), steps in groups.items()
    ]
    return lines
