"""Writes docs/CHAOS.md from what was found."""

from __future__ import annotations

import statistics
from collections.abc import Collection
from typing import Any

from chaos.faults import FAULTS
from chaos.kills import SECONDS

HEAD = """# What was done to runs, and what came of it

Written by `make chaos` (tests/chaos/), on {machine}, seed {seed}; nothing here is edited by hand. Real runs of a small
model are harmed and started again with the same command (and `--resume`, which says: go on, however many starts came
no further). Each start must go on from the newest whole checkpoint that is there. *Equal* means, bit by bit: the loss
and the rows of each step, every file of each checkpoint (but for the times in `trainer_state.json`), the best ones, the
final and the last model, none of them missing, compared with a run that nobody harmed. Exit codes are those of the
command, start by start: 1 where a rank was killed, failed or hung (in some rows that is how the run was brought to the
state that is then harmed), 2 a start that was refused, 4 the third without progress, 75 saved and stopped, -9 the command
itself was killed; the last start is left alone.
"""


def page(
    found: dict[str, Any], held: dict[str, tuple[str, str]], not_done: dict[str, str], chains: Collection[str]
) -> str:
    """The page; a part that was not run yet, a fault or one of these chains of kills, is said to be missing."""
    lines = [HEAD.format(**found)]
    lines += [
        "## Faults",
        "",
        "| | what was done | engine | exit codes of the starts | at the end |",
        "|---|---|---|---|---|",
    ]
    for row in found.get("faults", []):
        verdict = (
            "equal"
            if not row["differences"]
            else "**differs**: " + "; ".join(row["differences"])[:200].replace("\n", " ")
        )
        lines.append(
            f"| {row['number']} | {row['what']} | {row['engine']} | {', '.join(map(str, row['codes']))} | {verdict} |"
        )
    lines += ["", "Held by other tests:", "", "| | fault | where |", "|---|---|---|"]
    lines += [f"| {number} | {what} | {where} |" for number, (what, where) in held.items() if where]
    lines += ["", "Not done, or not here:", ""]
    lines += [f"- {number}: {reason}." for number, reason in not_done.items()]
    tried = {(row["number"], row["what"], row["engine"]) for row in found.get("faults", [])}
    missing = [fault for fault in FAULTS if (fault.number, fault.what, fault.engine) not in tried]
    lines += [f"- {fault.number} ({fault.what}, {fault.engine}): not run yet on this machine." for fault in missing]
    for name in sorted(set(chains) - found.get("points", {}).keys()):
        lines.append(f"- The kill at every file operation, {name}: not run to its end yet on this machine.")
    if "random" not in found:
        lines.append("- Kills at random instants: not run yet on this machine.")
    for name, points in found.get("points", {}).items():
        lines += ["", *_points(name, points)]
    if "random" in found:
        lines += ["", *_random(found["random"])]
    return "\n".join(lines) + "\n"


def _points(name: str, points: list[dict[str, Any]]) -> list[str]:
    differ = sum(bool(point["differences"]) for point in points)
    lines = [
        f"## Killed before every file operation: {name}",
        "",
        f"{len(points)} kills, {differ} with another outcome than the uninterrupted run. `N` is the step that was being "
        "saved; the next start, itself killed one operation later, went on from the step named last.",
        "",
        "| | operation | file | went on from | so far |",
        "|---|---|---|---|---|",
    ]
    for point in points:
        back = point["resumed_from"] - point["saving"]
        origin = "the beginning" if not point["resumed_from"] else "N" if not back else f"N{back:+}"
        lines.append(
            f"| {point['number']} | {point['call']} | `{point['path'] or '.'}` | {origin} | "
            f"{'equal' if not point['differences'] else '**differs**: ' + '; '.join(point['differences'])[:120]} |"
        )
    return lines


def _within(what: str) -> str:
    first, last = SECONDS[what]
    return f"{first:g} to {last:g} s"


def _random(found: dict[str, Any]) -> list[str]:
    kills = found["kills"]
    lost = sorted(max(kill["step"] - kill["resumed_from"], 0) for kill in kills)
    lines = [
        "## Killed at random instants",
        "",
        f"{len(kills)} kills, half of them {_within('start')} after a start, half {_within('first step')} after its first "
        f"new step; each was gone on from. Steps lost per kill: median "
        f"{statistics.median(lost):.0f}, most {lost[-1]}; a checkpoint was saved every 20 steps. Final weights: "
        f"{'bitwise equal to the uninterrupted run under each engine' if not found['differences'] else 'DIFFER: ' + '; '.join(found['differences'])}.",
        "",
        "| engine | killed | kills | steps lost, median | most |",
        "|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[int]] = {}
    for kill in kills:
        groups.setdefault((kill["engine"], kill["target"]), []).append(max(kill["step"] - kill["resumed_from"], 0))
    lines += [
        f"| {engine} | {target} | {len(steps)} | {statistics.median(steps):.0f} | {max(steps)} |"
        for (engine, target), steps in groups.items()
    ]
    return lines
