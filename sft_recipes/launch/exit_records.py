"""Exit records: how the launcher of each node ended, as files in the run directory.

Standard library only: `outcome.py` reads them on a machine without this package's requirements.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

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


def own(
    placement: Placement, code: int, signals: Sequence[int] = (), error: str | None = None, lost_peer: bool = False
) -> ExitRecord:
    """Return the record of this node's launcher."""
    return ExitRecord(placement.rank, placement.name, code, error, lost_peer, signal.SIGTERM in signals)


def folder(run: Path, attempt: str) -> Path:
    """Return the folder of an attempt's records."""
    return run / "exits" / attempt


def write(records: Path, record: ExitRecord) -> None:
    """Write a node's record; its first cause is kept."""
    records.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = records / f"node-{record.node}.json"
    content = asdict(record)
    if (earlier := next((r for r in read(records) if r.node == record.node), None)) and earlier.error:
        content = {**asdict(earlier), "code": record.code or earlier.code, "terminated": record.terminated}
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content), encoding="utf-8")
    os.replace(partial, file)  # noqa: PTH105


def read(records: Path) -> list[ExitRecord]:
    """Return the records that exist, by node."""
    found = []
    for file in records.glob("node-*.json"):
        with contextlib.suppress(OSError, ValueError):  # a stale name on NFS
            found.append(ExitRecord(**json.loads(file.read_text(encoding="utf-8"))))
    return sorted(found, key=lambda record: record.node)


def first_failure(records: Iterable[ExitRecord]) -> ExitRecord | None:
    """Return the record that explains the others: a node's own failure, the earliest first; otherwise a failure after
    a lost connection; otherwise any code other than 0, that of node 0 first."""
    failed = [record for record in records if record.code]
    order = sorted(failed, key=lambda r: (r.error is None, r.lost_peer, r.time if r.error else r.node))
    return order[0] if order else None
