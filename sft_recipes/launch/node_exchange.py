"""Exchange one JSON value per node over TCP: node 0 listens, and answers the others with the values of all."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sft_recipes.launch.stop_request import StopRequest
from sft_recipes.runtime import timeouts

if TYPE_CHECKING:
    from sft_recipes.launch.placement import Placement

log = logging.getLogger(__name__)

_LONGEST_VALUE = 1 << 24  # bytes; a value is the checks of a node, or an exit code


class NodeMissingError(Exception):
    """The nodes did not meet: one of them has not started, has ended, or is not reachable."""


def exchange(place: Placement, port: int, value: Any, stop_request: StopRequest) -> list[Any]:
    """Return the values of all nodes, by rank. Call on every node.

    Args:
        port: on node 0; another exchange has another one.

    Raises:
        NodeMissingError: a node has ended or did not appear in time, or node 0 cannot listen.
        StoppedError: a stop was requested.
    """
    stop_request.check()
    return _request(place, port, value, stop_request) if place.rank else _serve(place, port, value, stop_request)


def _serve(place: Placement, port: int, value: Any, stop_request: StopRequest) -> list[Any]:
    values, connections = {0: value}, list[socket.socket]()
    answer: dict[str, Any] = {"error": f"node 0 of {place.nodes} has ended"}
    with contextlib.ExitStack() as sockets:
        server = sockets.enter_context(_listen(port, place.nodes))
        until = time.monotonic() + timeouts.NODES_MEET
        say_at = time.monotonic() + timeouts.SAY_WAITING_AFTER
        try:
            while missing := [node for node in range(place.nodes) if node not in values]:
                stop_request.check()
                ended = [node for node in place.ended_nodes() if node in missing]
                try:
                    connection = server.accept()[0]
                except OSError:  # above all a timeout
                    if ended:  # and not connected before that
                        raise NodeMissingError(f"node {_listed(ended)} of {place.nodes} has ended") from None
                    if time.monotonic() > until:
                        raise NodeMissingError(_did_not_appear(missing, place)) from None
                    if time.monotonic() > say_at:
                        say_at = time.monotonic() + 60
                        log.info(f"waiting for node {_listed(missing)} of {place.nodes} at {place.address}:{port}")
                    continue
                if _receive_value(connection, place, values, stop_request):
                    connections.append(sockets.enter_context(connection))
                else:
                    connection.close()
            answer = {"values": [values[rank] for rank in range(place.nodes)]}
        except NodeMissingError as error:
            answer = {"error": str(error)}
            raise
        finally:
            for connection in connections:
                with contextlib.suppress(OSError):  # of a node that has ended
                    _send(connection, answer)
    return list(answer["values"])


def _listen(port: int, nodes: int) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, backlog=nodes, dualstack_ipv6=dual)
    except OSError as error:
        raise NodeMissingError(f"node 0 cannot listen: {os.strerror(error.errno or 0)}") from error
    server.settimeout(timeouts.POLL_NODES)
    return server


def _receive_value(
    connection: socket.socket, place: Placement, values: dict[int, Any], stop_request: StopRequest
) -> bool:
    """Add the value of a node; return whether the connection is one of a node of this attempt."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        message = json.loads(_read_line(connection, timeouts.NODE_ANSWERS, stop_request.check))
        if message["attempt"] != place.attempt:
            _send(connection, {"error": f"attempt {place.attempt} of another job has this port"})
        elif message["rank"] in range(1, place.nodes):
            values[message["rank"]] = message["value"]
            return True
    return False


def _request(place: Placement, port: int, value: Any, stop_request: StopRequest) -> list[Any]:
    ended = NodeMissingError(f"node 0 of {place.nodes} has ended")

    def node_0_has_ended() -> bool:
        stop_request.check()
        return 0 in place.ended_nodes()

    line, until = b"", time.monotonic() + timeouts.NODES_MEET
    while True:
        try:
            connection = socket.create_connection((place.address, port), timeout=timeouts.NODE_ANSWERS)
            break
        except (OSError, UnicodeError) as error:  # not there yet, or not a host name
            if node_0_has_ended():
                raise ended from error
            if time.monotonic() > until:
                problem = getattr(error, "strerror", None) or error
                raise NodeMissingError(f"{_did_not_appear([0], place)} ({problem})") from error
        time.sleep(timeouts.POLL_NODES)
    with connection, contextlib.suppress(OSError):  # node 0 was killed
        _send(connection, {"attempt": place.attempt, "rank": place.rank, "value": value})
        # Node 0 gives up before that.
        line = _read_line(connection, timeouts.NODES_MEET + timeouts.NODE_ANSWERS, node_0_has_ended)
    if not line:
        raise ended
    try:
        result = json.loads(line)
        values = None if "error" in result else list(result["values"])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise NodeMissingError("another program answers") from None
    if values is None:
        raise NodeMissingError(result["error"])
    return values


def _read_line(connection: socket.socket, seconds: float, has_ended: Callable[[], bool | None]) -> bytes:
    """Return a line, or what has come until the connection is closed, `seconds` are over, or the sender has ended."""
    connection.settimeout(timeouts.POLL_NODES)
    until, line, last = time.monotonic() + seconds, b"", False
    while not line.endswith(b"\n") and len(line) < _LONGEST_VALUE and time.monotonic() < until:
        try:
            received = connection.recv(1 << 16)
        except TimeoutError:
            if last:
                break
            last = bool(has_ended())  # what it sent before is read once more
            continue
        if not received:
            break
        line += received
    return line


def _send(connection: socket.socket, value: dict[str, Any]) -> None:
    connection.settimeout(timeouts.NODE_ANSWERS)
    connection.sendall(json.dumps(value).encode() + b"\n")


def _did_not_appear(nodes: list[int], place: Placement) -> str:
    return f"node {_listed(nodes)} of {place.nodes} did not appear in {timeouts.NODES_MEET:.0f} s"


def _listed(nodes: list[int]) -> str:
    return ", ".join(map(str, nodes))
