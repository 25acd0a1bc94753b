"""`make chaos`: every fault, a kill at every file operation of a save, random kills; writes docs/CHAOS.md.

`--short` takes a few points of each and writes nothing; `--only faults,points,random` takes some parts.
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

from helpers import chaos_elsewhere

from chaos import report
from chaos.faults import FAULTS, Fault, tried
from chaos.harness import REPOSITORY, Chaos
from chaos.kills import kill_points, random_kills

RESULTS = REPOSITORY / "benchmarks" / "results" / "chaos.json"
# Engine and rank whose file operations are killed at, from which to which: every one of one process, in two chains; of a
# second rank its own files; of ZeRO its shard.
POINTS = (("single", 0, 1, 60), ("single", 0, 61, None), ("ddp", 1, 1, None), ("zero2", 1, 1, None))
SHORT_POINTS = (("single", 0, 60, 62),)
RANDOM = (("single", 20), ("ddp", 10), ("zero2", 10), ("zero3", 10))
SHORT_RANDOM = (("single", 3),)
AT_ONCE = 2
_which = itemgetter("number", "what", "engine")  # of a fault, or of its row


def main() -> int:
    """Goes through all parts; 1 where anything differs from the uninterrupted run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="a few of each; writes nothing")
    parser.add_argument("--only", default="faults,points,random")
    parser.add_argument(
        "--go-on", action="store_true", help="keep the faults and chains of kills that an earlier call found equal"
    )
    parser.add_argument("--place", type=Path, help="where the runs are made (default: a temporary folder)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        place = asked.place or Path(temporary)
        found = json.loads(RESULTS.read_text()) if RESULTS.is_file() and not asked.short else {}
        found |= {"seed": asked.seed, "machine": f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores"}
        wrong = dict.fromkeys(asked.only.split(","), 0)
        for part in wrong:
            for rows, differ in PARTS[part](place, asked, found.get(part)):
                found[part], wrong[part] = rows, differ
                if not asked.short:
                    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
                    chains = {f"{engine}, rank {rank}" for engine, rank, *_ in POINTS}
                    page = report.page(found, chaos_elsewhere.HELD, chaos_elsewhere.NOT_DONE, chains)
                    (REPOSITORY / "docs" / "CHAOS.md").write_text(page)
    differ = sum(wrong.values())
    print(f"chaos: {'all is equal' if not differ else f'{differ} differ'}")
    return int(bool(differ))


def faults(
    place: Path, asked: argparse.Namespace, earlier: list[dict[str, Any]] | None
) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Each fault once, under its engine; after each engine, all rows so far and how many of the new ones differ."""
    rows, wrong = [row for row in earlier or [] if asked.go_on and not row["differences"]], 0
    done = {_which(row) for row in rows}
    left = [fault for fault in FAULTS[:: 9 if asked.short else 1] if _which(vars(fault)) not in done]

    def under(engine: str) -> list[dict[str, Any]]:
        chaos = Chaos(place / f"faults-{engine}", asked.seed)
        return [_row(chaos, fault) for fault in left if fault.engine == engine]

    order = [_which(vars(fault)) for fault in FAULTS]
    for _, found, _ in _at_once(under, tuple((engine,) for engine in sorted({fault.engine for fault in left}))):
        rows = sorted([*rows, *found], key=lambda row: order.index(_which(row)))
        wrong += sum(bool(row["differences"]) for row in found)
        yield rows, wrong


def _row(chaos: Chaos, fault: Fault) -> dict[str, Any]:
    began = time.monotonic()
    try:
        row = dict(vars(tried(chaos, fault)))
    except Exception as error:  # one that cannot be tried is a row of the table too
        row = {"number": fault.number, "what": fault.what, "engine": fault.engine, "codes": [], "resumed_from": 0}
        row["differences"] = [f"{type(error).__name__}: {str(error)[-1500:]}"]
    verdict = "equal" if not row["differences"] else f"DIFFERS: {row['differences'][:3]}"
    seconds = time.monotonic() - began
    print(f"{fault.number:<10} {fault.engine:<7} {fault.what:<75} {row['codes']} {verdict} {seconds:.0f} s", flush=True)
    return row


def points(
    place: Path, asked: argparse.Namespace, earlier: dict[str, list[dict[str, Any]]] | None
) -> Iterator[tuple[dict[str, list[dict[str, Any]]], int]]:
    """A kill at every file operation, by engine and rank; after each chain, all so far and how many differ."""
    tables = dict(earlier or {}) if asked.go_on else {}
    chains = [
        chain for chain in (SHORT_POINTS if asked.short else POINTS) if f"{chain[0]}, rank {chain[1]}" not in tables
    ]
    wrong = 0

    def chain(engine: str, rank: int, first: int, last: int | None) -> list[dict[str, Any]]:
        chaos = Chaos(place / f"points-{engine}-{first}", asked.seed)
        return [vars(point) for point in kill_points(chaos, engine, rank, None, first, last)]

    for (engine, rank, *_), rows, seconds in _at_once(chain, tuple(chains)):
        name = f"{engine}, rank {rank}"
        tables[name] = sorted([*tables.get(name, []), *rows], key=lambda row: int(row["number"]))
        differ = sum(bool(row["differences"]) for row in rows)
        wrong += differ
        print(f"kill points of {name}: {len(rows)} tried, {differ} differ, {seconds:.0f} s", flush=True)
        yield tables, wrong


def at_random(place: Path, asked: argparse.Namespace, _earlier: object) -> Iterator[tuple[dict[str, Any], int]]:
    """Kills at random instants; after each engine, all kills so far and how many ends differ."""
    kills: list[dict[str, Any]] = []
    differences: list[str] = []

    def some(engine: str, many: int) -> tuple[list[dict[str, Any]], list[str]]:
        chaos = Chaos(place / f"random-{engine}", f"{asked.seed}-{engine}")
        done, wrong = random_kills(chaos, engine, many)
        return [vars(kill) for kill in done], wrong

    for (engine, _), (done, wrong), seconds in _at_once(some, SHORT_RANDOM if asked.short else RANDOM):
        kills, differences = [*kills, *done], [*differences, *wrong]
        lost = [max(kill["step"] - kill["resumed_from"], 0) for kill in done]
        print(
            f"random kills, {engine}: {len(done)} kills, all gone on from; steps lost per kill: median "
            f"{statistics.median(lost):.0f}, most {max(lost)}, saved every 20; final weights "
            f"{'bitwise equal' if not wrong else 'DIFFER'} to the uninterrupted run's, {seconds:.0f} s",
            flush=True,
        )
        yield {"kills": kills, "differences": differences}, len(differences)


def _at_once(do: Callable[..., Any], each: tuple[tuple[Any, ...], ...]) -> Iterator[tuple[tuple[Any, ...], Any, float]]:
    """What `do` comes to for each, as they end; some at once, since most of a start is waiting."""
    began = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = {pool.submit(do, *words): words for words in each}
        for one in as_completed(running):
            yield running[one], one.result(), time.monotonic() - began


PARTS: dict[str, Callable[[Path, argparse.Namespace, Any], Iterator[tuple[Any, int]]]] = {
    "faults": faults,
    "points": points,
    "random": at_random,
}

if __name__ == "__main__":
    sys.exit(main())
