"""Exchange one JSON value per node through torch's store, which node 0 serves. The launcher of each node starts one
process: FILE ADDRESS PORT NODES RANK SECONDS RECORDS. The file has this node's value, and then those of all nodes."""

import contextlib
import datetime
import json
import socket
import sys
import time
from pathlib import Path

from sft_recipes.runtime import library_imports, timeouts


def exchange(value: str, address: str, port: int, nodes: int, rank: int, seconds: float, records: Path) -> list[str]:
    """Return the values of all nodes by rank.

    Args:
        records: folder of the attempt's exit records: a node that has one does not appear any more.

    Raises:
        RuntimeError: node 0 cannot listen, cannot be reached, or does not hear from all nodes.
    """
    with library_imports.without_garbage_collection():
        from torch.distributed import TCPStore

    until = time.monotonic() + seconds
    limit = datetime.timedelta(seconds=seconds)
    while rank and not _listens(address, port) and time.monotonic() < until:
        if (records / "node-0.json").is_file():
            raise RuntimeError(f"node 0 of {nodes} has ended")
        time.sleep(0.2)
    store = TCPStore(address, port, is_master=rank == 0, timeout=limit, wait_for_workers=False)
    store.set(str(rank), value)
    say_at = time.monotonic() + timeouts.SAY_WAITING_AFTER
    while missing := ", ".join(str(node) for node in range(nodes) if not store.check([str(node)])):
        ended = [node for node in missing.split(", ") if (records / f"node-{node}.json").is_file()]
        if ended and not store.check(ended):
            raise RuntimeError(f"node {', '.join(ended)} of {nodes} has ended")
        if time.monotonic() > until:
            raise RuntimeError(f"node {missing} of {nodes} did not appear in {seconds:.0f} s")
        if rank == 0 and time.monotonic() > say_at:
            say_at = time.monotonic() + 60
            print(f"waiting for node {missing} of {nodes} at {address}:{port}", flush=True)
        time.sleep(0.05)
    values = [store.get(str(node)).decode() for node in range(nodes)]
    store.add("done", 1)
    while rank == 0 and store.add("done", 0) < nodes and time.monotonic() < until:  # the others still read from here
        time.sleep(0.05)
    return values


def _listens(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=5):
        return True
    return False


def main(file: Path, address: str, port: str, nodes: str, rank: str, seconds: str, records: str) -> None:
    """Run one exchange; the file then has `values` or an `error`."""
    try:
        arguments = (address, int(port), int(nodes), int(rank), float(seconds), Path(records))
        values = exchange(file.read_text(encoding="utf-8"), *arguments)
        content = {"values": [json.loads(value) for value in values]}
    except RuntimeError as error:
        problem = str(error).partition("\n")[0][:160]
        place = f"network: node {rank}, node 0 at {address}:{port}"
        content = {"error": f"{place}: {problem}. See MASTER_ADDR, MASTER_PORT"}
    file.write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
