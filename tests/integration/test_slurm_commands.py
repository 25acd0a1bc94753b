"""Slurm jobs: topology, generated headers, command lines, and the launchers of several nodes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from helpers.recipes import SHIPPED
from helpers.workplace import REPOSITORY

from sft_recipes import cli
from sft_recipes.config import loader
from sft_recipes.launch import attempts, command, node_checks, outcome, ranks, topology
from sft_recipes.launch.attempts import Attempt
from sft_recipes.launch.node_checks import CheckResult
from sft_recipes.launch.node_exchange import NodeMissingError
from sft_recipes.launch.outcome import ExitRecord, Outcome
from sft_recipes.launch.placement import Placement, from_environment
from sft_recipes.launch.run_context import RunContext
from sft_recipes.launch.stop_request import StoppedError, StopRequest
from sft_recipes.launch.topology import HardwareRequest
from sft_recipes.planner import plan as plans
from sft_recipes.planner import save_time
from sft_recipes.runtime import cuda, timeouts
from sft_recipes.runtime.errors import UserError
from sft_recipes.runtime.run_dir import RunDir
from slurm import write_headers

STEP = {
    "SLURM_JOB_ID": "70123",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[003-005,009]",
    "SLURM_NODEID": "2",
    "SLURM_PROCID": "2",
    "SLURMD_NODENAME": "gpu005",
    "SLURM_GPUS_ON_NODE": "8",
}
HEADERS = sorted(path for path in (REPOSITORY / "slurm").glob("*.sh") if "\n#SBATCH " in path.read_text())


@pytest.fixture(autouse=True)
def _short_wait_for_exit_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeouts, "EXIT_RECORD", 0.2)


def header(script: Path) -> dict[str, str]:
    arguments = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?", script.read_text(), re.MULTILINE)
    return {name: value or "yes" for name, value in arguments}


def test_placement_of_a_slurm_step() -> None:
    place = from_environment(STEP)
    assert place == Placement(4, 2, "gpu005", "70123-0", 8, "", 15000 + 70123 % 1500 * 10)
    assert not place.is_first and (place.next_port(), place.next_port()) == (26230, 26231)
    given = {"SLURM_RESTART_COUNT": "2", "MASTER_ADDR": "10.1.2.3", "MASTER_PORT": "6000"}
    requeued = from_environment({**STEP, **given})
    assert (requeued.attempt, requeued.address, requeued.port) == ("70123-2", "10.1.2.3", 6000)
    assert from_environment({**STEP, "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.3"}).address == "10.0.0.3"
    one_task = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_NUM_NODES": "4"}
    prepare = from_environment({**STEP, **one_task}, whole_job=True)
    assert (prepare.nodes, prepare.rank, prepare.attempt) == (4, 0, "70123-0")


@pytest.mark.parametrize("prefix", ["PET_", ""])
def test_placement_from_torchrun_variables(prefix: str) -> None:
    variables = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.1.2.3", "MASTER_PORT": "6000"}
    place = from_environment({f"{prefix}{name}": value for name, value in variables.items()})
    assert (place.nodes, place.rank, place.address, place.port) == (2, 1, "10.1.2.3", 6000)
    assert (place.attempt, place.gpus_per_node) == ("manual", None)
    assert from_environment({f"{prefix}NNODES": "2"}, whole_job=True).rank == 0


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "0"},
        {**STEP, "SLURM_STEP_ID": "batch"},
        {"PET_NNODES": "1", "RANK": "3", "WORLD_SIZE": "8"},
    ],
)
def test_no_placement_outside_of_a_job(variables: Mapping[str, str]) -> None:
    assert from_environment(variables) is None


@pytest.mark.parametrize(
    ("variables", "error"),
    [
        ({**STEP, "MASTER_PORT": "abc"}, "MASTER_PORT: found 'abc', expected an integer from 1"),
        ({**STEP, "MASTER_PORT": "70000"}, "MASTER_PORT: found '70000', expected an integer from 1 to 65525"),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "32"}, "found 32 tasks on 4 nodes, expected one per node"),
        ({**STEP, "SLURM_GPUS": "28"}, "found 28 GPUs on 4 nodes, expected as many on each"),
        ({"PET_NNODES": "1:4"}, "PET_NNODES: found '1:4', expected an integer of at least 1"),
        ({"PET_NNODES": "2", "PET_NODE_RANK": "0"}, "PET_MASTER_ADDR: not set, PET_NNODES=2"),
        ({"PET_NNODES": "2", "MASTER_ADDR": "a", "PET_NODE_RANK": "2"}, "PET_NODE_RANK: found '2', .* from 0 to 1"),
        ({"PET_NNODES": "2", "MASTER_ADDR": "a"}, "PET_NODE_RANK: found ''"),
    ],
)
def test_invalid_placement_is_rejected(variables: Mapping[str, str], error: str) -> None:
    with pytest.raises(UserError, match=error):
        from_environment(variables)


def test_ranks_do_not_inherit_the_variables_of_another_launcher() -> None:
    plan = plans.resolve(loader.load("tiny"), topology.plan_topology(loader.load("tiny")))
    foreign = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PET_NNODES", "PET_NPROC_PER_NODE", "NNODES", "MASTER_ADDR")
    chosen = command.environment(plan, {**dict.fromkeys(foreign, "9"), "HOME": "/home"})
    assert not set(foreign) & set(chosen) and chosen["HOME"] == "/home"


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (HardwareRequest(nodes=8), "NODES: found 8, expected 4 as in this job. Use sbatch --nodes"),
        (HardwareRequest(gpus=16), "GPUS: 16 requested, but this job has 32"),
        (HardwareRequest(gpus=0, processes=6), "PROCESSES: found 6 on 4 nodes, expected a multiple of 4"),
    ],
)
def test_topology_rejects_request_unlike_allocation(request_: HardwareRequest, error: str) -> None:
    with pytest.raises(UserError, match=error):
        topology.available_topology(loader.load("70b"), request_, from_environment(STEP))


@pytest.mark.parametrize("recipe", SHIPPED)
def test_sbatch_script_is_generated_from_the_recipe(recipe: str) -> None:
    script = REPOSITORY / "slurm" / f"{recipe}.sh"
    assert script.read_text() == write_headers.sbatch_script(recipe), "run slurm/write_headers.py"


def test_sbatch_options_match_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))  # without a save speed measured by a run on this machine
    assert {script.stem for script in HEADERS} >= set(SHIPPED)
    for script in HEADERS:
        options, recipe = header(script), loader.load(script.stem)
        plan = plans.resolve(recipe, topology.plan_topology(recipe))
        if plan.gpus:
            assert int(options["nodes"]) * int(options["gpus-per-node"]) == plan.gpus, script.name
            assert int(options["nodes"]) == plan.nodes, script.name
            assert plan.fits, script.name
            exclusive = "exclusive" in options and options["mem"] == "0"
            assert exclusive == (int(options["gpus-per-node"]) == 8), script.name
        lead = int(options["signal"].removeprefix("B:USR1@"))
        assert lead > 1.5 * save_time.max_save_seconds(plan), script.name
        assert options["ntasks-per-node"] == "1" and "requeue" in options and options["open-mode"] == "append", (
            script.name
        )
        assert options["job-name"] == f"sft-{script.stem}" and options["output"] == "slurm/logs/%x-%j.out", script.name
        assert re.search(r"--nodes=\d+ +# \S", script.read_text()), f"{script.name}: no reason for the number of nodes"
        assert script.stat().st_mode & 0o111, script.name


def dry_run(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RUNTIME", "IMAGE"))}
    return subprocess.run(
        [str(REPOSITORY / "slurm" / f"{script}.sh"), *arguments],
        capture_output=True, text=True, check=False, env={**kept, "DRY_RUN": "1", **variables},
    )  # fmt: skip


def test_dry_run_prints_sbatch_options_and_node_command(tmp_path: Path) -> None:
    hostile = "a b'$(touch here)\""
    done = dry_run(
        "70b", "trainer.learning_rate=1.0e-5", f"model.name_or_path={hostile}", DATA=hostile, ALLOW_CHANGE="x",
        INIT_FROM="p", OVERFIT="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sbatch, _, first, _, command = done.stdout.splitlines()
    prepare = shlex.split(first)
    assert prepare[prepare.index("--nodes=1") :][:3] == ["--nodes=1", "--ntasks=1", "--relative=0"]
    assert "prepare 70b --name 70b-JOBID" in first
    assert sbatch.startswith("sbatch --job-name=sft-70b --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --exclusive")
    arguments = shlex.split(command)
    assert arguments[:4] == ["srun", "--kill-on-bad-exit=1", "--wait=0", "--export=ALL"]
    assert prepare[prepare.index("70b") :] == arguments[arguments.index("70b") :]
    assert arguments[arguments.index("-m") :] == [
        "-m", "sft_recipes", "train", "70b", "--name", "70b-JOBID", "--allow-change", "x",
        "--init-from", "p", "--overfit", f"data.train={hostile}",
        "trainer.learning_rate=1.0e-5", f"model.name_or_path={hostile}",
    ]  # fmt: skip


def test_job_ignores_recipe_variable_of_the_shell() -> None:
    assert " train 70b --name 70b-JOBID" in dry_run("70b", RECIPE="tiny").stdout


def test_pyxis_and_apptainer_mount_code_runs_and_data_without_home(tmp_path: Path) -> None:
    data, image = tmp_path / "my rows.jsonl", tmp_path / "x.sqsh"
    data.touch(), image.touch()
    places = {"RUNS_DIR": str(tmp_path / "runs"), "HF_HOME": str(tmp_path / "hub"), "DATA": str(data)}
    done = dry_run("8b", RUNTIME="pyxis", IMAGE=str(image), **places)
    arguments = shlex.split(done.stdout.splitlines()[-1])
    mounted = (
        next(argument for argument in arguments if argument.startswith("--container-mounts="))
        .partition("=")[2]
        .split(",")
    )
    assert {f"{REPOSITORY}:{REPOSITORY}:ro", f"{data}:{data}:ro"} < set(mounted)
    assert f"{REPOSITORY}/slurm/logs:{REPOSITORY}/slurm/logs:rw" in mounted  # each rank writes its own log
    assert {f"{tmp_path}/runs:{tmp_path}/runs:rw", f"{tmp_path}/hub:{tmp_path}/hub:rw"} < set(mounted)
    assert {f"--container-image={image}", "--no-container-mount-home"} < set(arguments)
    assert arguments[arguments.index("python") :][:4] == ["python", "-m", "sft_recipes", "train"]
    done = dry_run("8b", RUNTIME="apptainer", IMAGE=str(image), **places)
    arguments = shlex.split(done.stdout.splitlines()[-1])
    assert arguments[arguments.index("apptainer") :][:3] == ["apptainer", "exec", "--nv"] and "--no-home" in arguments
    assert f"{tmp_path}/runs:{tmp_path}/runs:rw" in arguments and str(image) in arguments


@pytest.mark.parametrize(
    ("variables", "error"),
    [
        ({"RUNTIME": "docker"}, "RUNTIME: found 'docker', expected local, pyxis or apptainer in a job"),
        ({"RUNTIME": "pyxis"}, "IMAGE: found none, expected a .sqsh file, or a registry image"),
        ({"RUNTIME": "apptainer", "IMAGE": "/none.sif"}, "IMAGE: found /none.sif, expected a .sif file"),
    ],
)
def test_invalid_runtime_or_image_is_rejected_in_one_line(variables: dict[str, str], error: str) -> None:
    done = dry_run("8b", **variables)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {error}") and done.stderr.count("\n") == 1


def test_make_slurm_dry_run_submits_nothing() -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MAKE", "MFLAGS"))}
    command = ["make", "slurm", "RECIPE=70b", "DRY_RUN=1", "NODES=4", "ARGS=trainer.learning_rate=1.0e-5"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, env=kept)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("train 70b --name 70b-JOBID trainer.learning_rate=1.0e-5")
    inside = dry_run("8b", SLURM_JOB_ID="1")
    assert (inside.returncode, inside.stdout) == (2, "") and "DRY_RUN: not available inside a job" in inside.stderr


def test_make_slurm_rejects_gpus() -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MAKE", "MFLAGS"))}
    command = ["make", "slurm", "RECIPE=70b", "GPUS=16"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, env=kept)
    assert done.returncode == 2 and "error: GPUS, DEVICES: Slurm selects the GPUs of a job" in done.stderr


def test_single_node_job_rejects_missing_gpus(monkeypatch) -> None:
    monkeypatch.setattr(
        topology, "visible_gpus", lambda: [topology.Gpu(str(n), 81559, "NVIDIA H100") for n in range(4)]
    )
    one = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NODEID": "0"}
    place = from_environment({**STEP, **one})
    with pytest.raises(UserError, match="Slurm allocated 8 on gpu005, nvidia-smi lists 4.*--exclude=gpu005"):
        topology.available_topology(loader.load("8b"), HardwareRequest(), place)


def test_job_script_outside_of_slurm_prints_how_to_submit() -> None:
    done = dry_run("8b", DRY_RUN="")
    assert (done.returncode, done.stdout) == (2, "")
    assert "sbatch slurm/8b.sh" in done.stderr


def test_make_slurm_lists_recipes_for_unknown_recipe() -> None:
    done = subprocess.run(
        ["make", "slurm", "RECIPE=9b"], cwd=REPOSITORY, capture_output=True, text=True, check=False, env=os.environ
    )
    assert "RECIPE: slurm/9b.sh not found. Available: 13b 1b 30b-a3b-lora 30b-a3b 32b" in done.stderr


KILLED = ExitRecord(1, "node2", 1, "rank 1 on node2: killed by SIGKILL in step 5", time=2.0)
LOST = ExitRecord(0, "node1", 1, "rank 0 on node1: failed in step 5: gloo: lost", lost_peer=True, time=1.0)
STOPPED = ExitRecord(0, "node1", 75, time=3.0)
FINISHED = ExitRecord(1, "node2", 0)


@pytest.mark.parametrize(
    ("records", "given", "expected"),
    [
        # A rank that was killed gives 1 and is named, in any order of the records, also if survivors report a stop.
        ([LOST, KILLED], {}, Outcome(1, KILLED.error)),
        ([STOPPED, KILLED], {"stop_expected": True}, Outcome(1, KILLED.error)),
        ([dataclasses.replace(LOST, code=4), KILLED], {}, Outcome(4, KILLED.error)),
        ([KILLED], {"status": 137}, Outcome(1, KILLED.error)),
        # Wrong input and divergence have their own codes.
        ([LOST, ExitRecord(1, "node2", 2, "data: x")], {}, Outcome(2, "data: x")),
        ([ExitRecord(0, "node1", 3), FINISHED], {"status": 143}, Outcome(3)),
        ([ExitRecord(0, "node1", 0), FINISHED], {"status": 143}, Outcome(0)),
        ([STOPPED, FINISHED], {"status": 75}, Outcome(75)),
        ([ExitRecord(0, "node1", 1)], {"status": 137}, Outcome(1)),  # a check failed; srun killed the slower node
        # Killed by the signal of the time limit, before a launcher handled it.
        ([STOPPED], {"status": 138, "stop_expected": True}, Outcome(75)),
        ([], {"status": 138, "stop_expected": True}, Outcome(75)),
        # A lost connection, or a launcher without a record: Slurm knows whether a node is lost.
        ([LOST], {"lost": ["node2"]}, Outcome(75, LOST.error, "node node2 is lost")),
        ([LOST], {"lost": ["node2"], "stop_expected": True}, Outcome(75, LOST.error, "node node2 is lost")),
        ([LOST], {}, Outcome(1, LOST.error)),
        ([LOST], {"stop_expected": True}, Outcome(1, LOST.error)),
        ([FINISHED], {"status": 137}, Outcome(1, "the launcher on node 0 was killed: no exit record")),
        # `prepare`, a step of one task, or a command that wrote no record.
        ([], {"nodes": 1, "status": 2}, Outcome(2)),
        ([], {"nodes": 1, "status": 75, "stop_expected": True}, Outcome(75)),
        ([], {"status": 2}, Outcome(2)),
        # srun could not start the tasks: a node was lost between the phases.
        ([], {"lost": ["node2"]}, Outcome(75, None, "node node2 is lost")),
        ([], {}, Outcome(1, "the launcher on node 0, 1 was killed: no exit record")),
    ],
)
def test_outcome_is_decided_by_the_first_failure(records, given, expected: Outcome) -> None:
    lost, nodes = given.pop("lost", []), given.pop("nodes", 2)
    status, stop_expected = given.pop("status", 1), given.pop("stop_expected", False)
    assert outcome.decide(records, nodes, status, stop_expected, lambda: lost) == expected


def test_sigterm_that_srun_sends_after_a_node_has_ended_does_not_prevent_the_requeue() -> None:
    """At a time limit the node that is done first exits with 75, and srun terminates the others while they still write."""
    first, later = ExitRecord(1, "node2", 75), ExitRecord(0, "node1", 75, terminated=True)
    assert not outcome.terminated([later, first], 2)
    assert not outcome.terminated([later], 2)  # the other was killed before it could write a record
    assert outcome.terminated([later, dataclasses.replace(first, terminated=True)], 2)


def placements(nodes: int, port: int) -> list[Placement]:
    return [Placement(nodes, rank, f"node{rank + 1}", "1-0", None, "127.0.0.1", port) for rank in range(nodes)]


def test_exit_record_keeps_the_first_cause(tmp_path: Path) -> None:
    first, second = placements(2, 15000)
    first.records = second.records = tmp_path
    killed = outcome.write_record(second, 1, [], KILLED.error)
    outcome.write_record(second, 1, [signal.SIGTERM])
    lost = outcome.write_record(first, 1, [], LOST.error, lost_peer=True)
    assert outcome.read_records(tmp_path) == [lost, dataclasses.replace(killed, terminated=True)]


def test_nodes_exchange_values_and_agree() -> None:
    with ThreadPoolExecutor() as pool:
        two, stop = placements(2, command.free_port()), StopRequest()
        assert list(pool.map(lambda place: place.exchange({"node": place.rank}, stop), two)) == [
            [{"node": 0}, {"node": 1}]
        ] * 2  # fmt: skip
        assert list(pool.map(lambda place: place.agree(place.rank, stop), two)) == [1, 1]


def test_connections_of_others_do_not_change_the_values() -> None:
    """A port scan, another job with the same port, and a node that is killed after it has sent its value."""
    port = command.free_port()
    first, second = placements(2, port)
    other = dataclasses.replace(second, attempt="2-0")
    with ThreadPoolExecutor() as pool:
        values = pool.submit(first.exchange, "first", StopRequest())
        for sent in (
            b"",
            b"GET / HTTP/1.1\r\n\r\n",
            b'{"attempt": "1-0", "rank": 2, "value": 0}\n',
            b"[]\n",
            b"\xff\n",
        ):
            with connect(port) as connection:
                connection.sendall(sent)
        with pytest.raises(NodeMissingError, match="attempt 1-0 of another job has this port"):
            other.exchange("other", StopRequest())
        with connect(port) as killed:
            killed.sendall(b'{"attempt": "1-0", "rank": 1, "value": "killed"}\n')
        assert values.result() == ["first", "killed"]


def connect(port: int) -> socket.socket:
    """Connect as soon as node 0 listens."""
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port))


def test_node_0_that_is_killed_ends_the_exchange() -> None:
    port = command.free_port()
    with socket.create_server(("127.0.0.1", port)) as server, ThreadPoolExecutor() as pool:
        waiting = pool.submit(placements(2, port)[1].exchange, 0, StopRequest())
        server.accept()[0].close()
        with pytest.raises(NodeMissingError, match="node 0 of 2 has ended"):
            waiting.result()


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.2\r\n", b"[]\n", b'{"values": 1}\n'])
def test_other_program_on_the_port_of_node_0_is_named(answer: bytes) -> None:
    port = command.free_port()
    with socket.create_server(("127.0.0.1", port)) as server, ThreadPoolExecutor() as pool:
        waiting = pool.submit(placements(2, port)[1].exchange, 0, StopRequest())
        connection = server.accept()[0]
        connection.sendall(answer)
        with connection, pytest.raises(NodeMissingError, match=f"node 0 at 127.0.0.1:{port}: another program answers"):
            waiting.result()


def test_node_0_that_ends_without_an_answer_is_not_waited_for(tmp_path: Path) -> None:
    """A connection that stays open, as after a lost network."""
    port = command.free_port()
    two = placements(2, port)
    two[0].records = two[1].records = tmp_path
    with socket.create_server(("127.0.0.1", port)) as server, ThreadPoolExecutor() as pool:
        waiting = pool.submit(two[1].exchange, 0, StopRequest())
        connection = server.accept()[0]
        outcome.write_record(two[0], 1, [])
        with connection, pytest.raises(NodeMissingError, match="node 0 of 2 has ended"):
            waiting.result(timeouts.NODES_MEET / 2)


def test_malformed_address_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeouts, "NODES_MEET", 0.5)
    second = dataclasses.replace(placements(2, command.free_port())[1], address="node1..x")
    with pytest.raises(NodeMissingError, match=r"node 0 of 2 did not appear in 0 s \("):
        second.exchange(0, StopRequest())


def test_node_0_whose_port_is_taken_says_so() -> None:
    with socket.create_server(("", 0)) as server:
        first = placements(2, server.getsockname()[1])[0]
        with pytest.raises(NodeMissingError, match="node 0 cannot listen: Address already in use. See MASTER_ADDR"):
            first.exchange(0, StopRequest())


def test_missing_node_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeouts, "NODES_MEET", 2.0)
    first, second = placements(2, command.free_port())
    with pytest.raises(NodeMissingError, match=r"node 0 at 127\.0\.0\.1:\d+: node 1 of 2 did not appear in 2 s"):
        first.exchange(0, StopRequest())
    with pytest.raises(
        NodeMissingError, match=r"network: node 1, node 0 at 127\.0\.0\.1.*node 0 of 2 did not appear in 2 s"
    ):
        second.exchange(0, StopRequest())


@pytest.mark.parametrize(("rank", "code", "error"), [(0, 75, StoppedError), (1, 1, NodeMissingError)])
def test_node_that_has_ended_is_not_waited_for(tmp_path: Path, rank: int, code: int, error: type[Exception]) -> None:
    """A stop of one node stops the others; NODES_MEET, ten minutes, is for nodes that have not started."""
    two = placements(2, command.free_port())
    two[0].records = two[1].records = tmp_path
    outcome.write_record(two[1 - rank], code, [])
    started = time.monotonic()
    with pytest.raises(error, match=f"node {1 - rank} of 2 has ended" if code == 1 else None):
        two[rank].exchange(0, StopRequest())
    assert time.monotonic() - started < timeouts.NODES_MEET / 2


def test_stop_is_recognized_by_an_exit_record_that_is_written_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Node 0 closes its connection before its exit record is on the shared disk."""
    monkeypatch.setattr(timeouts, "EXIT_RECORD", 60.0)
    port = command.free_port()
    two = placements(2, port)
    two[0].records = two[1].records = tmp_path
    with socket.create_server(("127.0.0.1", port)) as server, ThreadPoolExecutor() as pool:
        waiting = pool.submit(two[1].exchange, 0, StopRequest())
        server.accept()[0].close()
        time.sleep(0.5)
        assert not waiting.done()
        outcome.write_record(two[0], 75, [])
        with pytest.raises(StoppedError):
            waiting.result()


def test_stop_request_interrupts_the_exchange() -> None:
    stop = StopRequest()
    threading.Timer(0.5, stop.signals.append, [signal.SIGUSR1]).start()
    with pytest.raises(StoppedError):
        placements(2, command.free_port())[0].exchange(0, stop)


def test_interface_towards_an_address() -> None:
    assert ranks.interface_towards("127.0.0.1") == "lo"
    assert ranks.interface_towards("no.such.host.invalid") is None


def check_two_nodes(monkeypatch: pytest.MonkeyPatch, plan: plans.Plan, *nodes: list[CheckResult]) -> int:
    """Return the exit code for the results of the checks of each node."""
    two = placements(2, 15000)
    reports = [{"name": f"node{n + 1}", "results": [dataclasses.asdict(r) for r in rs]} for n, rs in enumerate(nodes)]
    monkeypatch.setattr(Placement, "exchange", lambda *_: reports)
    context = RunContext(RunDir(Path("x")), plan, StopRequest(), placement=two[0])
    return node_checks.check_all_nodes(context, "node1")


def test_node_check_failure_names_the_node_to_exclude(
    monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> None:
    recipe = loader.load("tiny", ["batch.effective_batch_size=4", "parallelism=ddp"])
    plan = plans.resolve(recipe, topology.plan_topology(recipe, HardwareRequest(0, 4, 2)))
    monkeypatch.setattr(node_checks.os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(node_checks.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(node_checks.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    results = list(node_checks.check_node(plan))
    assert check_two_nodes(monkeypatch, plan, [], results) == 1
    printed = console.readouterr()
    assert re.search("node2: error .*cores .*1 of 64 for 2 ranks.*SRUN_CPUS_PER_TASK", printed.out)
    assert re.search("node2: error .*disk: /tmp", printed.out)
    assert "node checks failed on node2. Exclude it: sbatch --exclude=node2" in printed.err


@pytest.mark.parametrize(
    ("nodes", "ends"), [((1,), "or exclude it: sbatch --exclude=node2"), ((0, 1), "docker/README.md")]
)
def test_nodes_without_cuda_fail_the_job_with_the_cause(
    nodes: tuple[int, ...], ends: str, monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2: no step was taken, and the installation is wrong."""
    probe = {"torch": "2.13.0+cu130", "cuda": "13.0", "devices": 0, "warning": ""}
    gpus = [topology.Gpu(str(n), 81559, "NVIDIA H100") for n in range(8)]
    monkeypatch.setattr(topology, "visible_gpus", lambda: gpus)
    problem = cuda.find_problem(probe, 8, "570.86.15", None)
    monkeypatch.setattr(node_checks, "gpu_problem", lambda _: problem)
    plan = plans.resolve(loader.load("32b"), plans.Topology(16, 16, 2, "h100-80g"))
    results = [r for r in node_checks.check_node(plan) if r.check == "CUDA"]
    assert len(results) == 1
    assert check_two_nodes(monkeypatch, plan, *(results if n in nodes else [] for n in (0, 1))) == 2
    printed = console.readouterr()
    assert ["error" in line and "CUDA" in line for line in printed.out.splitlines()] == [True] * len(nodes)
    names = ",".join(f"node{number + 1}" for number in nodes)
    line = printed.err.strip()
    assert line.startswith(
        f"error: GPUS: {names}: found NVIDIA driver 570.86.15, expected 580 or newer for CUDA 13.0. "
    )
    assert line.endswith(ends) and "\n" not in line
    on_the_cpu = plans.resolve(loader.load("tiny", ["batch.effective_batch_size=16"]), plans.Topology(0, 16, 2))
    assert "CUDA" not in {result.check for result in node_checks.check_node(on_the_cpu)}, "a CPU run needs no CUDA"


def test_node_without_access_to_the_run_or_the_model_reports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "FILE_VISIBLE", 0.2)
    run, second = RunDir(tmp_path / "one"), placements(2, 15000)[1]
    run.path.mkdir()
    arguments = ["tiny", "--name", "one"]
    with pytest.raises(UserError, match=r"NAME: .*one is not prepared, as seen from node2.* prepare tiny --name one"):
        attempts.open_prepared(run, second, arguments)
    plan = plans.resolve(loader.load("tiny", ["batch.effective_batch_size=2"]), plans.Topology(0, 2, 2))
    plans.write(plan, run.next_plan)
    ours = Attempt("1-0", 2, tuple(arguments), prepared=True)
    for other, error in (
        (dataclasses.replace(ours, id="0-0"), "prepared for attempt 0-0 on 2 nodes.* expected attempt 1-0 on 2 nodes"),
        (
            dataclasses.replace(ours, arguments=("tiny",)),
            "prepared for attempt 1-0 on 2 nodes with arguments tiny, as seen",
        ),
        (dataclasses.replace(ours, nodes=3), "prepared for attempt 1-0 on 3 nodes.* expected attempt 1-0 on 2 nodes"),
        (dataclasses.replace(ours, prepared=False), "not prepared"),
    ):
        attempts.write(run, other)
        with pytest.raises(UserError, match=error):
            attempts.open_prepared(run, second, arguments)
    attempts.write(run, ours)
    run.prepared.write_text(json.dumps({"folder": str(tmp_path), "model": str(tmp_path / "model")}))
    with pytest.raises(UserError, match="HF_HOME, RUNS_DIR: .*model: not visible on node2"):
        attempts.open_prepared(run, second, arguments)
    (tmp_path / "model").mkdir()
    assert attempts.open_prepared(run, second, arguments) == (ours, plan)


def test_commands_of_the_documented_jobset_are_valid() -> None:
    """The manifest itself was validated with the schema of JobSet's CRD (docs/multi-node.md)."""
    page = (REPOSITORY / "docs" / "multi-node.md").read_text()
    jobs = yaml.safe_load(re.findall(r"```yaml\n(apiVersion.*?)```", page, re.DOTALL)[0])["spec"]["replicatedJobs"]
    pods = [job["template"]["spec"]["template"]["spec"]["containers"][0] for job in jobs]
    prepare, train = (pod["args"] for pod in pods)
    assert (prepare[:4], train[:4]) == tuple(["python", "-m", "sft_recipes", name] for name in ("prepare", "train"))
    assert prepare[4:] == train[4:], "`train` rejects other arguments"
    parsed, _ = cli.build_parser().parse_known_args(train[3:])
    values = {variable["name"]: variable.get("value", "0") for variable in pods[1]["env"]}
    place = from_environment(values)
    assert place is not None and place.nodes == parsed.nodes == jobs[1]["template"]["spec"]["completions"]
    assert parsed.gpus == place.nodes * pods[1]["resources"]["limits"]["nvidia.com/gpu"]


def test_status_of_finished_run(short_run: Path) -> None:
    command = [sys.executable, "-m", "sft_recipes", "status", str(short_run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert "state: finished" in done.stdout and "step: 8" in done.stdout and "eval_loss" in done.stdout
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    status = json.loads(done.stdout)
    assert (status["state"], status["step"], status["seconds_left"], status["held_by"]) == ("finished", 8, None, None)
