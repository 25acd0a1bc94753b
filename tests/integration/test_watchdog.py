"""Ranks that die, stall or get a stop request: errors and exit codes in real runs over gloo.

A run of two ranks is interrupted several times in different ways, and must end with the weights of an uninterrupted run.
"""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.processes import commands, launcher_of
from helpers.workplace import HANG_SECONDS, LONG, REPOSITORY, manifest
from safetensors.torch import load_file

from sft_recipes.config import loader
from sft_recipes.launch import attempts, command, process_group, run_lock, watchdog
from sft_recipes.launch.stop_request import StopRequest, handle_stop_signals
from sft_recipes.launch.watchdog import Limits, RankStatus
from sft_recipes.planner import plan as plans
from sft_recipes.planner import save_time
from sft_recipes.runtime import heartbeat, run_dir, timeouts
from sft_recipes.runtime.errors import UserError
from sft_recipes.runtime.heartbeat import Failure, Heartbeat
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.training import rank_heartbeat

# A rank exits with code 0 at a step: installed as sitecustomize.py, which Python imports first.
PLANT = """
import os, sys, threading, time
from pathlib import Path

def act():
    from sft_recipes.runtime import heartbeat
    rank, step = os.environ["PLANTED"].split()
    ranks = Path(sys.orig_argv[-1]).parent / ".ranks"
    while True:
        time.sleep(0.01)
        own = heartbeat.read_heartbeats(ranks).get(int(rank))
        if own is not None and own.pid == os.getpid() and own.step >= int(step):
            os._exit(0)

if "sft_recipes.training.main" in sys.orig_argv:
    if os.environ.get("RANK", "0") == os.environ.get("PLANTED", "-").split()[0]:
        threading.Thread(target=act, daemon=True).start()
"""


class Run:
    """An attempt of a run as a process, with its output."""

    def __init__(self, workplace, name, *arguments, **variables):
        self.folder = RunDir(workplace.runs / name)
        self.output = workplace.path / f"{name}.txt"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sft_recipes", "train", "tiny", "--name", name, *arguments],
                cwd=workplace.path, env=workplace.environment(OMP_NUM_THREADS="1", **variables), stdout=output,
                stderr=subprocess.STDOUT,
            )  # fmt: skip

    def wait_for_step(self, step, ranks):
        """Return the process ids of the ranks, after each has reached a step."""
        until = time.monotonic() + HANG_SECONDS
        while True:
            pids = {
                rank: beat.pid
                for rank, beat in heartbeat.read_heartbeats(self.folder.ranks).items()
                if beat.step >= step and heartbeat.process_state(beat.pid)
            }
            if len(pids) == ranks:
                return pids
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < until, "timeout"
            time.sleep(0.02)

    def launcher(self):
        """Process id of the launcher of the ranks."""
        return launcher_of(self.folder.plan)

    def wait(self, code):
        """Wait for the end, which must leave no process; return the output."""
        self.process.wait(HANG_SECONDS)
        output = self.output.read_text()
        assert self.process.returncode == code, output
        left = [command for _, command in commands() if str(self.folder.plan).encode() in command]
        assert left == [], "a process of the run is left"
        return output

    def error(self, code):
        """Wait for the end; return the only error line."""
        output = self.wait(code)
        (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
        return line

    def wait_for_stop(self):
        """Wait for the end after a stop request: all ranks saved one step, exit code 75; return the step."""
        output = self.wait(75)
        step = manifest(self.folder.path)["steps"]
        assert f"stopped at step {step}, saved" in output
        assert manifest(self.folder.path)["state"] == "stopped"
        assert self.folder.latest_complete() == step and not self.folder.final.exists()
        return step


@pytest.fixture(scope="module")
def start(shared_workplace, few_rows, tmp_path_factory):
    """Function that starts a run on few rows; with `plant`, "RANK STEP", a rank exits at that step."""
    planted = tmp_path_factory.mktemp("planted")
    (planted / "sitecustomize.py").write_text(PLANT)

    def begin(name, ranks, *more, plant="", **variables):
        arguments = ("--gpus", "0", "--processes", str(ranks), *LONG)
        if plant:
            variables |= {"PLANTED": plant, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{planted}"}
        return Run(shared_workplace, name, *arguments, f"data.train={few_rows}", *more, **variables)

    return begin


def test_interrupted_run_ends_with_weights_of_uninterrupted_run(start, long_ddp_run):
    """Stopped, and halted, which ends by SIGKILL. Each strategy: tests/strategies/test_trajectories.py; more: `make chaos`."""
    run = start("interrupted-2", 2)
    pids = run.wait_for_step(10, 2)
    os.kill(pids[0], signal.SIGUSR1)
    time.sleep(0.13)
    for rank in (1, 1):  # repeated in the grace period: no effect
        os.kill(pids[rank], signal.SIGTERM) if heartbeat.process_state(pids[rank]) else None
    stopped = run.wait_for_stop()

    run = start("interrupted-2", 2, "monitor.heartbeat_timeout_seconds=5")
    os.kill(run.wait_for_step(stopped + 2, 2)[1], signal.SIGSTOP)
    line = run.error(1)
    assert "rank 1 on " in line and ": no heartbeat for " in line and "stopped by a signal" in line
    assert "rank 0" not in line and manifest(run.folder.path)["state"] == "failed"
    (written,) = run.folder.stack_traces.glob("*-0.txt")
    assert "most recent call first" in written.read_text() and str(run.folder.stack_traces) in line

    start("interrupted-2", 2).wait(0)
    ours, theirs = (load_file(path / "last" / "model.safetensors") for path in (run.folder.path, long_ddp_run))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not run.folder.stack_traces.exists(), "of an earlier attempt"


LATE_SAVE = ("trainer.save_steps=8",)  # the ranks end at step 3


def test_three_attempts_without_progress_need_explicit_resume(start):
    """One rank, another failure each time: none of them may end with 0."""
    run = start("poisoned", 1, *LATE_SAVE, plant="0 3")
    line = run.error(1)
    assert "rank 0 on " in line and "exited with code 0 in step " in line
    assert manifest(run.folder.path)["attempts_without_progress"] == {"step": 0, "count": 1}

    run = start("poisoned", 1, *LATE_SAVE)
    run.wait_for_step(3, 1)
    os.kill(run.launcher(), signal.SIGKILL)
    assert "launcher of the ranks: killed by SIGKILL on " in run.error(1)

    run = start("poisoned", 1, *LATE_SAVE)
    os.kill(run.wait_for_step(3, 1)[0], signal.SIGSTOP)  # so that it does not save
    for _ in range(2):
        run.process.send_signal(signal.SIGINT)
        time.sleep(1)
    line = run.error(4)  # the second Ctrl-C terminates at once, and nothing was saved
    assert "3 attempts without progress from the start" in line and "RESUME=1" in line

    assert "3 attempts without progress" in start("poisoned", 1, *LATE_SAVE).error(4)

    run = start("poisoned", 1, *LATE_SAVE, "--resume")
    run.wait_for_step(3, 1)
    os.kill(run.launcher(), signal.SIGTERM)
    assert run.wait_for_stop() > 0


def test_stop_before_first_step_terminates_at_once(start):
    run = start("early", 2)
    run.wait_for_step(0, 2)
    run.process.send_signal(signal.SIGTERM)
    assert "stopped before a new checkpoint was complete" in run.wait(75)
    assert run.folder.numbered("checkpoint") == [] and not run.folder.final.exists()


LIMITS = Limits(stall=10.0, save=100.0)


def status(rank=0, step=5, activity="step", beats=3, stalled=0.0, state="S", last_alive=0.0, failed_at=None):
    failure = None if failed_at is None else Failure("ValueError", "odd", failed_at, False)
    return RankStatus(Heartbeat(rank, 1000 + rank, step, activity, beats), state, stalled, last_alive, failure)


def test_heartbeat_timeout_depends_on_activity():
    loading = timeouts.MODEL_LOADING + 2 * 100
    seconds = {"step": 10, "evaluating": 10, "waiting": 10, "saving": 110, "starting": loading, "ending": loading}
    assert {activity: LIMITS.of(activity) for activity in seconds} == seconds


STALLS = {
    "none": ([status(0, stalled=9), status(1, stalled=9)], []),
    "one, others still busy": ([status(0, stalled=11), status(1, step=6, stalled=1)], []),
    "stopped by a signal": ([status(0, stalled=11), status(1, stalled=11, state="T")], [1]),
    "one step behind": ([status(0, step=6, stalled=11), status(1, step=5, stalled=11)], [1]),
    "fewer beats": ([status(0, beats=4, stalled=11), status(1, beats=3, stalled=11)], [1]),
    "the other waits": ([status(0, beats=2, activity="waiting", stalled=11), status(1, beats=3, stalled=11)], [1]),
    "all, equal progress": ([status(0, stalled=11), status(1, stalled=11)], [0, 1]),
    "all waiting": ([status(rank, activity="waiting", stalled=11) for rank in (0, 1)], [0, 1]),
    "none, one saves": ([status(0, activity="saving", stalled=60), status(1, activity="waiting", stalled=60)], []),
    "save too long": ([status(0, activity="saving", stalled=111), status(1, activity="waiting", stalled=111)], [0]),
}  # fmt: skip


def test_stalled_ranks_are_those_that_others_wait_for():
    for case, (ranks, expected) in STALLS.items():
        stalled = watchdog.find_stalled_ranks(ranks) if watchdog.all_stalled(ranks, LIMITS) else []
        assert [rank.heartbeat.rank for rank in stalled] == expected, case


def test_stall_message_names_rank_step_and_limit():
    message = watchdog.stall_message([status(0, step=6, stalled=11), status(1, step=5, stalled=12, state="T")], LIMITS)
    assert re.fullmatch(
        r"rank 1 on \S+: no heartbeat for 12 s in step 5 \(pid 1001, stopped by a signal\); limit 10 s "
        r"\(monitor.heartbeat_timeout_seconds\)",
        message,
    )


def test_waiting_rank_is_recognized_by_its_stack_trace():
    """As faulthandler writes it; the main thread gets the signal."""
    other = 'Thread 0x1 (most recent call first):\n  File "threading.py", line 1 in wait\n\n'
    waits = 'Current thread 0x2 (most recent call first):\n  File "torch/distributed/distributed_c10d.py", line 7 in barrier\n'
    works = 'Current thread 0x2 (most recent call first):\n  File "fetch.py", line 7 in fetch\n'
    assert watchdog.is_in_collective(other + waits) and not watchdog.is_in_collective(other + works)
    assert not watchdog.is_in_collective(waits.replace("Current thread", "Thread") + "\n" + works)


def test_first_failure_is_reported_not_the_lost_peer():
    killed, lost_peer = status(1, state="", last_alive=10.0), status(0, failed_at=10.1)
    assert watchdog.find_first_failure([lost_peer, killed]) is killed
    failed, later = status(1, failed_at=10.0), status(0, failed_at=10.3)
    assert watchdog.find_first_failure([later, failed]) is failed
    assert "rank 1 on " in (line := watchdog.failure_message(failed, 1)) and "in step 5: ValueError: odd" in line
    assert "exited with code 0 in step 5, before the end" in watchdog.failure_message(killed, 0)
    assert "killed by SIGSEGV in step 5, saving" in watchdog.failure_message(status(activity="saving", state=""), -11)


@pytest.mark.parametrize(
    ("codes", "code", "error"),
    [
        ({0: -15, 1: -9}, 1, "rank 1 on .*: killed by SIGKILL.* before its first heartbeat"),
        ({0: 1, 1: -15}, 1, "rank 0 on .*: exited with code 1 before its first heartbeat"),
        ({0: -15, 1: -15}, 75, None),
    ],
)
def test_failure_before_first_heartbeat_names_rank_without_stop_signal(tmp_path, codes, code, error):
    folder = RunDir(tmp_path)
    plan = plans.resolve(loader.load("tiny"), plans.Topology(gpus=0, processes=2))
    heartbeat.write_exit_codes(folder.ranks, codes)
    result = watchdog.Watchdog(folder, plan).result(1, False)
    assert result.code == code and re.search(error or "^None$", str(result.error))


def test_data_worker_error_is_recorded(tmp_path, monkeypatch):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            raise ValueError(f"row {index} is odd")

    folder = RunDir(tmp_path)
    monkeypatch.setattr(rank_heartbeat, "_writer", None)
    rank_heartbeat.start(folder, 3)
    rank_heartbeat.beat(7, "step")
    with pytest.raises(ValueError, match="row 0 is odd"), rank_heartbeat.record_exit():
        next(iter(torch.utils.data.DataLoader(Rows(), num_workers=1)))
    failure = heartbeat.read_failures(folder.ranks)[3]
    assert (failure.kind, failure.user_error) == ("ValueError", False)
    assert failure.message == "Caught ValueError in DataLoader worker process 0. … ValueError: row 0 is odd"


_WORKERS = """
import multiprocessing, os, signal, subprocess, time, torch
from sft_recipes.training import stop_signal

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return os.getpid()

stop_signal.handle()
rows = iter(torch.utils.data.DataLoader(Rows(), num_workers=1))
worker = int(next(rows))
for _ in range(20):
    subprocess.run(["bash", "-c", f"kill -TERM {worker}"], check=True)  # the builtin: minimal systems lack /bin/kill
    assert int(next(rows)) == worker
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
os.kill(worker, signal.SIGTERM)
while multiprocessing.active_children():
    time.sleep(0.01)
"""


def test_data_worker_accepts_sigterm_of_its_rank_only():
    done = subprocess.run(
        [sys.executable, "-c", _WORKERS],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_command_signalled_by_slurm_counts_as_stopped(number):
    signals_itself = ["bash", "-c", f"kill -{number} $$"]
    assert process_group.run(signals_itself, os.environ, StopRequest()) == run_dir.EXIT_STOPPED
    signals_launcher = ["bash", "-c", f"kill -{number} $PPID; exit 1"]
    with handle_stop_signals() as stop_request:
        assert process_group.run(signals_launcher, os.environ, stop_request) == run_dir.EXIT_STOPPED


def test_heartbeat_is_overwritten_and_removed_at_normal_exit(tmp_path, monkeypatch):
    folder = RunDir(tmp_path)
    monkeypatch.setattr(rank_heartbeat, "_writer", None)
    rank_heartbeat.beat(1, "step")  # before start: no effect
    rank_heartbeat.start(folder, 0)
    assert heartbeat.read_heartbeats(folder.ranks)[0].activity == "starting"
    for _ in range(3):
        rank_heartbeat.beat(123_456_789, "evaluating")
    latest = heartbeat.read_heartbeats(folder.ranks)[0]
    assert (latest.pid, latest.step, latest.activity, latest.beats) == (os.getpid(), 123_456_789, "evaluating", 2)
    with rank_heartbeat.record_exit():
        pass
    assert heartbeat.read_heartbeats(folder.ranks) == {} and list(folder.stack_traces.iterdir()) == []


def test_run_with_ranks_of_earlier_attempt_is_not_started(tmp_path, monkeypatch):
    monkeypatch.setattr(timeouts, "EARLIER_RANKS_EXIT", 0.5)
    folder = RunDir(tmp_path / "run")
    folder.ranks.mkdir(parents=True)
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", str(folder.plan)])
    try:
        while not Path(f"/proc/{left.pid}/cmdline").read_bytes():  # the kernel has not set its arguments yet
            time.sleep(0.01)
        beat = Heartbeat(1, left.pid, 5, "step", 0)
        heartbeat.rank_file(folder.ranks, 1).write_bytes(heartbeat.encode(beat))
        with pytest.raises(
            UserError, match=f"rank 1 .pid {left.pid}, state .. of an earlier attempt of run still runs"
        ):
            run_lock.lock(folder).__enter__()
    finally:
        left.kill()
        left.wait()
    with run_lock.lock(folder):
        reused = dataclasses.replace(beat, pid=os.getpid())
        heartbeat.rank_file(folder.ranks, 1).write_bytes(heartbeat.encode(reused))
    with run_lock.lock(folder):
        pass  # another process has the id now


def test_stop_request_between_two_commands_is_honored(tmp_path):
    with handle_stop_signals() as stop_request:
        os.kill(os.getpid(), signal.SIGUSR1)
        touched = tmp_path / "touched"
        code = process_group.run([shutil.which("touch"), str(touched)], os.environ, stop_request)
    assert code == 75 and not touched.exists()


def test_shutdown_timeout_covers_a_large_save(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    plan = plans.resolve(loader.load("70b"), plans.Topology(gpus=32, processes=32, nodes=4, gpu_type="h100-80g"))
    slow_disk_seconds = plan.checkpoint_bytes / 4 / 500_000_000
    assert save_time.max_save_seconds(plan) == slow_disk_seconds > 120
    assert "assumed until a sanity check" in save_time.describe(plan)
    save_time.record_speed(2_000_000, 1.0)
    assert save_time.max_save_seconds(plan) == slow_disk_seconds, "a measurement of a much smaller save is ignored"
    save_time.record_speed(plan.checkpoint_bytes // 100, 10.0)
    assert save_time.save_seconds(plan) == pytest.approx(1000)
    assert "measured by the latest sanity check" in save_time.describe(plan)
    assert save_time.max_save_seconds(plan) == pytest.approx(3000)
    variables = command.environment(plan, {})
    assert float(variables["PET_SHUTDOWN_TIMEOUT"]) >= 3000
    tiny = plans.resolve(loader.load("tiny"), plans.Topology(gpus=0, processes=1))
    assert command.environment(tiny, {})["PET_SHUTDOWN_TIMEOUT"] == "120"
    assert not any(number.name in variables["PET_SIGNALS_TO_HANDLE"] for number in heartbeat.STOP_SIGNALS)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_gpu_ranks_use_expandable_segments_by_default(name):
    plan = plans.resolve(loader.load("8b"), plans.Topology(gpus=8, processes=8, gpu_type="h100-80g"))
    assert command.environment(plan, {})["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    chosen = command.environment(plan, {name: "max_split_size_mb:128"})
    assert {key: value for key, value in chosen.items() if "ALLOC_CONF" in key} == {name: "max_split_size_mb:128"}
    tiny = plans.resolve(loader.load("tiny"), plans.Topology(gpus=0, processes=1))
    assert "PYTORCH_ALLOC_CONF" not in command.environment(tiny, {})


def test_newer_checkpoint_resets_attempts(tmp_path, console):
    def error():
        code = attempts.check_progress(folder)
        printed = console.readouterr().err
        assert (code == 4) == bool(printed)
        return printed

    folder = RunDir(tmp_path)
    for _ in range(3):
        assert error() == ""
        attempts.record_attempt(folder)
    assert "3 attempts without progress from the start" in error()
    attempts.record_attempt(folder)
    assert "4 attempts without progress" in error(), "an explicit resume that failed too"
    run_dir.write_json(folder.manifest, {
        **manifest(tmp_path), "diverged": {"step": 7, "rows": ["a.jsonl:3"]}
    })  # fmt: skip
    assert "diverged at step 7, rows a.jsonl:3" in error()
    folder.checkpoint(8).mkdir()
    assert "4 attempts without progress" in error(), "it is incomplete"
    run_dir.write_json(folder.checkpoint(8) / "complete.json", {"step": 8})
    assert error() == ""
    attempts.record_attempt(folder)
    assert manifest(tmp_path)["attempts_without_progress"] == {"step": 8, "count": 1}


@pytest.mark.parametrize(
    ("chosen", "spins"), [({}, "2000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)]
)
def test_openmp_spin_is_bounded_by_default(chosen, spins):
    """In the command line and every process that it starts. Without a bound, training next to one busy process on 2
    cores makes hardly any progress (benchmarks/threads.py)."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_WAIT"))}
    code = "import os; from sft_recipes import cli; cli.main(['recipes']); print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**kept, **chosen}, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == str(spins)
