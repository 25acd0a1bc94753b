"""Has the ranks of a plan carry out a program on every node of it, and says how they ended."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path

from sft_recipes.launch import command, network, process_group
from sft_recipes.launch.command import Rendezvous
from sft_recipes.launch.node_launchers import NodeCommand, NodeLaunchers, first_failure
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
    node_command = peers.send_command(program, folder.plan, port)
    _obey(node_command, plan, folder, asked, peers)
    return _together(node_command, peers)


def sum_over_all(plan: Plan, result: Path, asked: StopRequest, peers: NodeLaunchers) -> Ended:
    """Has the ranks of all nodes sum (`training/links.py`), and rank 0 write what it measured to `result`."""
    port = command.free_port("", peers.allocation.port)
    node_command = peers.send_command(LINKS, result, port, plan.world_size // plan.nodes, plan.uses_gpu)
    _sum(node_command, peers, asked)
    return _together(node_command, peers)


def follow(peers: NodeLaunchers, asked: StopRequest) -> int:
    """Carries out what node 0 orders until it says to leave: 0, since how the job ended is node 0's to say; 1 where
    node 0 is not heard from any more."""
    done = 0
    while True:
        if node_command := peers.next_command(done):
            if node_command.program is None:
                return 0
            done = node_command.number
            if node_command.program == LINKS:
                _sum(node_command, peers, asked)
                continue
            try:
                plan, folder = _seen(Path(node_command.plan), peers)
            except UserError as error:
                line = f"{error}, which {peers.allocation.name} does not see"
                peers.publish_result(node_command, dataclasses.asdict(Ended(EXIT_USER, line, by_user=True)))
                continue
            _obey(node_command, plan, folder, asked, peers)
        if peers.leader_lost():
            return process_group.fail(
                f"{peers.node_name(0)} (leader): no heartbeat for {timeouts.NODES_MEET:.0f} s", EXIT_FAULT
            )
        time.sleep(0.1)
        peers.poll()


def _sum(node_command: NodeCommand, peers: NodeLaunchers, asked: StopRequest) -> None:
    result, meeting = (
        Path(node_command.plan),
        Rendezvous(node_command.address, node_command.port, peers.allocation.rank),
    )
    arguments = command.links(node_command.ranks_per_node, peers.allocation.nodes, meeting, result)
    log = f"{result.parent}/nccl-%h-%p"
    debug = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,GRAPH,NET", "NCCL_DEBUG_FILE": log}
    on_cpu = {} if node_command.uses_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    environment = {**_interface(node_command), **os.environ, **debug, **on_cpu, "OMP_NUM_THREADS": "1"}
    until, ends_elsewhere = time.monotonic() + timeouts.ALLREDUCE_TEST, _meanwhile(node_command, peers)

    def elsewhere() -> bool:
        return time.monotonic() > until or ends_elsewhere()

    ended = process_group.run(arguments, environment, asked, meanwhile=elsewhere)
    if time.monotonic() > until:
        ended = Ended(EXIT_FAULT, f"no sum on {peers.allocation.name} within {timeouts.ALLREDUCE_TEST:.0f} s")
    elif ended.code == EXIT_STOPPED and not asked.numbers:  # for another node's sake
        ended = Ended(EXIT_FAULT, f"{peers.allocation.name} lost another node", came_of_others=True)
    peers.publish_result(node_command, dataclasses.asdict(ended))


def _obey(node_command: NodeCommand, plan: Plan, folder: RunDir, asked: StopRequest, peers: NodeLaunchers) -> None:
    """This node's part, and what becomes of it is told."""
    assert node_command.program is not None
    meeting = Rendezvous(node_command.address, node_command.port, peers.allocation.rank)
    arguments = command.launch(plan, folder, node_command.program, meeting)
    watch = Watchdog(folder, plan, saves=node_command.program == "training.main", node=peers.allocation.rank)
    environment = {**_interface(node_command), **command.environment(plan, os.environ)}
    ended = process_group.run(arguments, environment, asked, watch, _meanwhile(node_command, peers))
    peers.publish_result(node_command, dataclasses.asdict(ended))


def _interface(node_command: NodeCommand) -> dict[str, str]:
    """What gloo speaks through, unless somebody has said: left alone it takes the one of the host's own name, which on
    many machines is the loopback."""
    name = network.interface_towards(node_command.address)
    return {"GLOO_SOCKET_IFNAME": name} if name else {}


def _meanwhile(node_command: NodeCommand, peers: NodeLaunchers) -> Callable[[], bool]:
    """Shows that this node lives, and sees whether another one has failed or is gone."""

    def elsewhere() -> bool:
        peers.poll()
        return bool(peers.lost_nodes()) or any(one["code"] for one in peers.results(node_command).values())

    return elsewhere


def _together(node_command: NodeCommand, peers: NodeLaunchers) -> Ended:
    """How all nodes ended, once they have said so."""
    until = time.monotonic() + timeouts.NODE_REPORT
    while (
        time.monotonic() < until
        and len(peers.results(node_command)) < peers.allocation.nodes
        and not peers.lost_nodes()
    ):
        time.sleep(0.1)
        peers.poll(force=True)
    reports = peers.results(node_command)
    if lost := peers.request_requeue_if_lost():
        return Ended(EXIT_STOPPED, lost)
    return Ended(**first_failure([reports[number] for number in sorted(reports)]))


def _seen(plan_file: Path, peers: NodeLaunchers) -> tuple[Plan, RunDir]:
    """The plan of an node_command and its folder, once this node sees them with all that they name.

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
        peers.poll()
