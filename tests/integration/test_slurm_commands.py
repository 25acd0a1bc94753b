"""What a Slurm job is told and what it asks: topology, headers, command lines, and parents that speak with each other."""

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
from sft_recipes.launch import network, node_launchers, process_group, ranks, slurm, topology
from sft_recipes.launch.node_launchers import NodeLaunchers
from sft_recipes.launch.process_group import StopRequest
from sft_recipes.launch.run_selection import Start
from sft_recipes.launch.topology import Allocation, first_host, from_slurm
from sft_recipes.planner import plan as plans
from sft_recipes.planner import save_time
from sft_recipes.runtime import cuda, timeouts
from sft_recipes.runtime.errors import UserError
from sft_recipes.runtime.heartbeat import ASKING
from sft_recipes.runtime.run_dir import RunDir, runs_root

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
    words = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?", script.read_text(), re.MULTILINE)
    return {name: value or "yes" for name, value in words}


def test_a_job_step_is_read_from_slurms_variables() -> None:
    found = from_slurm(STEP)
    assert found == Allocation(
        job=70123,
        start="0-0",
        nodes=4,
        rank=2,
        name="gpu005",
        gpus_per_node=8,
        addresses=("gpu003",),
        port=25123,
    )
    again = from_slurm({**STEP, "SLURM_RESTART_COUNT": "2", "MASTER_ADDR": "10.1.2.3", "MASTER_PORT": "6000"})
    assert again is not None
    assert (again.start, again.addresses, again.port) == ("2-0", ("10.1.2.3",), 6000)
    batch = from_slurm({**STEP, "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.3"})
    assert batch is not None and batch.addresses == ("gpu003", "10.0.0.3")


def test_a_login_node_a_batch_script_and_a_laptop_are_no_job_step() -> None:
    assert from_slurm({}) is None
    assert from_slurm({"SLURM_JOB_ID": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "0"}) is None
    assert from_slurm({**STEP, "SLURM_STEP_ID": "batch"}) is None


@pytest.mark.parametrize(
    ("listed", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[1-2]", "node1"),
        ("gpu[003-005,009],login1", "gpu003"),
        ("rack[0-1]node[07-12].site", "rack0node07.site"),
        ("a-b-[9,11-12]", "a-b-9"),
    ],
)
def test_the_first_host_of_a_list_is_where_ranks_meet(listed: str, first: str) -> None:
    assert first_host(listed) == first


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"MASTER_PORT": "abc"}, "MASTER_PORT: 'abc' is not a whole number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT: 70000 is no port"),
        ({"SLURM_STEP_NUM_TASKS": "32"}, "32 tasks on 4 nodes; wanted one a node"),
        ({"SLURM_GPUS": "28"}, "28 GPUs on 4 nodes are not as many on each"),
    ],
)
def test_a_step_of_another_shape_is_refused(wrong: Mapping[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        from_slurm({**STEP, **wrong})


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"nodes": 8}, "NODES: 8 asked for, and job 70123 has 4; .*sbatch --nodes=8"),
        ({"gpus": 16}, "GPUS: 16 asked for, and job 70123 has 4 nodes x 8"),
        ({"devices": "0,1"}, "DEVICES: 0,1 names GPUs of one machine"),
        ({"gpus": 0, "processes": 6}, "PROCESSES: 6 on the CPU do not share evenly over 4 nodes"),
    ],
)
def test_an_allocation_that_is_not_what_was_asked_for_is_refused(asked: dict[str, object], said: str) -> None:
    given = {"gpus": None, "processes": None, "nodes": None, "gpu_type": None, "devices": None, **asked}
    with pytest.raises(UserError, match=said):
        topology.present(loader.load("70b"), **given, allocation=from_slurm(STEP))  # type: ignore[arg-type]


def test_several_nodes_without_slurm_are_refused_with_the_way_there_is() -> None:
    with pytest.raises(UserError, match=r"sbatch --nodes=4 slurm/70b\.sh"):
        topology.present(loader.load("70b"), None, None, 4, None, None)


def test_every_recipe_has_a_job_that_asks_for_what_its_plan_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))  # not the speed of a save that a run here has measured
    assert {script.stem for script in HEADERS} == set(loader.names())
    for script in HEADERS:
        asked, recipe = header(script), loader.load(script.stem)
        plan = plans.make(recipe, topology.planned(recipe, None, None, None, None))
        if plan.gpus:
            assert int(asked["nodes"]) * int(asked["gpus-per-node"]) == plan.gpus, script.name
            assert int(asked["nodes"]) == plan.nodes, script.name
            assert plan.fits, script.name
            whole = "exclusive" in asked and asked["mem"] == "0"
            assert whole == (int(asked["gpus-per-node"]) == 8), script.name
        lead = int(asked["signal"].removeprefix("B:USR1@"))
        assert lead > 1.5 * save_time.seconds_at_most(plan), script.name
        assert asked["ntasks-per-node"] == "1" and "requeue" in asked and asked["open-mode"] == "append", script.name
        assert asked["job-name"] == f"sft-{script.stem}" and asked["output"] == "slurm/logs/%x-%j.out", script.name
        assert re.search(r"--nodes=\d+ +# \S", script.read_text()), f"{script.name} does not say why that many"
        assert script.stat().st_mode & 0o111, script.name


def shown(script: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RUNTIME", "IMAGE"))}
    return subprocess.run(
        [str(REPOSITORY / "slurm" / f"{script}.sh"), *words],
        capture_output=True, text=True, check=False, env={**kept, "DRY_RUN": "1", **variables},
    )  # fmt: skip


def test_a_dry_run_shows_what_the_job_asks_for_and_what_runs_on_each_node(tmp_path: Path) -> None:
    hostile = "a b'$(touch here)\""
    done = shown("70b", "trainer.learning_rate=1.0e-5", f"model.name_or_path={hostile}", DATA=hostile, ALLOW_CHANGE="x")
    assert done.returncode == 0, done.stderr
    asked, _, command = done.stdout.splitlines()
    assert asked.startswith("sbatch --job-name=sft-70b --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --exclusive")
    words = shlex.split(command)
    assert words[:3] == ["srun", "--kill-on-bad-exit=1", "--export=ALL"]
    assert words[words.index("-m") :] == [
        "-m", "sft_recipes", "train", "70b", "--name", "70b-JOBID", "--allow-change", "x", f"data.train={hostile}",
        "trainer.learning_rate=1.0e-5", f"model.name_or_path={hostile}",
    ]  # fmt: skip


def test_a_job_trains_what_its_script_says_whatever_the_shell_was_told_last() -> None:
    assert " train 70b --name 70b-JOBID" in shown("70b", RECIPE="tiny").stdout


def test_pyxis_and_apptainer_see_code_runs_and_named_data_and_no_home(tmp_path: Path) -> None:
    data, image = tmp_path / "my rows.jsonl", tmp_path / "x.sqsh"
    data.touch(), image.touch()
    places = {"RUNS_DIR": str(tmp_path / "runs"), "HF_HOME": str(tmp_path / "hub"), "DATA": str(data)}
    done = shown("8b", RUNTIME="pyxis", IMAGE=str(image), **places)
    words = shlex.split(done.stdout.splitlines()[-1])
    mounted = next(word for word in words if word.startswith("--container-mounts=")).partition("=")[2].split(",")
    assert {f"{REPOSITORY}:{REPOSITORY}:ro", f"{data}:{data}:ro"} < set(mounted)
    assert f"{REPOSITORY}/slurm/logs:{REPOSITORY}/slurm/logs:rw" in mounted  # each rank writes a log of its own
    assert {f"{tmp_path}/runs:{tmp_path}/runs:rw", f"{tmp_path}/hub:{tmp_path}/hub:rw"} < set(mounted)
    assert {f"--container-image={image}", "--no-container-mount-home"} < set(words)
    assert words[words.index("python") :][:4] == ["python", "-m", "sft_recipes", "train"]
    done = shown("8b", RUNTIME="apptainer", IMAGE=str(image), **places)
    words = shlex.split(done.stdout.splitlines()[-1])
    assert words[words.index("apptainer") :][:3] == ["apptainer", "exec", "--nv"] and "--no-home" in words
    assert f"{tmp_path}/runs:{tmp_path}/runs:rw" in words and str(image) in words


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"RUNTIME": "docker"}, "RUNTIME: 'docker' is not what a job is started with; say local, pyxis or apptainer"),
        ({"RUNTIME": "pyxis"}, "IMAGE: RUNTIME=pyxis needs one"),
        ({"RUNTIME": "apptainer", "IMAGE": "/none.sif"}, "IMAGE: there is no /none.sif"),
    ],
)
def test_a_runtime_that_cannot_be_is_refused_in_a_line(given: dict[str, str], said: str) -> None:
    done = shown("8b", **given)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1


def test_a_dry_run_of_make_slurm_submits_nothing() -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MAKE", "MFLAGS"))}
    asked = ["make", "slurm", "RECIPE=70b", "DRY_RUN=1", "NODES=4", "ARGS=trainer.learning_rate=1.0e-5"]
    done = subprocess.run(asked, cwd=REPOSITORY, capture_output=True, text=True, check=False, env=kept)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("train 70b --name 70b-JOBID trainer.learning_rate=1.0e-5")
    inside = shown("8b", SLURM_JOB_ID="1")
    assert (inside.returncode, inside.stdout) == (2, "") and "DRY_RUN: this is a job already" in inside.stderr


def test_gpus_of_a_job_are_slurms_to_give() -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MAKE", "MFLAGS"))}
    asked = ["make", "slurm", "RECIPE=70b", "GPUS=16"]
    done = subprocess.run(asked, cwd=REPOSITORY, capture_output=True, text=True, check=False, env=kept)
    assert done.returncode == 2 and "error: GPUS, DEVICES: Slurm gives a job its GPUs" in done.stderr


def test_a_job_of_one_node_gets_the_gpus_that_slurm_gave_or_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(
        topology, "visible_gpus", lambda: [topology.Gpu(str(n), 81559, "NVIDIA H100") for n in range(4)]
    )
    one = from_slurm({**STEP, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NODEID": "0"})
    with pytest.raises(UserError, match="Slurm gave 8 on gpu005, and nvidia-smi lists 4 there; .*--exclude=gpu005"):
        topology.present(loader.load("8b"), None, None, None, None, None, one)


def test_the_body_of_a_job_by_hand_says_how_it_is_meant() -> None:
    done = shown("8b", DRY_RUN="")
    assert (done.returncode, done.stdout) == (2, "")
    assert "sbatch slurm/8b.sh" in done.stderr


def test_a_recipe_without_a_job_is_refused_with_those_that_have_one() -> None:
    done = subprocess.run(
        ["make", "slurm", "RECIPE=9b"], cwd=REPOSITORY, capture_output=True, text=True, check=False, env=os.environ
    )
    assert "RECIPE: there is no slurm/9b.sh; there are: 13b 1b 32b" in done.stderr


def test_a_node_that_refuses_its_input_leaves_word_for_the_job(tmp_path: Path) -> None:
    """srun ends the other nodes at once, and its exit code may be their signal's."""
    words = [sys.executable, "-m", "sft_recipes", "train", "tiny", "--name", "a b"]
    environment = {**os.environ, "SFT_RECIPES_LOGS": str(tmp_path)}
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2 and (tmp_path / "refused").exists()


def test_a_job_is_started_three_times_without_progress_and_no_more(tmp_path: Path, monkeypatch) -> None:
    plan = plans.make(loader.load("tiny"), topology.planned(loader.load("tiny"), None, None, None, None))
    folder = RunDir(tmp_path / "one")
    start = Start(folder, plan, goes_on=False)
    assert [slurm.exhausted(start) for _ in range(5)] == [None] * 5  # no job
    for name, value in {**STEP, "RUNS_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    assert [slurm.exhausted(start) for _ in range(5)] == [None] * 5  # by hand, in a step of one's own
    monkeypatch.setenv("SFT_RECIPES_LOGS", str(tmp_path))
    assert [slurm.exhausted(start) for _ in range(3)] == [None] * 3
    said = slurm.exhausted(start)
    assert said is not None and "job 70123 was started 3 times and has come no further than its beginning" in said
    assert slurm.exhausted(Start(folder, plan, goes_on=True, insisted=True)) is None
    folder.checkpoint(5).mkdir(parents=True)
    (folder.checkpoint(5) / "complete.json").write_text('{"run_id": ""}')
    assert slurm.exhausted(start) is None  # it has come further
    monkeypatch.setenv("SLURM_JOB_ID", "70124")
    assert slurm.exhausted(Start(RunDir(tmp_path / "two"), plan, goes_on=False)) is None


@pytest.fixture
def two(tmp_path: Path, monkeypatch) -> tuple[NodeLaunchers, NodeLaunchers]:
    """The parents of two nodes that have met."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    monkeypatch.setattr(timeouts, "NODES_MEET", 120.0)
    leader, follower = NodeLaunchers(allocation(0)), NodeLaunchers(allocation(1))
    other = threading.Thread(target=follower.meet, args=[{"cores": 4}, StopRequest()])
    other.start()
    leader.meet({"cores": 8}, StopRequest())
    other.join()
    return leader, follower


def test_parents_show_each_other_what_they_have_and_whether_they_reach_node_0(
    two: tuple[NodeLaunchers, NodeLaunchers],
) -> None:
    leader, follower = two
    assert leader.told(1) == {**leader.told(1), "node": "node2", "hello": {"cores": 4}}
    assert "127.0.0.1" in leader.told(1)["reaches"] and "no.such.host.invalid" not in leader.told(1)["reaches"]
    assert leader.address == "127.0.0.1", "Slurm's name for a node need be no host's"
    assert follower.told(0)["hello"]["cores"] == 8
    assert not list(runs_root().glob(".jobs/*/*/*.partial"))
    assert (runs_root() / ".jobs" / "1").stat().st_mode & 0o077 == 0


def test_an_order_is_heard_once_and_its_end_is_told(two: tuple[NodeLaunchers, NodeLaunchers]) -> None:
    leader, follower = two
    order = leader.order("run", Path("plan.json"), 15001)
    follower.look(at_once=True)
    assert follower.ordered(after=0) == order
    assert follower.ordered(after=order.number) is None
    follower.report(order, {"code": 1, "fault": "rank 1 on node2 is gone", "by_user": False, "came_of_others": False})
    leader.report(order, {"code": 1, "fault": "rank 0: gloo: lost", "by_user": False, "came_of_others": True})
    leader.look(at_once=True)
    assert node_launchers.first_fault(list(leader.reports(order).values()))["fault"] == "rank 1 on node2 is gone"
    assert order.address == "127.0.0.1"
    assert leader.reports(leader.order("run", Path("plan.json"), 15001)) == {}


def test_gloo_speaks_through_the_interface_that_leads_to_node_0() -> None:
    assert network.interface_towards("127.0.0.1") == "lo"
    own = network.addresses([])[1:]
    assert all(network.interface_towards(address) != "lo" for address in own)
    assert network.interface_towards("no.such.host.invalid") is None


def test_a_stop_that_was_asked_for_says_how_an_order_ended_before_an_end_that_nobody_explains() -> None:
    ended = [{"code": code, "fault": None, "by_user": False, "came_of_others": False} for code in (1, 75, 0)]
    assert node_launchers.first_fault(ended)["code"] == 75
    assert node_launchers.first_fault([ended[0], ended[2]])["code"] == 1


def test_a_parent_that_falls_silent_is_missed_and_one_that_leaves_is_not(
    two: tuple[NodeLaunchers, NodeLaunchers], monkeypatch
) -> None:
    leader, follower = two
    monkeypatch.setattr(timeouts, "NODE_SILENT", 0.5)
    monkeypatch.setattr(timeouts, "POLL_NODES", 0.1)
    for _ in range(12):
        threading.Event().wait(0.1)
        leader.look()
    assert leader.lost() == [1]
    follower.say(left=True)
    leader.look(at_once=True)
    assert leader.lost() == []


def test_a_node_that_is_lost_is_named_and_the_job_started_again(
    two: tuple[NodeLaunchers, NodeLaunchers], tmp_path: Path, monkeypatch
) -> None:
    leader, follower = two
    monkeypatch.setenv("SFT_RECIPES_REQUEUE", str(tmp_path / "requeue"))
    assert leader.tell_of_the_lost() is None and not (tmp_path / "requeue").exists()
    leader.silent[1] = timeouts.NODE_SILENT + 1
    assert "node2 has not been heard from for 60 s; the job is started again" in str(leader.tell_of_the_lost())
    assert (tmp_path / "requeue").exists()
    follower.silent[0] = timeouts.NODE_SILENT + 1  # it may be at something else between two orders
    assert not follower.misses_its_leader()


def test_who_has_said_that_it_leaves_is_ended_by_no_signal(two: tuple[NodeLaunchers, NodeLaunchers]) -> None:
    """Slurm would take the signal for how the job ended."""
    follower, before = two[1], {number: signal.getsignal(number) for number in ASKING}
    try:
        with process_group.listening():
            with process_group.listening():
                pass
            follower.leave()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_who_is_asked_to_stop_does_not_wait_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    monkeypatch.setattr(timeouts, "SAY_WAITING_AFTER", 0.0)
    asked = StopRequest()
    threading.Timer(0.5, asked.numbers.append, [signal.SIGUSR1]).start()
    with pytest.raises(process_group.StoppedError):
        NodeLaunchers(allocation(0)).meet({}, asked)
    assert "waiting for node 1 of the job to show itself in" in capsys.readouterr().out


def test_a_node_that_is_not_there_is_told_of(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    monkeypatch.setattr(timeouts, "NODES_MEET", 0.3)
    with pytest.raises(UserError, match="RUNS_DIR: node2 sees nothing in .* of node 0 of job 1 within"):
        NodeLaunchers(allocation(1)).meet({}, StopRequest())


@pytest.mark.parametrize(
    ("has", "said"),
    [
        ({"cores": 1, "cores_of_all": 64}, "1 of 64 cores for 2 ranks.*SRUN_CPUS_PER_TASK"),
        ({"room": 0}, "disk: /tmp"),
        ({"reaches": []}, "does not reach node1 by any of node1, 10.0.0.1"),
    ],
)
def test_a_node_that_is_not_fit_is_named_with_the_way_to_leave_it_out(
    has: dict[str, object], said: str, two: tuple[NodeLaunchers, NodeLaunchers], capsys: pytest.CaptureFixture[str]
) -> None:
    leader, follower = two
    fit = {"cores": 8, "cores_of_all": 8, "gpus": [], "room": 2**40}
    leader.say(hello={**fit, "addresses": ["node1", "10.0.0.1"]}, reaches=["node1", "10.0.0.1"])
    follower.say(hello={**fit, **has}, reaches=has.get("reaches", ["10.0.0.1"]))
    leader.look(at_once=True)
    recipe = loader.load("tiny", ["batch.effective_batch_size=4", "parallelism=ddp"])
    plan = plans.make(recipe, topology.planned(recipe, 0, 4, 2, None))
    lines: list[str] = []
    assert slurm.unfit(leader, plan, lines.append) == 1
    assert re.search(f"node2: red .*{said}", "\n".join(lines))
    assert "node2 cannot carry its part; leave it out: sbatch --exclude=node2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("nodes", "ends"), [((1,), "or leave it out: sbatch --exclude=node2"), ((0, 1), "docker/README.md")]
)
def test_nodes_without_cuda_end_the_job_with_the_cause(
    nodes: tuple[int, ...], ends: str, two: tuple[NodeLaunchers, NodeLaunchers], capsys: pytest.CaptureFixture[str]
) -> None:
    """With exit code 2: no step was taken, and what is installed is wrong."""
    fit = {"cores": 8, "cores_of_all": 8, "room": 2**40, "gpus": [{"id": str(n), "used": 4.0} for n in range(8)]}
    seen = {"torch": "2.13.0+cu130", "cuda": "13.0", "devices": 0, "warning": ""}
    for number, one in enumerate(two):
        found = cuda.problem(seen, 8, "570.86.15", None) if number in nodes else None
        one.say(hello={**fit, "cuda": found, "addresses": ["node1"]}, reaches=["node1"])
    two[0].look(at_once=True)
    plan = plans.make(loader.load("32b"), plans.Topology(16, 16, 2, "h100-80g"))
    lines: list[str] = []
    assert slurm.unfit(two[0], plan, lines.append) == 2
    assert ["red" in line and "CUDA" in line for line in lines] == [True] * len(nodes)
    names = ",".join(f"node{number + 1}" for number in nodes)
    line = capsys.readouterr().err.strip()
    assert line.startswith(
        f"error: GPUS: {names}: found NVIDIA driver 570.86.15, expected 580 or newer for CUDA 13.0. "
    )
    assert line.endswith(ends) and "\n" not in line
    on_the_cpu = plans.make(loader.load("tiny", ["batch.effective_batch_size=16"]), plans.Topology(0, 16, 2))
    assert not list(slurm._wrong(two[1].told(1)["hello"], on_the_cpu)), "it needs no CUDA"


def test_where_no_node_reaches_node_0_that_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    leader, *others = (NodeLaunchers(allocation(rank, 3)) for rank in range(3))
    leader.folder.mkdir(parents=True)
    for one in (leader, *others):
        fit = {"cores": 8, "cores_of_all": 8, "gpus": [], "room": 2**40}
        one.say(hello={**fit, "addresses": ["10.0.0.1"]}, reaches=["10.0.0.1"] if one is leader else [])
    leader.look(at_once=True)
    recipe = loader.load("tiny", ["batch.effective_batch_size=6", "parallelism=ddp"])
    plan = plans.make(recipe, topology.planned(recipe, 0, 3, 3, None))
    assert slurm.unfit(leader, plan, lambda _line: None) == 1
    assert "no node reaches node1: name an address of it that they do reach" in capsys.readouterr().err


def test_a_node_that_does_not_see_the_model_says_so(
    two: tuple[NodeLaunchers, NodeLaunchers], tmp_path: Path, monkeypatch
) -> None:
    leader, follower = two
    monkeypatch.setattr(timeouts, "FILE_VISIBLE", 0.2)
    order = leader.order("run", tmp_path / "one" / "plan.json", 15001)
    follower.look(at_once=True)
    other = threading.Thread(target=ranks.follow, args=[follower, StopRequest()])
    other.start()
    leader.report(order, {"code": 0, "fault": None, "by_user": False, "came_of_others": False})
    ended = ranks._together(order, leader)
    leader.order(None)
    other.join()
    assert (ended.code, ended.by_user) == (2, True)
    assert "HF_HOME, RUNS_DIR: " in str(ended.fault) and "which node2 does not see" in str(ended.fault)


def test_status_says_where_a_run_stands(short_run: Path) -> None:
    asked = [sys.executable, "-m", "sft_recipes", "status", str(short_run)]
    done = subprocess.run(asked, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert "finished" in done.stdout and "step       8 of 8" in done.stdout and "eval_loss" in done.stdout
    done = subprocess.run([*asked, "--json"], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    found = json.loads(done.stdout)
    assert (found["state"], found["step"], found["seconds_left"], found["held_by"]) == ("finished", 8, None, None)
