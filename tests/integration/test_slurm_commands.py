"""Slurm jobs: topology, generated headers, command lines, and the launchers of several nodes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from helpers.workplace import REPOSITORY

from sft_recipes.config import loader
from sft_recipes.launch import network, node_launchers, ranks, slurm, topology
from sft_recipes.launch.node_launchers import NodeLaunchers
from sft_recipes.launch.run_selection import RunStart
from sft_recipes.launch.stop_request import StoppedError, StopRequest, handle_stop_signals
from sft_recipes.launch.topology import Allocation, HardwareRequest, first_host, from_slurm
from sft_recipes.planner import plan as plans
from sft_recipes.planner import save_time
from sft_recipes.runtime import cuda, timeouts
from sft_recipes.runtime.errors import UserError
from sft_recipes.runtime.heartbeat import STOP_SIGNALS
from sft_recipes.runtime.run_dir import RunDir, runs_root
from sft_recipes.tools import sbatch_header

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


def allocation(rank: int = 0, nodes: int = 2, number: int = 1) -> Allocation:
    return Allocation(number, "0-0", nodes, rank, f"node{rank + 1}", None, ("no.such.host.invalid", "127.0.0.1"), 15001)


def header(script: Path) -> dict[str, str]:
    arguments = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?", script.read_text(), re.MULTILINE)
    return {name: value or "yes" for name, value in arguments}


def test_from_slurm_reads_job_step() -> None:
    assert from_slurm(STEP) == Allocation(
        job=70123,
        start="0-0",
        nodes=4,
        rank=2,
        name="gpu005",
        gpus_per_node=8,
        addresses=("gpu003",),
        port=25123,
    )
    requeued = from_slurm({**STEP, "SLURM_RESTART_COUNT": "2", "MASTER_ADDR": "10.1.2.3", "MASTER_PORT": "6000"})
    assert requeued is not None
    assert (requeued.start, requeued.addresses, requeued.port) == ("2-0", ("10.1.2.3",), 6000)
    batch = from_slurm({**STEP, "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.3"})
    assert batch is not None and batch.addresses == ("gpu003", "10.0.0.3")


def test_from_slurm_returns_none_outside_of_a_job_step() -> None:
    assert from_slurm({}) is None
    assert from_slurm({"SLURM_JOB_ID": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "0"}) is None
    assert from_slurm({**STEP, "SLURM_STEP_ID": "batch"}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[1-2]", "node1"),
        ("gpu[003-005,009],login1", "gpu003"),
        ("rack[0-1]node[07-12].site", "rack0node07.site"),
        ("a-b-[9,11-12]", "a-b-9"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("variables", "error"),
    [
        ({"MASTER_PORT": "abc"}, "MASTER_PORT: found 'abc', expected an integer of at least 1"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT: found 70000, expected 1 to 65535"),
        ({"SLURM_STEP_NUM_TASKS": "32"}, "found 32 tasks on 4 nodes, expected one per node"),
        ({"SLURM_GPUS": "28"}, "found 28 GPUs on 4 nodes, expected the same number on each"),
    ],
)
def test_from_slurm_rejects_invalid_step(variables: Mapping[str, str], error: str) -> None:
    with pytest.raises(UserError, match=error):
        from_slurm({**STEP, **variables})


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (HardwareRequest(nodes=8), "NODES: found 8, expected 4, the nodes of job 70123. Use sbatch --nodes=8"),
        (HardwareRequest(gpus=16), "GPUS: found 16, expected 32: job 70123 has 4 nodes x 8"),
        (HardwareRequest(devices="0,1"), "DEVICES: found 0,1 in a Slurm job"),
        (HardwareRequest(gpus=0, processes=6), "PROCESSES: found 6 CPU processes on 4 nodes, expected a multiple of 4"),
    ],
)
def test_topology_rejects_request_unlike_allocation(request_: HardwareRequest, error: str) -> None:
    with pytest.raises(UserError, match=error):
        topology.available_topology(loader.load("70b"), request_, from_slurm(STEP))


def test_topology_rejects_several_nodes_without_slurm() -> None:
    with pytest.raises(UserError, match=r"sbatch --nodes=4 slurm/70b\.sh"):
        topology.available_topology(loader.load("70b"), HardwareRequest(nodes=4))


@pytest.mark.parametrize("recipe", loader.names())
def test_sbatch_script_is_generated_from_the_recipe(recipe: str) -> None:
    script = REPOSITORY / "slurm" / f"{recipe}.sh"
    assert script.read_text() == sbatch_header.sbatch_script(recipe), "run python -m sft_recipes.tools.sbatch_header"


def test_sbatch_options_match_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))  # without a save speed measured by a run on this machine
    assert {script.stem for script in HEADERS} == set(loader.names())
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
    sbatch, _, command = done.stdout.splitlines()
    assert sbatch.startswith("sbatch --job-name=sft-70b --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --exclusive")
    arguments = shlex.split(command)
    assert arguments[:3] == ["srun", "--kill-on-bad-exit=1", "--export=ALL"]
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
        ({"RUNTIME": "pyxis"}, "IMAGE: RUNTIME=pyxis needs one"),
        ({"RUNTIME": "apptainer", "IMAGE": "/none.sif"}, "IMAGE: file not found: /none.sif"),
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
    allocation_ = from_slurm({**STEP, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NODEID": "0"})
    with pytest.raises(UserError, match="Slurm allocated 8 on gpu005, nvidia-smi lists 4.*--exclude=gpu005"):
        topology.available_topology(loader.load("8b"), HardwareRequest(), allocation_)


def test_job_script_outside_of_slurm_prints_how_to_submit() -> None:
    done = dry_run("8b", DRY_RUN="")
    assert (done.returncode, done.stdout) == (2, "")
    assert "sbatch slurm/8b.sh" in done.stderr


def test_make_slurm_lists_recipes_for_unknown_recipe() -> None:
    done = subprocess.run(
        ["make", "slurm", "RECIPE=9b"], cwd=REPOSITORY, capture_output=True, text=True, check=False, env=os.environ
    )
    assert "RECIPE: slurm/9b.sh not found. Available: 13b 1b 32b" in done.stderr


def test_rejected_input_is_recorded_for_the_job(tmp_path: Path) -> None:
    """srun kills the other nodes at once, and may return the code of their signal."""
    command = [sys.executable, "-m", "sft_recipes", "train", "tiny", "--name", "a b"]
    environment = {**os.environ, "SFT_RECIPES_LOGS": str(tmp_path)}
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2 and (tmp_path / "rejected").exists()


def test_job_without_progress_fails_after_three_starts(tmp_path: Path, monkeypatch) -> None:
    plan = plans.resolve(loader.load("tiny"), topology.plan_topology(loader.load("tiny")))
    folder = RunDir(tmp_path / "one")
    start = RunStart(folder, plan, resumes=False)
    assert [slurm.no_progress(start) for _ in range(5)] == [None] * 5  # outside of a job
    for name, value in {**STEP, "RUNS_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    assert [slurm.no_progress(start) for _ in range(5)] == [None] * 5  # a step started by hand
    monkeypatch.setenv("SFT_RECIPES_LOGS", str(tmp_path))
    assert [slurm.no_progress(start) for _ in range(3)] == [None] * 3
    assert "no progress after 3 starts of job 70123" in str(slurm.no_progress(start))
    assert slurm.no_progress(RunStart(folder, plan, resumes=True, explicit_resume=True)) is None
    folder.checkpoint(5).mkdir(parents=True)
    (folder.checkpoint(5) / "complete.json").write_text('{"run_id": ""}')
    assert slurm.no_progress(start) is None  # a new checkpoint
    monkeypatch.setenv("SLURM_JOB_ID", "70124")
    assert slurm.no_progress(RunStart(RunDir(tmp_path / "two"), plan, resumes=False)) is None


@pytest.fixture
def two(tmp_path: Path, monkeypatch) -> tuple[NodeLaunchers, NodeLaunchers]:
    """The launchers of two nodes after their rendezvous."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    monkeypatch.setattr(timeouts, "NODES_MEET", 120.0)
    leader, follower = NodeLaunchers(allocation(0)), NodeLaunchers(allocation(1))
    thread = threading.Thread(target=follower.rendezvous, args=[{"cores": 4}, StopRequest()])
    thread.start()
    leader.rendezvous({"cores": 8}, StopRequest())
    thread.join()
    return leader, follower


def test_rendezvous_exchanges_node_info_and_reachable_addresses(
    two: tuple[NodeLaunchers, NodeLaunchers],
) -> None:
    leader, follower = two
    assert leader.status(1) == {**leader.status(1), "node": "node2", "node_info": {"cores": 4}}
    assert "127.0.0.1" in leader.status(1)["reachable"]
    assert "no.such.host.invalid" not in leader.status(1)["reachable"]
    assert leader.rendezvous_address == "127.0.0.1", "Slurm's name of a node need not resolve"
    assert follower.status(0)["node_info"]["cores"] == 8
    assert not list(runs_root().glob(".jobs/*/*/*.partial"))
    assert (runs_root() / ".jobs" / "1").stat().st_mode & 0o077 == 0


def test_command_is_received_once_and_its_results_are_published(two: tuple[NodeLaunchers, NodeLaunchers]) -> None:
    leader, follower = two
    command = leader.send_command("run", Path("plan.json"), 15001)
    follower.poll(force=True)
    assert follower.next_command(after=0) == command
    assert follower.next_command(after=command.number) is None
    follower.publish_result(
        command, {"code": 1, "error": "rank 1 on node2 is gone", "user_error": False, "lost_peer": False}
    )
    leader.publish_result(command, {"code": 1, "error": "rank 0: gloo: lost", "user_error": False, "lost_peer": True})
    leader.poll(force=True)
    assert node_launchers.first_failure(list(leader.results(command).values()))["error"] == "rank 1 on node2 is gone"
    assert command.address == "127.0.0.1"
    assert leader.results(leader.send_command("run", Path("plan.json"), 15001)) == {}


def test_gloo_uses_the_interface_towards_node_0() -> None:
    assert network.interface_towards("127.0.0.1") == "lo"
    own = network.candidate_addresses([])[1:]
    assert all(network.interface_towards(address) != "lo" for address in own)
    assert network.interface_towards("no.such.host.invalid") is None


def test_first_failure_prefers_requested_stop_to_unexplained_exit() -> None:
    results = [{"code": code, "error": None, "user_error": False, "lost_peer": False} for code in (1, 75, 0)]
    assert node_launchers.first_failure(results)["code"] == 75
    assert node_launchers.first_failure([results[0], results[2]])["code"] == 1


def test_silent_node_is_lost_and_exited_node_is_not(two: tuple[NodeLaunchers, NodeLaunchers], monkeypatch) -> None:
    leader, follower = two
    monkeypatch.setattr(timeouts, "NODE_SILENT", 0.5)
    monkeypatch.setattr(timeouts, "POLL_NODES", 0.1)
    for _ in range(12):
        threading.Event().wait(0.1)
        leader.poll()
    assert leader.lost_nodes() == [1]
    follower.publish(exiting=True)
    leader.poll(force=True)
    assert leader.lost_nodes() == []


def test_lost_node_is_named_and_job_requeued(
    two: tuple[NodeLaunchers, NodeLaunchers], tmp_path: Path, monkeypatch
) -> None:
    leader, follower = two
    monkeypatch.setenv("SFT_RECIPES_REQUEUE", str(tmp_path / "requeue"))
    assert leader.request_requeue_if_lost() is None and not (tmp_path / "requeue").exists()
    leader.silent_seconds[1] = timeouts.NODE_SILENT + 1
    assert "node2: no heartbeat for 60 s; the job is requeued" in str(leader.request_requeue_if_lost())
    assert (tmp_path / "requeue").exists()
    follower.silent_seconds[0] = timeouts.NODE_SILENT + 1  # the leader may be busy between two commands
    assert not follower.leader_lost()


def test_exiting_launcher_ignores_signals(two: tuple[NodeLaunchers, NodeLaunchers]) -> None:
    """Slurm would report the signal as the end of the job."""
    follower, before = two[1], {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        with handle_stop_signals():
            with handle_stop_signals():
                pass
            follower.announce_exit()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_stop_request_interrupts_rendezvous(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    monkeypatch.setattr(timeouts, "SAY_WAITING_AFTER", 0.0)
    stop = StopRequest()
    threading.Timer(0.5, stop.signals.append, [signal.SIGUSR1]).start()
    with pytest.raises(StoppedError):
        NodeLaunchers(allocation(0)).rendezvous({}, stop)
    assert "waiting for node 1 of the job in" in console.readouterr().out


def test_rendezvous_times_out_with_the_missing_node(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    monkeypatch.setattr(timeouts, "NODES_MEET", 0.3)
    with pytest.raises(UserError, match="RUNS_DIR: node 0 of job 1 did not appear in .*, as seen from node2, within"):
        NodeLaunchers(allocation(1)).rendezvous({}, StopRequest())


@pytest.mark.parametrize(
    ("changed", "detail"),
    [
        ({"cores": 1, "cores_total": 64}, "1 of 64 cores for 2 ranks.*SRUN_CPUS_PER_TASK"),
        ({"tmp_bytes": 0}, "disk: /tmp"),
        ({"reachable": []}, "cannot connect to node1 at any of node1, 10.0.0.1"),
    ],
)
def test_node_check_failure_names_the_node_to_exclude(
    changed: dict[str, object],
    detail: str,
    two: tuple[NodeLaunchers, NodeLaunchers],
    console: pytest.CaptureFixture[str],
) -> None:
    leader, follower = two
    info = {"cores": 8, "cores_total": 8, "gpus": [], "tmp_bytes": 2**40}
    leader.publish(node_info={**info, "addresses": ["node1", "10.0.0.1"]}, reachable=["node1", "10.0.0.1"])
    follower.publish(node_info={**info, **changed}, reachable=changed.get("reachable", ["10.0.0.1"]))
    leader.poll(force=True)
    recipe = loader.load("tiny", ["batch.effective_batch_size=4", "parallelism=ddp"])
    plan = plans.resolve(recipe, topology.plan_topology(recipe, HardwareRequest(0, 4, 2)))
    assert slurm.check_nodes(leader, plan) == 1
    printed = console.readouterr()
    assert re.search(f"node2: error .*{detail}", printed.out)
    assert "node checks failed on node2. Exclude it: sbatch --exclude=node2" in printed.err


@pytest.mark.parametrize(
    ("nodes", "ends"), [((1,), "or exclude it: sbatch --exclude=node2"), ((0, 1), "docker/README.md")]
)
def test_nodes_without_cuda_fail_the_job_with_the_cause(
    nodes: tuple[int, ...], ends: str, two: tuple[NodeLaunchers, NodeLaunchers], console: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2: no step was taken, and the installation is wrong."""
    info = {"cores": 8, "cores_total": 8, "tmp_bytes": 2**40, "gpus": [{"id": str(n), "used": 4.0} for n in range(8)]}
    probe = {"torch": "2.13.0+cu130", "cuda": "13.0", "devices": 0, "warning": ""}
    for number, launchers in enumerate(two):
        problem = cuda.find_problem(probe, 8, "570.86.15", None) if number in nodes else None
        launchers.publish(node_info={**info, "cuda": problem, "addresses": ["node1"]}, reachable=["node1"])
    two[0].poll(force=True)
    plan = plans.resolve(loader.load("32b"), plans.Topology(16, 16, 2, "h100-80g"))
    assert slurm.check_nodes(two[0], plan) == 2
    printed = console.readouterr()
    assert ["error" in line and "CUDA" in line for line in printed.out.splitlines()] == [True] * len(nodes)
    names = ",".join(f"node{number + 1}" for number in nodes)
    line = printed.err.strip()
    assert line.startswith(
        f"error: GPUS: {names}: found NVIDIA driver 570.86.15, expected 580 or newer for CUDA 13.0. "
    )
    assert line.endswith(ends) and "\n" not in line
    on_the_cpu = plans.resolve(loader.load("tiny", ["batch.effective_batch_size=16"]), plans.Topology(0, 16, 2))
    assert not list(slurm._check_node(two[1].status(1)["node_info"], on_the_cpu)), "a CPU run needs no CUDA"


def test_unreachable_leader_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    leader, *others = (NodeLaunchers(allocation(rank, 3)) for rank in range(3))
    leader.folder.mkdir(parents=True)
    for launchers in (leader, *others):
        info = {"cores": 8, "cores_total": 8, "gpus": [], "tmp_bytes": 2**40}
        reachable = ["10.0.0.1"] if launchers is leader else []
        launchers.publish(node_info={**info, "addresses": ["10.0.0.1"]}, reachable=reachable)
    leader.poll(force=True)
    recipe = loader.load("tiny", ["batch.effective_batch_size=6", "parallelism=ddp"])
    plan = plans.resolve(recipe, topology.plan_topology(recipe, HardwareRequest(0, 3, 3)))
    assert slurm.check_nodes(leader, plan) == 1
    assert "no node reaches node1. Set MASTER_ADDR in slurm/cluster.env" in console.readouterr().err


def test_node_without_access_to_the_model_reports_it(
    two: tuple[NodeLaunchers, NodeLaunchers], tmp_path: Path, monkeypatch
) -> None:
    leader, follower = two
    monkeypatch.setattr(timeouts, "FILE_VISIBLE", 0.2)
    command = leader.send_command("run", tmp_path / "one" / "plan.json", 15001)
    follower.poll(force=True)
    thread = threading.Thread(target=ranks.follow, args=[follower, StopRequest()])
    thread.start()
    leader.publish_result(command, {"code": 0, "error": None, "user_error": False, "lost_peer": False})
    ended = ranks._collect_results(command, leader)
    leader.send_command(None)
    thread.join()
    assert (ended.code, ended.user_error) == (2, True)
    assert "HF_HOME, RUNS_DIR: " in str(ended.error) and "not visible on node2" in str(ended.error)


def test_status_of_finished_run(short_run: Path) -> None:
    command = [sys.executable, "-m", "sft_recipes", "status", str(short_run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert "finished" in done.stdout and "step: 8 of 8" in done.stdout and "eval_loss" in done.stdout
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    status = json.loads(done.stdout)
    assert (status["state"], status["step"], status["seconds_left"], status["held_by"]) == ("finished", 8, None, None)
