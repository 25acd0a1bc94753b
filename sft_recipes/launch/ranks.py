"""Has the ranks of a plan carry out a program on every node of it, and says how they ended."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path

from sft_recipes.launch import command, network, process_group
from sft_recipes.launch.command import Rendezvous
from sft_recipes.launch.node_launchers import NodeLaunchers, Order, first_fault
from sft_recipes.launch.process_group import StopRequest
from sft_recipes.launch.watchdog import Ended, Watchdog
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime import timeouts
from sft_recipes.runtime.errors import SetupError, UserError
from sft_recipes.runtime.run_dir import EXIT_FAULT, EXIT_STOPPED, EXIT_USER, RunDir, read_json

LINKS = "links"  # a program without a plan


def carry_out(
    plan: Plan, folder: RunDir, program: str, asked: StopRequest, peers: NodeLaunchers | None, saves: bool = True
) -> Ended:
    """Starts a program of `sft_recipes.training` on each rank; the plan is in its folder already.

    Args:
        saves: whether ranks that are asked to stop have something to save.
    """
    command.write_engine(plan, folder)
    if peers is None:
        watch = Watchdog(folder, plan, saves)
        return process_group.run(
            command.launch(plan, folder, program), command.environment(plan, os.environ), asked, watch
        )
    port = command.free_port("", peers.allocation.port)
    order = peers.order(program, folder.plan, port)
    _obey(order, plan, folder, asked, peers)
    return _together(order, peers)


def sum_over_all(plan: Plan, result: Path, asked: StopRequest, peers: NodeLaunchers) -> Ended:
    """Has the ranks of all nodes sum (`training/links.py`), and rank 0 write what it measured to `result`."""
    port = command.free_port("", peers.allocation.port)
    order = peers.order(LINKS, result, port, plan.world_size // plan.nodes, plan.uses_gpu)
    _sum(order, peers, asked)
    return _together(order, peers)


def follow(peers: NodeLaunchers, asked: StopRequest) -> int:
    """Carries out what node 0 orders until it says to leave: 0, since how the job ended is node 0's to say; 1 where
    node 0 is not heard from any more."""
    done = 0
    while True:
        if order := peers.ordered(done):
            if order.program is None:
                return 0
            done = order.number
            if order.program == LINKS:
                _sum(order, peers, asked)
                continue
            try:
                plan, folder = _seen(Path(order.plan), peers)
            except UserError as error:
                line = f"{error}, which {peers.allocation.name} does not see"
                peers.report(order, dataclasses.asdict(Ended(EXIT_USER, line, by_user=True)))
                continue
            _obey(order, plan, folder, asked, peers)
        if peers.misses_its_leader():
            return process_group.fail(f"{peers.name(0)}, which leads, is not heard from any more", EXIT_FAULT)
        time.sleep(0.1)
        peers.look()


def _sum(order: Order, peers: NodeLaunchers, asked: StopRequest) -> None:
    result, meeting = Path(order.plan), Rendezvous(order.address, order.port, peers.allocation.rank)
    arguments = command.links(order.ranks_here, peers.allocation.nodes, meeting, result)
    log = f"{result.parent}/nccl-%h-%p"
    debug = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,GRAPH,NET", "NCCL_DEBUG_FILE": log}
    on_cpu = {} if order.on_gpus else {"CUDA_VISIBLE_DEVICES": ""}
    environment = {**_interface(order), **os.environ, **debug, **on_cpu, "OMP_NUM_THREADS": "1"}
    until, ends_elsewhere = time.monotonic() + timeouts.ALLREDUCE_TEST, _meanwhile(order, peers)

    def elsewhere() -> bool:
        return time.monotonic() > until or ends_elsewhere()

    ended = process_group.run(arguments, environment, asked, meanwhile=elsewhere)
    if time.monotonic() > until:
        ended = Ended(EXIT_FAULT, f"no sum on {peers.allocation.name} within {timeouts.ALLREDUCE_TEST:.0f} s")
    elif ended.code == EXIT_STOPPED and not asked.numbers:  # for another node's sake
        ended = Ended(EXIT_FAULT, f"{peers.allocation.name} lost another node", came_of_others=True)
    peers.report(order, dataclasses.asdict(ended))


def _obey(order: Order, plan: Plan, folder: RunDir, asked: StopRequest, peers: NodeLaunchers) -> None:
    """This node's part, and what becomes of it is told."""
    assert order.program is not None
    meeting = Rendezvous(order.address, order.port, peers.allocation.rank)
    arguments = command.launch(plan, folder, order.program, meeting)
    watch = Watchdog(folder, plan, saves=order.program == "training.main", node=peers.allocation.rank)
    environment = {**_interface(order), **command.environment(plan, os.environ)}
    ended = process_group.run(arguments, environment, asked, watch, _meanwhile(order, peers))
    peers.report(order, dataclasses.asdict(ended))


def _interface(order: Order) -> dict[str, str]:
    """What gloo speaks through, unless somebody has said: left alone it takes the one of the host's own name, which on
    many machines is the loopback."""
    name = network.interface_towards(order.address)
    return {"GLOO_SOCKET_IFNAME": name} if name else {}


def _meanwhile(order: Order, peers: NodeLaunchers) -> Callable[[], bool]:
    """Shows that this node lives, and sees whether another one has failed or is gone."""

    def elsewhere() -> bool:
        peers.look()
        return bool(peers.lost()) or any(one["code"] for one in peers.reports(order).values())

    return elsewhere


def _together(order: Order, peers: NodeLaunchers) -> Ended:
    """How all nodes ended, once they have said so."""
    until = time.monotonic() + timeouts.NODE_REPORT
    while time.monotonic() < until and len(peers.reports(order)) < peers.allocation.nodes and not peers.lost():
        time.sleep(0.1)
        peers.look(at_once=True)
    reports = peers.reports(order)
    if lost := peers.tell_of_the_lost():
        return Ended(EXIT_STOPPED, lost)
    return Ended(**first_fault([reports[number] for number in sorted(reports)]))


def _seen(plan_file: Path, peers: NodeLaunchers) -> tuple[Plan, RunDir]:
    """The plan of an order and its folder, once this node sees them with all that they name.

    Raises:
        SetupError: what it does not see in time.
    """
    folder = RunDir(plan_file.parent)
    until = time.monotonic() + timeouts.FILE_VISIBLE
    while True:
        found = read_json(folder.prepared)
        wanted = [
            plan_file,
            folder.accelerate_config,
            *(Path(found[key]) for key in ("folder", "model") if key in found),
        ]
        missing = [path for path in wanted if not path.exists()]
        if found and not missing:
            return plans.read(plan_file), folder
        if time.monotonic() > until:
            raise SetupError(f"HF_HOME, RUNS_DIR: {(missing or [folder.prepared])[0]}")
        time.sleep(0.2)
        peers.look()
