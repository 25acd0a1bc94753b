"""Exit records: how the launcher of each node ended, as files in the run directory.

Standard library only: `outcome.py` reads them on a machine without this package's requirements.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sft_recipes.runtime.run_dir import write_json

if TYPE_CHECKING:
    from sft_recipes.launch.placement import Placement


@dataclass(frozen=True)
class ExitRecord:
    """How a node's launcher ended.

    Attributes:
        name: name of the node.
        error: cause, with the rank that failed first on this node; None at a stop or a normal end.
        lost_peer: the ranks of this node only lost others, so another node may have the cause.
        terminated: the launcher received SIGTERM.
    """

    node: int
    name: str
    code: int
    error: str | None = None
    lost_peer: bool = False
    terminated: bool = False
    time: float = field(default_factory=time.time)


def folder(run: Path, attempt: str) -> Path:
    """Return the folder of an attempt's records."""
    return run / "exits" / attempt


def write(
    run: Path, place: Placement, code: int, signals: Sequence[int], error: str | None = None, lost_peer: bool = False
) -> ExitRecord:
    """Write and return the record of this node's launcher; its first cause is kept."""
    record = ExitRecord(place.rank, place.name, code, error, lost_peer, signal.SIGTERM in signals)
    earlier = next((one for one in read(run, place.attempt) if one.node == place.rank), None)
    if earlier and earlier.error:
        record = replace(earlier, code=record.code or earlier.code, terminated=record.terminated)
    records = folder(run, place.attempt)
    records.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_json(records / f"node-{record.node}.json", asdict(record))
    return record


def read(run: Path, attempt: str) -> list[ExitRecord]:
    """Return the records of an attempt, by node."""
    found = []
    for file in folder(run, attempt).glob("node-*.json"):
        with contextlib.suppress(OSError, ValueError):  # a stale name on NFS
            found.append(ExitRecord(**json.loads(file.read_text(encoding="utf-8"))))
    return sorted(found, key=lambda record: record.node)


def first_failure(records: Iterable[ExitRecord]) -> ExitRecord | None:
    """Return the record that explains the others: a node's own failure, the earliest first; otherwise a failure after
    a lost connection; otherwise any code other than 0, that of node 0 first."""
    failed = [record for record in records if record.code]
    order = sorted(failed, key=lambda r: (r.error is None, r.lost_peer, r.time if r.error else r.node))
    return order[0] if order else None
