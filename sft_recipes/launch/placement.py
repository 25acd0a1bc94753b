"""The place of this node among the nodes of a run, from the environment: Slurm's variables, or torchrun's."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.launch import node_exchange, outcome
from sft_recipes.launch.node_exchange import NodeMissingError
from sft_recipes.launch.stop_request import StoppedError, StopRequest
from sft_recipes.runtime import timeouts
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.polling import wait_until
from sft_recipes.runtime.run_dir import EXIT_STOPPED

# Of a Slurm job: below the ephemeral ports of Linux (32768 and above), ten for each of 1500 jobs.
_FIRST_PORT, _PORTS_PER_JOB, _JOBS = 15000, 10, 1500
_TORCHRUN_PORT = "29500"


@dataclass
class Placement:
    """One node of a run.

    Attributes:
        rank: rank of this node; the launcher of node 0 prints the verdicts.
        name: name of this node in the scheduler.
        attempt: id of this attempt, the same in `prepare` and on all nodes.
        gpus_per_node: None if the scheduler does not tell.
        address: address of node 0.
        port: next port on node 0; each program of the ranks and each exchange uses another one, in the same order.
        records: folder of the attempt's exit records, None without a run: a node that has one is not waited for.
    """

    nodes: int
    rank: int
    name: str
    attempt: str
    gpus_per_node: int | None
    address: str
    port: int
    records: Path | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is node 0, which writes the files that all nodes read."""
        return self.rank == 0

    def next_port(self) -> int:
        """Return the port of the next program."""
        self.port += 1
        return self.port - 1

    def exchange(self, value: Any, stop_request: StopRequest) -> list[Any]:
        """Return the values of all nodes, by rank. Call on every node.

        Raises:
            NodeMissingError: a node did not appear, has ended, or node 0 cannot be reached.
            StoppedError: a stop was requested, here or on a node that ended because of it.
        """
        port = self.next_port()
        try:
            return node_exchange.exchange(self, port, value, stop_request)
        except NodeMissingError as error:
            if wait_until(lambda: EXIT_STOPPED in self.ended_nodes().values(), timeouts.EXIT_RECORD, 0.2):
                raise StoppedError from None
            place = f"network: node {self.rank}, node 0 at {self.address}:{port}"
            raise NodeMissingError(f"{place}: {error}. See MASTER_ADDR, MASTER_PORT") from None

    def ended_nodes(self) -> dict[int, int]:
        """Return the exit codes of the other nodes that have ended."""
        records = outcome.read_records(self.records) if self.records else []
        return {record.node: record.code for record in records if record.node != self.rank}

    def agree(self, code: int, stop_request: StopRequest) -> int:
        """Return the first exit code other than 0 of any node, so that all continue or none. Call on every node."""
        return next(filter(None, self.exchange(code, stop_request)), 0)


def from_environment(environment: Mapping[str, str], whole_job: bool = False) -> Placement | None:
    """Return this node's place; None outside of a Slurm job step and without torchrun's variables.

    Args:
        whole_job: for `prepare`, a step of one task in a job of several nodes.

    Raises:
        SetupError: an invalid variable, or a Slurm step with more or less than one task per node.

    Sources: srun(1), "OUTPUT ENVIRONMENT VARIABLES"; torch.distributed.run, whose options PET_… set.
    """
    if environment.get("SLURM_STEP_ID", "").isdigit() and "SLURM_PROCID" in environment:
        return _from_slurm(environment, whole_job)
    nodes = parse_integer(_torchrun(environment, "NNODES") or "1", "PET_NNODES", 1)
    if nodes == 1:
        return None
    rank = _torchrun(environment, "NODE_RANK") or ("0" if whole_job else "")
    address = _torchrun(environment, "MASTER_ADDR")
    if not whole_job and not address:
        raise SetupError(f"PET_MASTER_ADDR: not set, PET_NNODES={nodes}. Set it to the address of node 0")
    return Placement(
        nodes=nodes,
        rank=parse_integer(rank, "PET_NODE_RANK", 0, nodes - 1),
        name=socket.gethostname(),
        attempt=environment.get("SFT_RECIPES_ATTEMPT") or "manual",
        gpus_per_node=None,
        address=address,
        port=_port(environment) or int(_TORCHRUN_PORT),
    )


def _from_slurm(environment: Mapping[str, str], whole_job: bool) -> Placement:
    tasks = int(environment["SLURM_STEP_NUM_TASKS"])
    nodes = int(environment["SLURM_JOB_NUM_NODES" if whole_job else "SLURM_STEP_NUM_NODES"])
    if tasks != (1 if whole_job else nodes):
        raise SetupError(f"Slurm: found {tasks} tasks on {nodes} nodes, expected one per node. Use --ntasks-per-node=1")
    on_node, total = environment.get("SLURM_GPUS_ON_NODE"), environment.get("SLURM_GPUS", "")
    gpus_per_node = int(on_node) if on_node else None
    if gpus_per_node is not None and total.isdigit() and int(total) != gpus_per_node * nodes:
        raise SetupError(f"Slurm: found {total} GPUs on {nodes} nodes, expected as many on each. Use --gpus-per-node")
    job = int(environment["SLURM_JOB_ID"])
    return Placement(
        nodes=nodes,
        rank=0 if whole_job else int(environment["SLURM_NODEID"]),
        name=environment.get("SLURMD_NODENAME") or socket.gethostname(),
        attempt=f"{job}-{environment.get('SLURM_RESTART_COUNT') or 0}",
        gpus_per_node=gpus_per_node,
        # Of the node that srun runs on: node 0 in a batch job. Slurm's own name of a node need not resolve.
        address=_torchrun(environment, "MASTER_ADDR") or environment.get("SLURM_LAUNCH_NODE_IPADDR", ""),
        port=_port(environment) or _FIRST_PORT + job % _JOBS * _PORTS_PER_JOB,
    )


def _torchrun(environment: Mapping[str, str], name: str) -> str:
    """Return a variable of torchrun, with or without its prefix."""
    return environment.get(f"PET_{name}") or environment.get(name) or ""


def _port(environment: Mapping[str, str]) -> int | None:
    text = _torchrun(environment, "MASTER_PORT")
    return parse_integer(text, "MASTER_PORT", 1, 65535 - _PORTS_PER_JOB) if text else None


def parse_integer(text: str, name: str, least: int, most: int | None = None) -> int:
    """Parse an integer.

    Raises:
        SetupError: `text` is not an integer, or is below `least` or above `most`.
    """
    if not re.fullmatch(r"[-+]?\d+", text) or int(text) < least or (most is not None and int(text) > most):
        expected = f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"
        raise SetupError(f"{name}: found {text!r}, expected {expected}")
    return int(text)
