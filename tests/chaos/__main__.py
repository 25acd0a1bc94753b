"""`make chaos`: every fault, a kill at every file operation of a save, random kills; writes docs/CHAOS.md.

`--short` runs a few of each and writes nothing; `--only faults,points,random` runs some parts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from operator import itemgetter
from pathlib import Path
from typing import Any

from helpers.chaos_coverage import COVERED, NOT_COVERED
from helpers.workplace import REPOSITORY

from chaos import report
from chaos.faults import FAULTS, Fault, run_fault
from chaos.harness import Chaos
from chaos.kills import kill_points, random_kills

RESULTS = REPOSITORY / "benchmarks" / "results" / "chaos.json"
# Setup, rank, first and last file operation to kill at: all of one process, in two chains; a second rank's own files; a
# ZeRO shard.
POINTS = (("single", 0, 1, 60), ("single", 0, 61, None), ("ddp", 1, 1, None), ("zero2", 1, 1, None))
SHORT_POINTS = (("single", 0, 60, 62),)
RANDOM = (("single", 20), ("ddp", 10), ("zero2", 10), ("zero3", 10))
SHORT_RANDOM = (("single", 3),)
PARALLEL = 2
_identity = itemgetter("number", "what", "setup")


def main() -> int:
    """Run all parts; return 1 if anything differs from the uninterrupted run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="a few of each; writes nothing")
    parser.add_argument("--only", default="faults,points,random")
    parser.add_argument(
        "--continue", dest="keep", action="store_true", help="keep the faults and chains that were equal earlier"
    )
    parser.add_argument("--place", type=Path, help="directory of the runs (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        place = options.place or Path(temporary)
        results = json.loads(RESULTS.read_text()) if RESULTS.is_file() and not options.short else {}
        results |= {
            "seed": options.seed,
            "machine": f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores",
        }
        wrong = dict.fromkeys(options.only.split(","), 0)
        for part in wrong:
            for rows, differ in PARTS[part](place, options, results.get(part)):
                results[part], wrong[part] = rows, differ
                if not options.short:
                    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                    chains = {f"{setup}, rank {rank}" for setup, rank, *_ in POINTS}
                    page = report.page(results, COVERED, NOT_COVERED, chains)
                    (REPOSITORY / "docs" / "CHAOS.md").write_text(page)
    differ = sum(wrong.values())
    print(f"chaos: {'all equal' if not differ else f'{differ} differ'}")
    return int(bool(differ))


def faults(
    place: Path, options: argparse.Namespace, earlier: list[dict[str, Any]] | None
) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Each fault once, in its setup; after each setup, all rows so far and how many of the new ones differ."""
    rows, wrong = [row for row in earlier or [] if options.keep and not row["differences"]], 0
    done = {_identity(row) for row in rows}
    left = [fault for fault in FAULTS[:: 9 if options.short else 1] if _identity(vars(fault)) not in done]

    def run_setup(setup: str) -> list[dict[str, Any]]:
        chaos = Chaos(place / f"faults-{setup}", options.seed)
        return [_row(chaos, fault) for fault in left if fault.setup == setup]

    order = [_identity(vars(fault)) for fault in FAULTS]
    for _, new, _ in _parallel(run_setup, tuple((setup,) for setup in sorted({fault.setup for fault in left}))):
        rows = sorted([*rows, *new], key=lambda row: order.index(_identity(row)))
        wrong += sum(bool(row["differences"]) for row in new)
        yield rows, wrong


def _row(chaos: Chaos, fault: Fault) -> dict[str, Any]:
    began = time.monotonic()
    try:
        row = dict(vars(run_fault(chaos, fault)))
    except Exception as error:  # a fault that cannot be injected is a row of the table too
        row = {"number": fault.number, "what": fault.what, "setup": fault.setup, "codes": [], "resumed_from": 0}
        row["differences"] = [f"{type(error).__name__}: {str(error)[-1500:]}"]
    result = "equal" if not row["differences"] else f"DIFFERS: {row['differences'][:3]}"
    seconds = time.monotonic() - began
    print(f"{fault.number:<10} {fault.setup:<7} {fault.what:<75} {row['codes']} {result} {seconds:.0f} s", flush=True)
    return row


def points(
    place: Path, options: argparse.Namespace, earlier: dict[str, list[dict[str, Any]]] | None
) -> Iterator[tuple[dict[str, list[dict[str, Any]]], int]]:
    """A kill at every file operation, by setup and rank; after each chain, all so far and how many differ."""
    tables = dict(earlier or {}) if options.keep else {}
    chains = [
        chain for chain in (SHORT_POINTS if options.short else POINTS) if f"{chain[0]}, rank {chain[1]}" not in tables
    ]
    wrong = 0

    def run_chain(setup: str, rank: int, first: int, last: int | None) -> list[dict[str, Any]]:
        chaos = Chaos(place / f"points-{setup}-{first}", options.seed)
        return [vars(point) for point in kill_points(chaos, setup, rank, None, first, last)]

    for (setup, rank, *_), rows, seconds in _parallel(run_chain, tuple(chains)):
        name = f"{setup}, rank {rank}"
        tables[name] = sorted([*tables.get(name, []), *rows], key=lambda row: int(row["number"]))
        differ = sum(bool(row["differences"]) for row in rows)
        wrong += differ
        print(f"kill points of {name}: {len(rows)} kills, {differ} differ, {seconds:.0f} s", flush=True)
        yield tables, wrong


def at_random(place: Path, options: argparse.Namespace, _earlier: object) -> Iterator[tuple[dict[str, Any], int]]:
    """Kills at random times; after each setup, all kills so far and how many runs end differently."""
    kills: list[dict[str, Any]] = []
    differences: list[str] = []

    def run_setup(setup: str, count: int) -> tuple[list[dict[str, Any]], list[str]]:
        chaos = Chaos(place / f"random-{setup}", f"{options.seed}-{setup}")
        done, wrong = random_kills(chaos, setup, count)
        return [vars(kill) for kill in done], wrong

    for (setup, _), (done, wrong), seconds in _parallel(run_setup, SHORT_RANDOM if options.short else RANDOM):
        kills, differences = [*kills, *done], [*differences, *wrong]
        lost = [max(kill["step"] - kill["resumed_from"], 0) for kill in done]
        print(
            f"random kills, {setup}: {len(done)} kills, all resumed; steps lost per kill: median "
            f"{statistics.median(lost):.0f}, max {max(lost)}, saved every 20; final weights "
            f"{'bitwise equal' if not wrong else 'DIFFER'} to the uninterrupted run, {seconds:.0f} s",
            flush=True,
        )
        yield {"kills": kills, "differences": differences}, len(differences)


def _parallel(
    function: Callable[..., Any], calls: tuple[tuple[Any, ...], ...]
) -> Iterator[tuple[tuple[Any, ...], Any, float]]:
    """Yield the result of each call as it ends; a few run in parallel, since most of a start is waiting."""
    began = time.monotonic()
    with ThreadPoolExecutor(PARALLEL) as pool:
        running = {pool.submit(function, *call): call for call in calls}
        for future in as_completed(running):
            yield running[future], future.result(), time.monotonic() - began


PARTS: dict[str, Callable[[Path, argparse.Namespace, Any], Iterator[tuple[Any, int]]]] = {
    "faults": faults,
    "points": points,
    "random": at_random,
}

if __name__ == "__main__":
    sys.exit(main())
