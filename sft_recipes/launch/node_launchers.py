"""Coordinate the launchers on the nodes of a job through files on the disk that all nodes share.

Each launcher writes one file and reads those of the others. A file is overwritten in place and closed at once: NFS
shows its newest content to the next process that opens it, but can hide a new file name for half a minute. Only the
owner can read these files, and no launcher listens on the network for them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.launch import network
from sft_recipes.launch.stop_request import StopRequest
from sft_recipes.launch.topology import Allocation
from sft_recipes.runtime import heartbeat, timeouts
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import EXIT_STOPPED, runs_root

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NodeCommand:
    """What the leader (node 0) makes every node run next: a program of the ranks; None makes the followers exit."""

    number: int
    program: str | None
    plan: str = ""
    address: str = ""
    port: int = 0
    ranks_per_node: int = 0
    uses_gpu: bool = False


class NodeLaunchers:
    """This node's launcher and those of the other nodes; node 0 is the leader, the others are followers."""

    def __init__(self, allocation: Allocation):
        self.allocation = allocation
        self.folder = runs_root().absolute() / ".jobs" / str(allocation.job) / allocation.start
        self.own_status: dict[str, Any] = {"node": allocation.name}
        self.other_statuses: dict[int, dict[str, Any]] = {}
        self.silent_seconds: dict[int, float] = {}
        self._heartbeat = 0
        self._polled_at = time.monotonic()

    @property
    def is_leader(self) -> bool:
        """Whether this launcher sends the commands."""
        return self.allocation.rank == 0

    @property
    def other_nodes(self) -> list[int]:
        """Ranks of the other nodes."""
        return [node for node in range(self.allocation.nodes) if node != self.allocation.rank]

    def node_name(self, node: int) -> str:
        """Return a node's name, or its rank before its first heartbeat."""
        status = self.own_status if node == self.allocation.rank else self.other_statuses.get(node, {})
        return str(status.get("node", f"node {node} of the job"))

    def status(self, node: int) -> dict[str, Any]:
        """Return the latest status that a node published, this one included."""
        return self.own_status if node == self.allocation.rank else self.other_statuses[node]

    def rendezvous(self, node_info: dict[str, Any], stop_request: StopRequest) -> None:
        """Publish this node's hardware, wait for that of the others, and let each of them try to reach node 0.

        Raises:
            SetupError: a node did not appear in time.
            StoppedError: a stop was requested before all nodes appeared.
        """
        for place in (self.folder.parents[1], self.folder.parent, self.folder):
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.is_leader:
            with socket.create_server(("", 0)) as server:
                port = server.getsockname()[1]
                addresses = network.candidate_addresses(self.allocation.addresses)
                self.publish(node_info={**node_info, "port": port, "addresses": addresses})
                self.publish(reachable=network.reachable_addresses(addresses, port))
                self._await("reachable", stop_request)
            return
        self.publish(node_info=node_info)
        self._await("node_info", stop_request, [0])
        leader = self.other_statuses[0]["node_info"]
        self.publish(reachable=network.reachable_addresses(leader["addresses"], leader["port"]))

    @property
    def rendezvous_address(self) -> str:
        """Node 0's first address that all nodes reach, otherwise the one that most of them reach."""
        reachable = [self.status(node)["reachable"] for node in range(self.allocation.nodes)]
        addresses: list[str] = self.status(0)["node_info"]["addresses"]
        return max(addresses, key=lambda address: sum(address in of_node for of_node in reachable))

    def _await(self, field: str, stop_request: StopRequest, nodes: Sequence[int] | None = None) -> None:
        began = time.monotonic()
        next_message = began + timeouts.SAY_WAITING_AFTER
        while missing := [n for n in nodes or self.other_nodes if field not in self.other_statuses.get(n, {})]:
            stop_request.check()
            if time.monotonic() > next_message:
                next_message = time.monotonic() + timeouts.NODE_SILENT
                names = ", ".join(map(str, missing))
                log.info(f"waiting for node {names} of the job in {self.folder}")
            if time.monotonic() > began + timeouts.NODES_MEET:
                raise SetupError(
                    f"RUNS_DIR: node {', '.join(map(str, missing))} of job {self.allocation.job} did not appear in "
                    f"{self.folder}, as seen from {self.allocation.name}, within {timeouts.NODES_MEET:.0f} s. Set "
                    f"RUNS_DIR to a disk that all nodes share, or see that node's log"
                )
            time.sleep(0.1)
            self.poll(force=True)

    def publish(self, **fields: Any) -> None:
        """Add fields to this node's status and write it."""
        self.own_status.update(fields)
        self._write()

    def poll(self, force: bool = False) -> None:
        """Write this launcher's heartbeat and read the status of the others."""
        now = time.monotonic()
        passed = now - self._polled_at
        if passed < timeouts.POLL_NODES and not force:
            return
        self._polled_at = now
        with contextlib.suppress(OSError):  # if the disk fails for long, the others report this node as silent
            self._write()
        for node in self.other_nodes:
            content = self._read(node)
            if content is None or content["heartbeat"] == self.other_statuses.get(node, {}).get("heartbeat"):
                # Bounded: this machine may have slept, or its disk stalled, and then saw no heartbeat meanwhile.
                self.silent_seconds[node] = self.silent_seconds.get(node, 0.0) + min(passed, 2 * timeouts.POLL_NODES)
            else:
                self.other_statuses[node], self.silent_seconds[node] = content, 0.0

    def lost_nodes(self) -> list[int]:
        """Return the nodes without a heartbeat for too long that did not announce their exit."""
        return [
            node
            for node, seconds in self.silent_seconds.items()
            if seconds > timeouts.NODE_SILENT and not self.other_statuses.get(node, {}).get("exiting")
        ]

    def any_node_lost(self) -> bool:
        """Poll the other nodes; whether one of them is lost."""
        self.poll()
        return bool(self.lost_nodes())

    def send_command(
        self,
        program: str | None,
        plan: Path | None = None,
        port: int = 0,
        ranks_per_node: int = 0,
        uses_gpu: bool = False,
    ) -> NodeCommand:
        """Make the followers run the same program as this node."""
        number = self.own_status.get("command", {}).get("number", 0) + 1
        path = str(plan.absolute()) if plan else ""
        command = NodeCommand(number, program, path, self.rendezvous_address, port, ranks_per_node, uses_gpu)
        self.publish(command=dataclasses.asdict(command))
        return command

    def next_command(self, after: int) -> NodeCommand | None:
        """Return the leader's latest command if its number is above `after`."""
        content = self.other_statuses.get(0, {}).get("command")
        return NodeCommand(**content) if content and content["number"] > after else None

    def publish_result(self, command: NodeCommand, result: dict[str, Any]) -> None:
        """Publish how the command ended on this node."""
        self.publish(result={"number": command.number, **result})

    def results(self, command: NodeCommand) -> dict[int, dict[str, Any]]:
        """Return how the command ended on each node that has published it, this one included."""
        statuses = {self.allocation.rank: self.own_status, **self.other_statuses}
        results = {node: dict(status["result"]) for node, status in statuses.items() if status.get("result")}
        return {node: result for node, result in results.items() if result.pop("number") == command.number}

    def leader_lost(self) -> bool:
        """Whether the leader is silent for longer than its work between two commands can take."""
        return self.silent_seconds.get(0, 0.0) > timeouts.NODES_MEET

    def request_requeue_if_lost(self) -> str | None:
        """Return an error for lost nodes, and make slurm/launch.sh requeue the job; None if no node is lost."""
        if not (lost := self.lost_nodes()):
            return None
        if requeue_file := os.environ.get("SFT_RECIPES_REQUEUE"):
            Path(requeue_file).touch()
        names = ",".join(self.node_name(node) for node in lost)
        return (
            f"{names}: no heartbeat for {timeouts.NODE_SILENT:.0f} s; the job is requeued. If the node is lost again: "
            f"scontrol update jobid={self.allocation.job} excnodelist={names}"
        )

    def release_followers(self) -> None:
        """Make the followers exit and wait for it: srun kills those that still run when this process fails."""
        self.send_command(None)
        until = time.monotonic() + timeouts.NODES_LEAVE
        while time.monotonic() < until and not all(
            self.other_statuses.get(n, {}).get("exiting") for n in self.other_nodes
        ):
            time.sleep(0.05)
            self.poll(force=True)

    def announce_exit(self) -> None:
        """Publish that this launcher is about to exit, and ignore the signals that srun sends from now on."""
        for number in heartbeat.STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        self.publish(exiting=True)

    def _file(self, node: int) -> Path:
        return self.folder / f"{node}.json"

    def _write(self) -> None:
        self._heartbeat += 1
        # The counter is at both ends: a reader detects a file that is being written.
        content = json.dumps({"heartbeat": self._heartbeat, **self.own_status, "complete": self._heartbeat}).encode()
        descriptor = os.open(self._file(self.allocation.rank), os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.pwrite(descriptor, content, 0)
            os.ftruncate(descriptor, len(content))
        finally:
            os.close(descriptor)

    def _read(self, node: int) -> dict[str, Any] | None:
        """Return a node's status; None if its file is missing or incomplete."""
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(self._file(node).read_bytes())
            if content["heartbeat"] == content["complete"]:
                return dict(content)
        return None


def first_failure(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the node result that explains the others: a node's own failure, otherwise a requested stop, otherwise any
    other nonzero exit code, otherwise the first."""
    own = [result for result in results if result["error"] and not result["lost_peer"]]
    stopped = [result for result in results if result["code"] == EXIT_STOPPED and not result["error"]]
    return next(iter([*own, *stopped, *(result for result in results if result["code"])]), results[0])
