"""Speaks with the parents on the other nodes of a start, through files on the disk that all nodes share.

Each parent writes one file and reads those of the others. A file is written over in place and closed at once, so that
also NFS shows its newest content to whoever opens it then; a new name would be hidden there for half a minute. Who may
read the runs may read these, and nobody listens on the network for them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.launch import network
from sft_recipes.launch.process_group import StopRequest
from sft_recipes.launch.topology import Allocation
from sft_recipes.runtime import heartbeat, timeouts
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import EXIT_STOPPED, runs_root


@dataclass(frozen=True)
class Order:
    """What node 0 has all nodes do next: a program of the ranks, on a plan, who meet at an address; or, without a
    program, to leave."""

    number: int
    program: str | None
    plan: str = ""
    address: str = ""
    port: int = 0
    ranks_here: int = 0
    on_gpus: bool = False


class NodeLaunchers:
    """This parent among those of the other nodes."""

    def __init__(self, allocation: Allocation):
        self.allocation = allocation
        self.folder = runs_root().absolute() / ".jobs" / str(allocation.job) / allocation.start
        self.said: dict[str, Any] = {"node": allocation.name}
        self.heard: dict[int, dict[str, Any]] = {}
        self.silent: dict[int, float] = {}
        self._beat = 0
        self._looked = time.monotonic()

    @property
    def leads(self) -> bool:
        """Whether this one decides."""
        return self.allocation.rank == 0

    @property
    def others(self) -> list[int]:
        """The other nodes' numbers."""
        return [number for number in range(self.allocation.nodes) if number != self.allocation.rank]

    def name(self, number: int) -> str:
        """A node's name, once it has been heard."""
        told = self.said if number == self.allocation.rank else self.heard.get(number, {})
        return str(told.get("node", f"node {number} of the job"))

    def told(self, number: int) -> dict[str, Any]:
        """What a node has shown, this one too."""
        return self.said if number == self.allocation.rank else self.heard[number]

    def meet(self, hello: dict[str, Any], asked: StopRequest) -> None:
        """Shows the others what this node has, waits for what they have, and has each try to reach node 0.

        Raises:
            SetupError: one of them is not seen.
            StoppedError: this one was asked to stop before they were.
        """
        for place in (self.folder.parents[1], self.folder.parent, self.folder):
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.leads:
            with socket.create_server(("", 0)) as door:
                tried = network.addresses(self.allocation.addresses)
                self.say(hello={**hello, "door": door.getsockname()[1], "addresses": tried})
                self.say(reaches=network.reached(tried, door.getsockname()[1]))
                self._await("reaches", asked)
            return
        self.say(hello=hello)
        self._await("hello", asked, [0])
        leader = self.heard[0]["hello"]
        self.say(reaches=network.reached(leader["addresses"], leader["door"]))

    @property
    def address(self) -> str:
        """Where all ranks meet: the first of node 0's addresses that all nodes reach, or as many of them as can be."""
        reached = [self.told(number)["reaches"] for number in range(self.allocation.nodes)]
        tried: list[str] = self.told(0)["hello"]["addresses"]
        return max(tried, key=lambda address: sum(address in of_one for of_one in reached))

    def _await(self, what: str, asked: StopRequest, whose: Sequence[int] | None = None) -> None:
        began = time.monotonic()
        says_so = began + timeouts.SAY_WAITING_AFTER
        while missing := [n for n in whose or self.others if what not in self.heard.get(n, {})]:
            asked.check()
            if time.monotonic() > says_so:
                says_so = time.monotonic() + timeouts.NODE_SILENT
                names = ", ".join(map(str, missing))
                print(f"waiting for node {names} of the job to show itself in {self.folder}", flush=True)
            if time.monotonic() > began + timeouts.NODES_MEET:
                raise SetupError(
                    f"RUNS_DIR: {self.allocation.name} sees nothing in {self.folder} of node "
                    f"{', '.join(map(str, missing))} of job {self.allocation.job} within {timeouts.NODES_MEET:.0f} s; "
                    f"name a folder on a disk that all nodes share, or look at that node's log"
                )
            time.sleep(0.1)
            self.look(at_once=True)

    def say(self, **what: Any) -> None:
        """Shows the others something, besides what they were shown before."""
        self.said.update(what)
        self._write()

    def look(self, at_once: bool = False) -> None:
        """Shows that this parent lives, and sees what the others show."""
        now = time.monotonic()
        passed = now - self._looked
        if passed < timeouts.POLL_NODES and not at_once:
            return
        self._looked = now
        with contextlib.suppress(OSError):  # what the disk refuses for long, the others take for silence
            self._write()
        for number in self.others:
            content = self._read(number)
            if content is None or content["beat"] == self.heard.get(number, {}).get("beat"):
                # No more than a little at once: a machine that slept, or a disk that stalled, saw nothing meanwhile.
                self.silent[number] = self.silent.get(number, 0.0) + min(passed, 2 * timeouts.POLL_NODES)
            else:
                self.heard[number], self.silent[number] = content, 0.0

    def goes_missing(self) -> bool:
        """Whether one of the others has; shows them that this one has not."""
        self.look()
        return bool(self.lost())

    def lost(self) -> list[int]:
        """Nodes that have not been heard from for too long, and did not say that they leave."""
        return [
            number
            for number, seconds in self.silent.items()
            if seconds > timeouts.NODE_SILENT and not self.heard.get(number, {}).get("left")
        ]

    def order(
        self, program: str | None, plan: Path | None = None, port: int = 0, ranks_here: int = 0, on_gpus: bool = False
    ) -> Order:
        """Has the others carry out the same as this node."""
        number = self.said.get("order", {}).get("number", 0) + 1
        place = str(plan.absolute()) if plan else ""
        order = Order(number, program, place, self.address, port, ranks_here, on_gpus)
        self.say(order=dataclasses.asdict(order))
        return order

    def ordered(self, after: int) -> Order | None:
        """What node 0 has had ordered since the order of that number."""
        content = self.heard.get(0, {}).get("order")
        return Order(**content) if content and content["number"] > after else None

    def report(self, order: Order, ended: dict[str, Any]) -> None:
        """Shows how the order ended here."""
        self.say(ended={"number": order.number, **ended})

    def reports(self, order: Order) -> dict[int, dict[str, Any]]:
        """How the order ended on the nodes that have said so, this one among them."""
        told = {self.allocation.rank: self.said, **self.heard}
        ended = {number: dict(content["ended"]) for number, content in told.items() if content.get("ended")}
        return {number: one for number, one in ended.items() if one.pop("number") == order.number}

    def misses_its_leader(self) -> bool:
        """Whether node 0 has been silent for longer than what it may do between two orders takes."""
        return self.silent.get(0, 0.0) > timeouts.NODES_MEET

    def tell_of_the_lost(self) -> str | None:
        """What is said of nodes that are not heard from, and word for slurm/launch.sh that Slurm should start the job
        again; None where all are heard."""
        if not (lost := self.lost()):
            return None
        if word := os.environ.get("SFT_RECIPES_REQUEUE"):
            Path(word).touch()
        names = ",".join(self.name(number) for number in lost)
        return (
            f"{names} has not been heard from for {timeouts.NODE_SILENT:.0f} s; the job is started again, and where it "
            f"is lost once more: scontrol update jobid={self.allocation.job} excnodelist={names}"
        )

    def dismiss(self) -> None:
        """Has the others leave, and waits until they do: srun ends those that are left when this process has failed."""
        self.order(None)
        until = time.monotonic() + timeouts.NODES_LEAVE
        while time.monotonic() < until and not all(self.heard.get(n, {}).get("left") for n in self.others):
            time.sleep(0.05)
            self.look(at_once=True)

    def leave(self) -> None:
        """Says that this parent is about to end; what srun sends it from now on changes nothing."""
        for number in heartbeat.ASKING:
            signal.signal(number, signal.SIG_IGN)
        self.say(left=True)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number}.json"

    def _write(self) -> None:
        self._beat += 1
        content = json.dumps({"beat": self._beat, **self.said, "whole": self._beat}).encode()
        opened = os.open(self._file(self.allocation.rank), os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.pwrite(opened, content, 0)
            os.ftruncate(opened, len(content))
        finally:
            os.close(opened)

    def _read(self, number: int) -> dict[str, Any] | None:
        """What a node shows; None where it has shown nothing, or is writing just now."""
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(self._file(number).read_bytes())
            if content["beat"] == content["whole"]:
                return dict(content)
        return None


def first_fault(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of how an order ended on each node, what the others' ends came of: what went wrong by itself, else a stop that
    was asked for, else whatever there is."""
    own = [one for one in reports if one["fault"] and not one["came_of_others"]]
    asked = [one for one in reports if one["code"] == EXIT_STOPPED and not one["fault"]]
    return next(iter([*own, *asked, *(one for one in reports if one["code"])]), reports[0])
