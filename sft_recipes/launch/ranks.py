"""Runs a program on the ranks of a plan, on every node, and returns how they ended."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from sft_recipes.launch import command, network, process_group
from sft_recipes.launch.command import Rendezvous
from sft_recipes.launch.node_launchers import NodeCommand, NodeLaunchers, first_failure
from sft_recipes.launch.run_context import RunContext
from sft_recipes.launch.stop_request import StopRequest
from sft_recipes.launch.watchdog import LaunchResult, Watchdog
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime import timeouts
from sft_recipes.runtime.errors import SetupError, UserError
from sft_recipes.runtime.run_dir import EXIT_ERROR, EXIT_STOPPED, EXIT_USER, RunDir, read_json

log = logging.getLogger(__name__)
ALLREDUCE_TEST = "allreduce_test"  # a program without a plan


def run_ranks(context: RunContext, program: str, can_save: bool = True) -> LaunchResult:
    """Run a program on every rank; its plan must be in the run directory.

    Args:
        program: a module of `sft_recipes`.
        can_save: whether the ranks save at a stop request.
    """
    plan, run_dir, nodes = context.plan, context.run_dir, context.nodes
    command.write_accelerate_config(plan, run_dir)
    if nodes is None:
        watchdog = Watchdog(run_dir, plan, can_save)
        arguments = command.launch(plan, run_dir, program)
        environment = command.environment(plan, os.environ)
        return process_group.run(arguments, environment, context.stop_request, watchdog)
    port = command.free_port("", nodes.allocation.port)
    node_command = nodes.send_command(program, run_dir.plan, port)
    _run_command(node_command, context)
    return _collect_results(node_command, nodes)


def run_allreduce_test(plan: Plan, result: Path, stop_request: StopRequest, nodes: NodeLaunchers) -> LaunchResult:
    """Run the all-reduce test on the ranks of all nodes; rank 0 writes its measurements to `result`."""
    port = command.free_port("", nodes.allocation.port)
    node_command = nodes.send_command(ALLREDUCE_TEST, result, port, plan.world_size // plan.nodes, plan.uses_gpu)
    _run_allreduce_test(node_command, nodes, stop_request)
    return _collect_results(node_command, nodes)


def follow(nodes: NodeLaunchers, stop_request: StopRequest) -> int:
    """Run the commands of node 0 until it sends the one to exit; return 0, or 1 if node 0 is lost."""
    done = 0
    while True:
        if node_command := nodes.next_command(done):
            if node_command.program is None:
                return 0
            done = node_command.number
            if node_command.program == ALLREDUCE_TEST:
                _run_allreduce_test(node_command, nodes, stop_request)
                continue
            try:
                plan, run_dir = _wait_for_plan(Path(node_command.plan), nodes)
            except UserError as error:
                message = f"{error}: not visible on {nodes.allocation.name}"
                nodes.publish_result(
                    node_command, dataclasses.asdict(LaunchResult(EXIT_USER, message, user_error=True))
                )
                continue
            _run_command(node_command, RunContext(run_dir, plan, stop_request, nodes))
        if nodes.leader_lost():
            log.error(f"{nodes.node_name(0)} (leader): no heartbeat for {timeouts.NODES_MEET:.0f} s")
            return EXIT_ERROR
        time.sleep(0.1)
        nodes.poll()


def _run_allreduce_test(node_command: NodeCommand, nodes: NodeLaunchers, stop_request: StopRequest) -> None:
    result, rendezvous = (
        Path(node_command.plan),
        Rendezvous(node_command.address, node_command.port, nodes.allocation.rank),
    )
    arguments = command.allreduce_test(node_command.ranks_per_node, nodes.allocation.nodes, rendezvous, result)
    nccl_log = f"{result.parent}/nccl-%h-%p"
    debug = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,GRAPH,NET", "NCCL_DEBUG_FILE": nccl_log}
    on_cpu = {} if node_command.uses_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    environment = {**_gloo_interface(node_command), **os.environ, **debug, **on_cpu, "OMP_NUM_THREADS": "1"}
    until, peer_failed = time.monotonic() + timeouts.ALLREDUCE_TEST, _peer_failed(node_command, nodes)

    def timed_out_or_peer_failed() -> bool:
        return time.monotonic() > until or peer_failed()

    ended = process_group.run(arguments, environment, stop_request, peer_failed=timed_out_or_peer_failed)
    if time.monotonic() > until:
        error = f"{nodes.allocation.name}: all-reduce test did not finish within {timeouts.ALLREDUCE_TEST:.0f} s"
        ended = LaunchResult(EXIT_ERROR, error)
    elif ended.code == EXIT_STOPPED and not stop_request.requested:  # because of another node
        ended = LaunchResult(EXIT_ERROR, f"{nodes.allocation.name}: lost another node", lost_peer=True)
    nodes.publish_result(node_command, dataclasses.asdict(ended))


def _run_command(node_command: NodeCommand, context: RunContext) -> None:
    """Run this node's ranks, and report how they ended."""
    nodes, plan, run_dir = context.nodes, context.plan, context.run_dir
    assert node_command.program is not None and nodes is not None
    rendezvous = Rendezvous(node_command.address, node_command.port, nodes.allocation.rank)
    arguments = command.launch(plan, run_dir, node_command.program, rendezvous)
    watchdog = Watchdog(run_dir, plan, can_save=node_command.program == "training.main", node=nodes.allocation.rank)
    environment = {**_gloo_interface(node_command), **command.environment(plan, os.environ)}
    ended = process_group.run(arguments, environment, context.stop_request, watchdog, _peer_failed(node_command, nodes))
    nodes.publish_result(node_command, dataclasses.asdict(ended))


def _gloo_interface(node_command: NodeCommand) -> dict[str, str]:
    """Network interface for gloo, unless the user set one: its default is that of the host's own name, which on many
    machines is loopback."""
    name = network.interface_towards(node_command.address)
    return {"GLOO_SOCKET_IFNAME": name} if name else {}


def _peer_failed(node_command: NodeCommand, nodes: NodeLaunchers) -> Callable[[], bool]:
    """Return a function that updates this node's heartbeat, and returns whether another node has failed or is lost."""

    def peer_failed() -> bool:
        nodes.poll()
        return bool(nodes.lost_nodes()) or any(result["code"] for result in nodes.results(node_command).values())

    return peer_failed


def _collect_results(node_command: NodeCommand, nodes: NodeLaunchers) -> LaunchResult:
    """Result of all nodes, after each has reported."""
    until = time.monotonic() + timeouts.NODE_REPORT
    while (
        time.monotonic() < until
        and len(nodes.results(node_command)) < nodes.allocation.nodes
        and not nodes.lost_nodes()
    ):
        time.sleep(0.1)
        nodes.poll(force=True)
    results = nodes.results(node_command)
    if lost := nodes.request_requeue_if_lost():
        return LaunchResult(EXIT_STOPPED, lost)
    return LaunchResult(**first_failure([results[node] for node in sorted(results)]))


def _wait_for_plan(plan_file: Path, nodes: NodeLaunchers) -> tuple[Plan, RunDir]:
    """Plan of a command and its run directory, after this node sees all files that they name.

    Raises:
        SetupError: a file is not visible within the timeout.
    """
    run_dir = RunDir(plan_file.parent)
    until = time.monotonic() + timeouts.FILE_VISIBLE
    while True:
        prepared = read_json(run_dir.prepared)
        expected = [
            plan_file,
            run_dir.accelerate_config,
            *(Path(prepared[key]) for key in ("folder", "model") if key in prepared),
        ]
        missing = [path for path in expected if not path.exists()]
        if prepared and not missing:
            return plans.read(plan_file), run_dir
        if time.monotonic() > until:
            raise SetupError(f"HF_HOME, RUNS_DIR: {(missing or [run_dir.prepared])[0]}")
        time.sleep(0.2)
        nodes.poll()
