"""Runs a program on this node's ranks of a plan, and returns how it ended."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import struct
from collections.abc import Mapping

from sft_recipes.launch import command, outcome, process_group
from sft_recipes.launch.run_context import RunContext
from sft_recipes.launch.watchdog import LaunchResult, Watchdog
from sft_recipes.runtime import timeouts
from sft_recipes.runtime.polling import wait_until
from sft_recipes.runtime.run_dir import EXIT_STOPPED

log = logging.getLogger(__name__)
_SIOCGIFADDR = 0x8915  # linux/sockios.h


def run_ranks(
    context: RunContext, program: str, can_save: bool = True, variables: Mapping[str, str] | None = None
) -> LaunchResult:
    """Run a program on every rank of this node; its plan and accelerate configuration must be in the run directory of
    the context. Call on every node.

    Args:
        program: a module of `sft_recipes`.
        can_save: whether the ranks save at a stop request.
        variables: more environment variables.
    """
    plan, run_dir, placement = context.plan, context.run_dir, context.placement
    node, ended_nodes = (placement.rank, placement.ended_nodes) if placement else (0, dict)
    watchdog = Watchdog(run_dir, plan, can_save, node, ended_nodes)
    arguments = command.launch(plan, run_dir, program, placement)
    # gloo's default interface is that of the host's own name, which on many machines is loopback.
    interface = interface_towards(placement.address) if placement else None
    gloo = {"GLOO_SOCKET_IFNAME": interface} if interface else {}
    environment = {**gloo, **command.environment(plan, os.environ), **(variables or {})}
    ended = process_group.run_ranks(arguments, environment, context.stop_request, watchdog)
    return report(context, ended)


def report(context: RunContext, ended: LaunchResult) -> LaunchResult:
    """Record why this node's ranks failed, and return the cause of all nodes. Ranks that only lost others are a
    consequence: wait for the record of another node, whose launcher a scheduler may kill once this one exits."""
    place = context.placement
    if place is None or place.records is None or ended.code in (0, EXIT_STOPPED):
        return ended
    records = place.records
    if not ended.error:  # their launcher failed, for example at the rendezvous
        ended = LaunchResult(ended.code, f"ranks on {place.name}: exit code {ended.code}", lost_peer=True)
    if not place.is_first:
        log.error(ended.error)
    own = outcome.write_record(place, ended.code, [], ended.error, ended.lost_peer)

    def has_cause() -> bool:
        return any(record.error and not record.lost_peer for record in outcome.read_records(records))

    wait_until(has_cause, timeouts.NODE_REPORT, 0.2)
    first = outcome.first_failure(outcome.read_records(records)) or own
    return LaunchResult(first.code, first.error, first.lost_peer)


def interface_towards(address: str) -> str | None:
    """Return the name of the interface that routes to an address; None if there is no route."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # of a datagram socket: selects the route and sends nothing
        own_address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(answer[20:24]) == own_address:
                    return name
    return None
