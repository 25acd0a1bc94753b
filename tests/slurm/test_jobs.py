"""The shipped jobs on a real Slurm cluster of three nodes: train, stop, lose a node, reject invalid input."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import slurm_sites
from helpers.slurm_cluster import missing_requirement
from helpers.slurm_sites import ENDED, LONGER, Site, last_step, losses, same_weights, until
from helpers.workplace import SHORT, Workplace, manifest

pytestmark = pytest.mark.skipif(missing_requirement() is not None, reason=str(missing_requirement()))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with slurm_sites.site(tmp_path_factory.mktemp("site"), ("node1", "node2", "node3"), gpus=8) as running:
        yield running


@pytest.fixture(scope="module")
def single_process(shared_workplace: Workplace) -> Path:
    return shared_workplace.trained_once("one-process", *SHORT)


@pytest.fixture(scope="module")
def make_slurm(site: Site) -> subprocess.CompletedProcess[str]:
    """Run `make slurm` without an interruption."""
    environment = {
        "SANITY": "skip",
        "REPORT_TO": "none",
        "OMP_NUM_THREADS": "1",
        "PROCESSES": "2",
        "NAME": "uninterrupted",
    }
    arguments = f"ARGS={' '.join((*LONGER, 'parallelism=ddp'))}"
    return site.cluster.run("make", "slurm", "RECIPE=tiny", arguments, environment=environment, folder=site.checkout)


@pytest.fixture(scope="module")
def uninterrupted(site: Site, make_slurm: subprocess.CompletedProcess[str]) -> Path:
    return site.runs / "uninterrupted"


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_two_nodes_match_a_single_process(site: Site, single_process: Path, strategy: str) -> None:
    job = site.submit("tiny", *SHORT, f"parallelism={strategy}", PROCESSES="4", NAME=f"four-{strategy}")
    ended = site.wait(job)
    output = site.output(job)
    assert ended["JobState"] == "COMPLETED", output
    assert losses(site.runs / f"four-{strategy}") == pytest.approx(losses(single_process), rel=2e-4)
    assert manifest(site.runs / f"four-{strategy}")["starts"][0]["job"] == {
        "id": job, "name": "sft-tiny", "nodes": "node[1-2]", "restarts": 0,
    }  # fmt: skip
    logs = site.checkout / "slurm" / "logs"
    assert (logs / "latest" / "latest").resolve() == logs / f"sft-tiny-{job}" / "start-0"
    names = {path.name for path in (logs / "latest" / "latest").glob("*.txt")}
    assert names == {"node-0-node1.txt", "node-1-node2.txt", "rank-1.txt", "rank-2.txt", "rank-3.txt"}
    assert f"job {job}, start 1, 2 x 0 GPUs" in output
    status = site.cluster.run(
        ".venv/bin/python", "-m", "sft_recipes", "status", f"four-{strategy}", folder=site.checkout
    )
    assert f"job: id {job}, name sft-tiny, state COMPLETED" in status.stdout, status.stdout + status.stderr


def test_nodes_are_checked_before_the_first_step(site: Site) -> None:
    job = site.submit("tiny", *SHORT, "parallelism=ddp", NAME="checked", SANITY="")
    assert site.wait(job)["JobState"] == "COMPLETED", site.output(job)
    assert "GB/s over 2 ranks (gloo)" in site.output(job)
    assert "sanity check passed" in site.output(job)


def test_job_near_its_time_limit_saves_and_is_requeued(site: Site, uninterrupted: Path) -> None:
    job = site.submit("tiny", *LONGER, "parallelism=ddp", NAME="requeued")
    site.wait_for_step("requeued", 5, job)
    site.cluster.run("scancel", "--signal=USR1", "--batch", job)  # as --signal=B:USR1@… makes Slurm do
    site.wait_for_restart(job)
    assert site.wait(job)["JobState"] == "COMPLETED", site.output(job)
    run = site.runs / "requeued"
    assert [start["job"]["restarts"] for start in manifest(run)["starts"]] == [0, 1]
    assert same_weights(run, uninterrupted)
    assert (site.checkout / "slurm" / "logs" / "latest" / "latest").resolve().name == "start-1"


def test_cancelled_job_saves_and_is_not_requeued(site: Site) -> None:
    job = site.submit("tiny", *LONGER, "trainer.max_steps=400", "parallelism=ddp", NAME="cancelled")
    site.wait_for_step("cancelled", 3, job)
    site.cluster.run("scancel", job)
    ended = site.wait(job)
    assert ended["JobState"] == "CANCELLED"
    site.cluster.await_idle(120)
    assert manifest(site.runs / "cancelled")["state"] == "stopped", site.output(job)
    assert list((site.runs / "cancelled").glob("checkpoint-*/complete.json"))
    time.sleep(3)  # for a late requeue
    after = site.cluster.job(job)
    assert (after["JobState"], after["Restarts"]) == ("CANCELLED", "0")


def test_sigterm_to_the_step_saves_and_prevents_the_requeue(site: Site) -> None:
    job = site.submit("tiny", *LONGER, "trainer.max_steps=400", "parallelism=ddp", NAME="terminated")
    site.wait_for_step("terminated", 3, job)
    site.cluster.run("scancel", "--signal=USR1", "--batch", job)
    site.cluster.run("scancel", "--signal=TERM", job)
    ended = site.wait(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "75:0", "0"), site.output(job)
    assert manifest(site.runs / "terminated")["state"] == "stopped"


@pytest.mark.parametrize("late", ["no node", "node2"])
def test_job_at_its_time_limit_before_the_first_step_is_requeued(site: Site, late: str) -> None:
    job = site.submit("tiny", *SHORT, "parallelism=ddp", NAME=f"early-{late[-1]}", SANITY="", LATE=late)
    # Before srun starts, or while one launcher handles signals and the other does not yet.
    first = "logs: " if late == "no node" else "node-0-node1.txt"
    until(lambda: first in site.output(job), lambda: site.output(job))
    site.cluster.run("scancel", "--signal=USR1", "--batch", job)
    until(lambda: site.cluster.job(job)["JobState"] in ("PENDING", *ENDED), lambda: site.output(job))
    assert site.cluster.job(job)["Restarts"] == "1", site.output(job)
    assert f"job {job}: requeued; resumes from its latest checkpoint" in site.output(job)
    site.cluster.run("scancel", job)
    site.cluster.await_idle(120)


def test_preempted_job_saves_and_is_requeued(site: Site, uninterrupted: Path) -> None:
    # Slurm signals every process of the step, data workers included.
    overrides = (*LONGER, "parallelism=ddp", "trainer.dataloader_num_workers=1")
    job = site.submit("tiny", *overrides, NAME="preempted", options=("--partition=spare", "--nodes=2"))
    site.wait_for_step("preempted", 5, job)
    urgent = site.cluster.run("sbatch", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    assert urgent.returncode == 0, urgent.stderr
    site.wait_for_restart(job)
    assert site.wait(job)["JobState"] == "COMPLETED", site.output(job)
    assert re.search(r"stopped at step \d+", site.output(job)), site.output(job)
    assert same_weights(site.runs / "preempted", uninterrupted)


def test_job_that_loses_a_node_resumes_from_the_latest_checkpoint(site: Site, uninterrupted: Path) -> None:
    # The new start waits until the ranks of the lost node stall.
    job = site.submit("tiny", *LONGER, "parallelism=ddp", "monitor.heartbeat_timeout_seconds=20", NAME="disconnected")
    site.wait_for_step("disconnected", 20, job)
    site.cluster.disconnect("node2")
    until(lambda: site.cluster.job(job)["Restarts"] == "1", lambda: site.output(job))
    reached = last_step(site.runs / "disconnected")
    site.wait_for_restart(job, without=["node2"])
    assert site.wait(job)["JobState"] == "COMPLETED", site.output(job)
    site.cluster.reboot("node2")
    site.cluster.await_idle()
    assert manifest(site.runs / "disconnected")["starts"][1]["job"]["nodes"] == "node[1,3]"
    resumed = re.search(r"from checkpoint-(\d+)", site.output(job))
    assert resumed is not None and 0 <= reached - int(resumed[1]) <= 15, site.output(job)
    assert same_weights(site.runs / "disconnected", uninterrupted)


def test_lost_node_that_the_ranks_notice_before_slurm_is_requeued(site: Site, uninterrupted: Path) -> None:
    site.cluster.set_slurmd_timeout(120)
    try:
        overrides = (*LONGER, "parallelism=ddp", "monitor.heartbeat_timeout_seconds=15")
        job = site.submit("tiny", *overrides, NAME="stalled")
        site.wait_for_step("stalled", 20, job)
        site.cluster.disconnect("node2")
        until(lambda: "no heartbeat for" in site.output(job), lambda: site.output(job))
        assert site.cluster.job(job)["JobState"] == "RUNNING", "it waits for the states of its nodes"
        site.wait_for_restart(job, without=["node2"])
        assert site.wait(job)["JobState"] == "COMPLETED", site.output(job)
    finally:
        site.cluster.set_slurmd_timeout(5)
        site.cluster.reboot("node2")
        site.cluster.await_idle()
    assert same_weights(site.runs / "stalled", uninterrupted)


def test_killed_launcher_fails_the_job_with_the_resume_command(site: Site) -> None:
    job = site.submit("tiny", *LONGER, "trainer.max_steps=400", "parallelism=ddp", NAME="headless")
    site.wait_for_step("headless", 3, job)
    processes = site.cluster.nodes["node2"].do("ps", "axo", "pid,args").splitlines()
    launcher = next(line.split()[0] for line in processes if " -m sft_recipes train tiny --name headless" in line)
    site.cluster.nodes["node2"].do("kill", "-KILL", launcher)
    ended = site.wait(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "0"), site.output(job)
    assert "srun: error: node2: task 1: Killed" in site.output(job)


def test_killed_rank_fails_the_job_and_is_named(site: Site) -> None:
    job = site.submit("tiny", *LONGER, "trainer.max_steps=400", "parallelism=ddp", NAME="killed")
    site.wait_for_step("killed", 3, job)
    heartbeat = json.loads((site.runs / "killed" / ".ranks" / "node2-1").read_text())
    site.cluster.nodes["node2"].do("kill", "-KILL", str(heartbeat["pid"]))
    ended = site.wait(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "0")
    # The exit of the rank failed the job, not a timeout of the other rank, and no rank is left.
    assert re.search(r"rank 1 on node2: killed by SIGKILL in step", site.output(job)), site.output(job)
    for node in ("node1", "node2"):
        assert "training.main" not in site.cluster.nodes[node].do("ps", "axo", "args")


def test_job_without_progress_exits_with_4(site: Site) -> None:
    run = site.runs / "stuck"
    run.mkdir(parents=True)
    record = {"attempts_without_progress": {"step": 0, "count": 3}}  # of three starts that were stopped before a save
    (run / "manifest.json").write_text(json.dumps(record))
    job = site.submit("tiny", *SHORT, "parallelism=ddp", NAME="stuck")
    ended = site.wait(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "4:0"), site.output(job)
    assert "3 attempts without progress from the start" in site.output(job)


def test_invalid_override_exits_with_2_on_all_nodes(site: Site) -> None:
    command = ("slurm/submit.sh", "tiny", "--", "trainer.lerning_rate=1")
    done = site.cluster.run(*command, environment={"NAME": "wrong", "PROCESSES": "2"}, folder=site.checkout)
    assert done.returncode == 2, done.stdout + done.stderr
    submitted = re.search(r"job (\d+) submitted", done.stdout)
    assert submitted is not None
    job = submitted[1]
    ended = site.cluster.job(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), done.stdout
    errors = [line for line in site.output(job).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, site.output(job)
    assert "Traceback" not in site.output(job)


def test_invalid_name_exits_with_2(site: Site) -> None:
    job = site.submit("tiny", *SHORT, NAME="a b/../c$(id)")
    assert site.wait(job)["ExitCode"] == "2:0", site.output(job)


def test_only_the_interrupted_task_of_an_array_is_requeued(site: Site) -> None:
    array = site.submit("tiny", *LONGER, "trainer.max_steps=400", options=("--array=1-2", "--nodes=1"), PROCESSES="1")
    other = str(int(array) + 1)  # the last task has the number of the array
    site.wait_for_step(f"tiny-{array}", 3, array)
    site.wait_for_step(f"tiny-{other}", 3, other)
    site.cluster.run("scancel", "--signal=USR1", "--batch", f"{array}_2")
    until(lambda: site.cluster.job(f"{array}_2")["Restarts"] == "1", lambda: site.output(array))
    first = site.cluster.job(f"{array}_1")
    assert (first["JobState"], first["Restarts"]) == ("RUNNING", "0")
    site.cluster.run("scancel", array)
    site.cluster.await_idle(120)


def test_sweep_runs_as_an_array_and_reports_its_results(site: Site) -> None:
    options = ("--processes", "2", "--lr", "1e-4,2e-3", "--fraction", "0.02", "--name", "swept")
    command = (".venv/bin/python", "-m", "sft_recipes", "sweep", "tiny", *options)
    environment = {"SANITY": "skip", "REPORT_TO": "none", "OMP_NUM_THREADS": "1", "PROCESSES": "2"}
    submitted = site.cluster.run(*command, "--slurm", environment=environment, folder=site.checkout)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    (array,) = re.findall(r"Submitted batch job (\d+)", submitted.stdout)
    for task in (f"{array}_0", f"{array}_1"):
        assert site.wait(task)["JobState"] == "COMPLETED", site.output(array)
    reported = site.cluster.run(*command, environment=environment, folder=site.checkout)
    assert reported.returncode == 0, reported.stdout + reported.stderr
    results = json.loads((site.runs / ".sweeps" / "swept" / "results.json").read_text())
    assert results["eval_loss"]["2e-3"] < results["eval_loss"]["1e-4"] and "2e-3" in results["result"]


def test_finished_run_is_not_trained_again(site: Site, uninterrupted: Path) -> None:
    job = site.submit("tiny", *LONGER, "parallelism=ddp", NAME="uninterrupted")
    assert site.wait(job)["JobState"] == "COMPLETED", site.output(job)
    assert "is finished; its model is in" in site.output(job)
    assert len(manifest(uninterrupted)["starts"]) == 1


def test_verify_resume_on_two_nodes(site: Site, uninterrupted: Path) -> None:
    verify = (".venv/bin/python", "-m", "sft_recipes", "verify-resume", "uninterrupted")
    command = f"--wrap=srun --ntasks-per-node=1 {' '.join(verify)}"
    options = ("--wait", "--nodes=2", "--output=slurm/logs/verify.out")
    done = site.cluster.run("sbatch", *options, command, folder=site.checkout)
    output = (site.checkout / "slurm" / "logs" / "verify.out").read_text()
    assert done.returncode == 0, output + done.stderr
    assert "resumed uninterrupted from checkpoint-45 (ddp on 2 ranks, CPU)" in output
    assert "exact: bit for bit equal to the uninterrupted run" in output
    assert not list((site.runs / ".replays").iterdir()), "the files of the replays are removed"


def test_processes_that_do_not_divide_over_nodes_are_rejected(site: Site) -> None:
    job = site.submit("tiny", *SHORT, PROCESSES="3", NAME="uneven")
    assert site.wait(job)["ExitCode"] == "2:0"
    assert "PROCESSES: found 3 on 2 nodes, expected a multiple of 2" in site.output(job)


def test_several_tasks_per_node_are_rejected(site: Site) -> None:
    job = site.submit("tiny", *SHORT, NAME="tasks", options=("--ntasks-per-node=2",))
    assert site.wait(job)["ExitCode"] == "2:0", site.output(job)
    assert "Slurm: found 4 tasks on 2 nodes, expected one per node" in site.output(job)


def test_slurm_rejects_missing_gpus_and_partition(site: Site) -> None:
    too_many = site.sbatch("70b", options=("--nodes=2", "--gpus-per-node=9"))
    assert too_many.returncode != 0
    assert "Requested node configuration is not available" in too_many.stderr
    unknown = site.sbatch("70b", options=("--nodes=2", "--partition=nowhere"))
    assert unknown.returncode != 0
    assert "invalid partition specified: nowhere" in unknown.stderr


def test_allocated_gpus_that_the_driver_lacks_are_named_with_their_node(site: Site) -> None:
    job = site.submit("70b", options=("--nodes=2",), PROCESSES="", NAME="gpus")
    assert site.wait(job)["ExitCode"] == "2:0", site.output(job)
    assert "Slurm allocated 8 on node1, nvidia-smi lists none" in site.output(job)
    assert "--exclude=node1" in site.output(job)


def test_sbatch_accepts_every_header(site: Site) -> None:
    scripts = sorted(path for path in (site.checkout / "slurm").glob("*.sh") if "\n#SBATCH " in path.read_text())
    recipes = {path.stem for path in (site.checkout / "recipes").glob("*.yaml")} - {"sizes"}
    assert {script.stem for script in scripts} == recipes
    for script in scripts:
        done = site.cluster.run("sbatch", "--test-only", "--nodes=2", f"slurm/{script.name}", folder=site.checkout)
        assert done.returncode == 0, f"{script.name}: {done.stderr}"


def test_make_slurm_submits_and_prints_the_output_of_the_job(
    make_slurm: subprocess.CompletedProcess[str], uninterrupted: Path
) -> None:
    assert make_slurm.returncode == 0, make_slurm.stdout + make_slurm.stderr
    assert re.search(r"submitted; output: /\S+/slurm/logs/sft-tiny-\d+.out", make_slurm.stdout)
    assert "trained      llama, built from scratch" in make_slurm.stdout
    assert manifest(uninterrupted)["state"] == "finished"
