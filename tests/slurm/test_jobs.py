"""The shipped jobs, as a user submits them, on a real Slurm of three nodes: trained, stopped, cut off, refused."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import slurm_sites
from helpers.slurm_cluster import cannot_be
from helpers.slurm_sites import ENDED, LONGER, Site, last_step, losses, same_weights, until
from helpers.workplace import SHORT, Workplace, manifest

pytestmark = pytest.mark.skipif(cannot_be() is not None, reason=str(cannot_be()))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with slurm_sites.site(tmp_path_factory.mktemp("site"), ("node1", "node2", "node3"), gpus=8) as one:
        yield one


@pytest.fixture(scope="module")
def by_one_process(shared_workplace: Workplace) -> Path:
    return shared_workplace.trained_once("one-process", *SHORT)


@pytest.fixture(scope="module")
def made(site: Site) -> subprocess.CompletedProcess[str]:
    """What `make slurm` says of a run that nothing interrupts."""
    given = {"SANITY": "skip", "REPORT_TO": "none", "OMP_NUM_THREADS": "1", "PROCESSES": "2", "NAME": "uninterrupted"}
    words = f"ARGS={' '.join((*LONGER, 'parallelism=ddp'))}"
    return site.cluster.ask("make", "slurm", "RECIPE=tiny", words, environment=given, folder=site.checkout)


@pytest.fixture(scope="module")
def uninterrupted(site: Site, made: subprocess.CompletedProcess[str]) -> Path:
    return site.runs / "uninterrupted"


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_two_nodes_of_two_ranks_train_as_one_process_does(site: Site, by_one_process: Path, engine: str) -> None:
    job = site.submit("tiny", *SHORT, f"parallelism={engine}", PROCESSES="4", NAME=f"four-{engine}")
    ended = site.ended(job)
    said = site.output(job)
    assert ended["JobState"] == "COMPLETED", said
    assert losses(site.runs / f"four-{engine}") == pytest.approx(losses(by_one_process), rel=2e-4)
    assert manifest(site.runs / f"four-{engine}")["starts"][0]["job"] == {
        "id": job, "name": "sft-tiny", "nodes": "node[1-2]", "restarts": 0,
    }  # fmt: skip
    logs = site.checkout / "slurm" / "logs"
    assert (logs / "latest" / "latest").resolve() == logs / f"sft-tiny-{job}" / "start-0"
    names = {path.name for path in (logs / "latest" / "latest").glob("*.txt")}
    assert names == {"node-0-node1.txt", "node-1-node2.txt", "rank-1.txt", "rank-2.txt", "rank-3.txt"}
    assert f"job {job}, start 1, 2 x 0 GPUs" in said
    status = site.cluster.ask(".venv/bin/python", "-m", "sft_recipes", "status", f"four-{engine}", folder=site.checkout)
    assert f"job        id {job}, name sft-tiny, state COMPLETED" in status.stdout, status.stdout + status.stderr


def test_the_nodes_are_tried_together_before_the_first_step(site: Site) -> None:
    job = site.submit("tiny", *SHORT, "parallelism=ddp", NAME="tried", SANITY="")
    assert site.ended(job)["JobState"] == "COMPLETED", site.output(job)
    assert "GB/s over 2 ranks (gloo)" in site.output(job)
    assert "sanity: passed" in site.output(job)


def test_a_job_whose_time_is_nearly_up_saves_and_goes_on_by_itself(site: Site, uninterrupted: Path) -> None:
    job = site.submit("tiny", *LONGER, "parallelism=ddp", NAME="requeued")
    site.reaches("requeued", 5, job)
    site.cluster.ask("scancel", "--signal=USR1", "--batch", job)  # what --signal=B:USR1@… has Slurm send
    site.starts_again(job)
    assert site.ended(job)["JobState"] == "COMPLETED", site.output(job)
    run = site.runs / "requeued"
    assert [start["job"]["restarts"] for start in manifest(run)["starts"]] == [0, 1]
    assert same_weights(run, uninterrupted)
    assert (site.checkout / "slurm" / "logs" / "latest" / "latest").resolve().name == "start-1"


def test_a_job_that_is_cancelled_saves_and_stays_cancelled(site: Site) -> None:
    job = site.submit("tiny", *LONGER, "trainer.max_steps=400", "parallelism=ddp", NAME="cancelled")
    site.reaches("cancelled", 3, job)
    site.cluster.ask("scancel", job)
    ended = site.ended(job)
    assert ended["JobState"] == "CANCELLED"
    site.cluster.await_idle(120)
    assert manifest(site.runs / "cancelled")["state"] == "stopped", site.output(job)
    assert list((site.runs / "cancelled").glob("checkpoint-*/complete.json"))
    time.sleep(3)
    after = site.cluster.job(job)
    assert (after["JobState"], after["Restarts"]) == ("CANCELLED", "0")


def test_sigterm_to_the_ranks_saves_and_brings_no_job_back_even_when_its_time_was_up(site: Site) -> None:
    job = site.submit("tiny", *LONGER, "trainer.max_steps=400", "parallelism=ddp", NAME="asked")
    site.reaches("asked", 3, job)
    site.cluster.ask("scancel", "--signal=USR1", "--batch", job)
    site.cluster.ask("scancel", "--signal=TERM", job)
    ended = site.ended(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "75:0", "0"), site.output(job)
    assert manifest(site.runs / "asked")["state"] == "stopped"


@pytest.mark.parametrize("late", ["no node", "node2"])
def test_a_job_whose_time_is_up_before_it_has_begun_is_no_failed_one(site: Site, late: str) -> None:
    job = site.submit("tiny", *SHORT, "parallelism=ddp", NAME=f"early-{late[-1]}", SANITY="", LATE=late)
    # Before srun has begun, or where one launcher hears and another does not yet.
    first = "logs: " if late == "no node" else ".hears-0"
    until(lambda: first in site.output(job) + site.words(job), lambda: site.output(job))
    site.cluster.ask("scancel", "--signal=USR1", "--batch", job)
    until(lambda: site.cluster.job(job)["JobState"] in ("PENDING", *ENDED), lambda: site.output(job))
    assert site.cluster.job(job)["Restarts"] == "1", site.output(job)
    assert f"job {job} goes back into the queue" in site.output(job)
    site.cluster.ask("scancel", job)
    site.cluster.await_idle(120)


def test_a_job_that_is_preempted_saves_in_its_grace_time_and_goes_on_by_itself(site: Site, uninterrupted: Path) -> None:
    # Slurm asks every process of the step, those that load rows too.
    words = (*LONGER, "parallelism=ddp", "trainer.dataloader_num_workers=1")
    job = site.submit("tiny", *words, NAME="preempted", options=("--partition=spare", "--nodes=2"))
    site.reaches("preempted", 5, job)
    urgent = site.cluster.ask("sbatch", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    assert urgent.returncode == 0, urgent.stderr
    site.starts_again(job)
    assert site.ended(job)["JobState"] == "COMPLETED", site.output(job)
    assert re.search(r"stopped at step \d+, saved", site.output(job)), site.output(job)
    assert same_weights(site.runs / "preempted", uninterrupted)


def test_a_node_that_is_cut_off_costs_no_more_than_the_steps_behind_the_last_save(
    site: Site, uninterrupted: Path
) -> None:
    job = site.submit("tiny", *LONGER, "parallelism=ddp", NAME="cut")
    site.reaches("cut", 20, job)
    site.cluster.cut("node2")
    until(lambda: site.cluster.job(job)["Restarts"] == "1", lambda: site.output(job))
    reached = last_step(site.runs / "cut")
    site.starts_again(job, without=["node2"])
    assert site.ended(job)["JobState"] == "COMPLETED", site.output(job)
    site.cluster.reboot("node2")
    site.cluster.await_idle()
    assert manifest(site.runs / "cut")["starts"][1]["job"]["nodes"] == "node[1,3]"
    went_on = re.search(r"going on from checkpoint-(\d+)", site.output(job))
    assert went_on is not None and 0 <= reached - int(went_on[1]) <= 15, site.output(job)
    assert same_weights(site.runs / "cut", uninterrupted)


def test_a_launcher_that_is_killed_ends_the_job_which_says_what_to_do(site: Site) -> None:
    job = site.submit("tiny", *LONGER, "trainer.max_steps=400", "parallelism=ddp", NAME="headless")
    site.reaches("headless", 3, job)
    said = site.cluster.nodes["node2"].do("ps", "axo", "pid,args").splitlines()
    launcher = next(line.split()[0] for line in said if " -m sft_recipes train tiny --name headless" in line)
    site.cluster.nodes["node2"].do("kill", "-KILL", launcher)
    ended = site.ended(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "137:0", "0")
    assert "srun: error: node2: task 1: Killed" in site.output(job)
    assert "go on with NAME=headless sbatch slurm/tiny.sh" in site.output(job)


def test_a_rank_that_is_killed_ends_the_job_which_names_it(site: Site) -> None:
    job = site.submit("tiny", *LONGER, "trainer.max_steps=400", "parallelism=ddp", NAME="killed")
    site.reaches("killed", 3, job)
    pulse = json.loads((site.runs / "killed" / ".ranks" / "node2-1").read_text())
    site.cluster.nodes["node2"].do("kill", "-KILL", str(pulse["process"]))
    began = time.monotonic()
    ended = site.ended(job)
    assert time.monotonic() - began < 90
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "0")
    assert "rank 1 on node2 was ended by SIGKILL in step" in site.output(job)


def test_a_job_that_comes_no_further_ends_with_4(site: Site) -> None:
    job = site.submit("tiny", *SHORT, "parallelism=ddp", NAME="stuck", options=("--hold",))
    counted = site.runs / ".jobs" / job / "starts.json"
    counted.parent.mkdir(parents=True)
    counted.write_text('{"run": "stuck", "step": 0, "count": 3}')
    # A restart that Slurm counts; the body of a job begins its record anew at the first.
    (site.checkout / "slurm" / "cluster.env").write_text("SLURM_RESTART_COUNT=3\n")
    try:
        site.cluster.ask("scontrol", "release", job)
        ended = site.ended(job)
    finally:
        (site.checkout / "slurm" / "cluster.env").unlink()
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "4:0"), site.output(job)
    assert f"job {job} was started 3 times and has come no further than its beginning" in site.output(job)


def test_what_a_user_gets_wrong_ends_the_job_with_2_on_all_nodes(site: Site) -> None:
    wrong = ("slurm/submit.sh", "tiny", "--", "trainer.lerning_rate=1")
    done = site.cluster.ask(*wrong, environment={"NAME": "wrong", "PROCESSES": "2"}, folder=site.checkout)
    assert done.returncode == 2, done.stdout + done.stderr
    said = re.search(r"job (\d+) is submitted", done.stdout)
    assert said is not None
    ended = site.cluster.job(said[1])
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), done.stdout
    errors = [line for line in site.output(said[1]).splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and len(set(errors)) == 1  # in node 0's log, and in the job's own, which shows it
    assert "Traceback" not in site.output(said[1])


def test_a_name_that_is_none_for_a_run_is_refused_on_all_nodes(site: Site) -> None:
    job = site.submit("tiny", *SHORT, NAME="a b/../c$(id)")
    assert site.ended(job)["ExitCode"] == "2:0", site.output(job)


def test_of_an_array_the_task_alone_goes_back_into_the_queue_whose_time_is_up(site: Site) -> None:
    array = site.submit("tiny", *LONGER, "trainer.max_steps=400", options=("--array=1-2", "--nodes=1"), PROCESSES="1")
    other = str(int(array) + 1)  # the last task has the array's own number
    site.reaches(f"tiny-{array}", 3, array)
    site.reaches(f"tiny-{other}", 3, other)
    site.cluster.ask("scancel", "--signal=USR1", "--batch", f"{array}_2")
    until(lambda: site.cluster.job(f"{array}_2")["Restarts"] == "1", lambda: site.output(array))
    first = site.cluster.job(f"{array}_1")
    assert (first["JobState"], first["Restarts"]) == ("RUNNING", "0")
    site.cluster.ask("scancel", array)
    site.cluster.await_idle(120)


def test_a_finished_run_is_not_begun_again(site: Site, uninterrupted: Path) -> None:
    job = site.submit("tiny", *LONGER, "parallelism=ddp", NAME="uninterrupted")
    assert site.ended(job)["JobState"] == "COMPLETED", site.output(job)
    assert "is finished; its model is in" in site.output(job)
    assert len(manifest(uninterrupted)["starts"]) == 1


def test_a_run_of_two_nodes_is_proved_to_resume_exactly_on_two(site: Site, uninterrupted: Path) -> None:
    verify = (".venv/bin/python", "-m", "sft_recipes", "verify-resume", "uninterrupted")
    done = site.cluster.ask("salloc", "--nodes=2", "srun", "--ntasks-per-node=1", *verify, folder=site.checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checkpoint-45 of uninterrupted (ddp on 2 CPU processes) was loaded" in done.stdout
    assert "exact: this run resumes as if it had not stopped, bit for bit" in done.stdout
    job = re.search(r"Granted job allocation (\d+)", done.stderr)
    assert job is not None and not (site.runs / ".jobs" / job[1]).exists(), "what its parents said is gone"


def test_other_nodes_than_a_plan_can_share_its_batch_with_are_refused(site: Site) -> None:
    job = site.submit("tiny", *SHORT, PROCESSES="3", NAME="uneven")
    assert site.ended(job)["ExitCode"] == "2:0"
    assert "PROCESSES: 3 on the CPU do not share evenly over 2 nodes" in site.output(job)


def test_several_tasks_a_node_are_refused(site: Site) -> None:
    job = site.submit("tiny", *SHORT, NAME="tasks", options=("--ntasks-per-node=2",))
    assert site.ended(job)["ExitCode"] == "2:0", site.output(job)
    assert "Slurm: 4 tasks on 2 nodes; wanted one a node" in site.output(job)


def test_slurm_refuses_what_the_cluster_does_not_have(site: Site) -> None:
    nine = site.sbatch("70b", options=("--nodes=2", "--gpus-per-node=9"))
    assert nine.returncode != 0
    assert "Requested node configuration is not available" in nine.stderr
    nowhere = site.sbatch("70b", options=("--nodes=2", "--partition=nowhere"))
    assert nowhere.returncode != 0
    assert "invalid partition specified: nowhere" in nowhere.stderr


def test_gpus_that_slurm_gives_and_the_driver_does_not_have_are_named_with_their_node(site: Site) -> None:
    job = site.submit("70b", options=("--nodes=2",), PROCESSES="", NAME="gpus")
    assert site.ended(job)["ExitCode"] == "2:0", site.output(job)
    assert "Slurm gave 8 on node1, and nvidia-smi lists none there" in site.output(job)
    assert "--exclude=node1" in site.output(job)


def test_every_header_asks_for_what_sbatch_takes(site: Site) -> None:
    scripts = sorted(path for path in (site.checkout / "slurm").glob("*.sh") if "\n#SBATCH " in path.read_text())
    assert len(scripts) == 12
    for script in scripts:
        done = site.cluster.ask("sbatch", "--test-only", "--nodes=2", f"slurm/{script.name}", folder=site.checkout)
        assert done.returncode == 0, f"{script.name}: {done.stderr}"


def test_make_slurm_submits_and_shows_what_the_job_says(
    made: subprocess.CompletedProcess[str], uninterrupted: Path
) -> None:
    assert made.returncode == 0, made.stdout + made.stderr
    assert re.search(r"is submitted; its output: /\S+/slurm/logs/sft-tiny-\d+.out", made.stdout)
    assert "trained    llama, built from scratch" in made.stdout
    assert manifest(uninterrupted)["state"] == "finished"
