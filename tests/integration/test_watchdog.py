"""Ranks that die, hang or are asked to stop: what the parent says and does, in real runs over gloo.

One run of two ranks is interrupted again and again, each time otherwise, and must end as if it never had been.
"""

import dataclasses
import inspect
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
from helpers.workplace import HANG_SECONDS, REPOSITORY, manifest
from safetensors.torch import load_file

from sft_recipes.config import loader
from sft_recipes.launch import attempts, command, process_group, run_lock, watchdog
from sft_recipes.launch.run_selection import Start
from sft_recipes.launch.watchdog import Limits, RankStatus
from sft_recipes.planner import plan as plans
from sft_recipes.planner import save_time
from sft_recipes.runtime import heartbeat, run_dir, timeouts
from sft_recipes.runtime.errors import UserError
from sft_recipes.runtime.heartbeat import Failure, Heartbeat
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.training import rank_heartbeat
from sft_recipes.training.deepspeed_ops import HeldByTheKernel

STEPS = 30
SMALL = (
    "batch.effective_batch_size=8", "batch.max_per_device_batch_size=4",
    f"trainer.max_steps={STEPS}", f"trainer.eval_steps={STEPS}", "trainer.save_steps=8", "trainer.logging_steps=10",
    "trainer.max_length=256", "trainer.packing=false", "generation.show=0", "generation.exact_match=0",
)  # fmt: skip

# What a rank does to itself at a step, planted where Python looks before it runs anything.
PLANT = """
import os, sys, threading, time
from pathlib import Path

def act():
    from sft_recipes.runtime import heartbeat
    rank, step, how = os.environ["PLANTED"].split()
    ranks = Path(sys.orig_argv[-1]).parent / ".ranks"
    while True:
        time.sleep(0.01)
        mine = heartbeat.pulses(ranks).get(int(rank))
        if mine is not None and mine.process == os.getpid() and mine.step >= int(step):
            {"leave": lambda: os._exit(0), "abort": os.abort}[how]()

if "sft_recipes.training.main" in sys.orig_argv:
    if os.environ.get("RANK", "0") == os.environ.get("PLANTED", "-").split()[0]:
        threading.Thread(target=act, daemon=True).start()
"""


class Run:
    """A start of a run as a process, with what it says."""

    def __init__(self, workplace, name, *arguments, **variables):
        self.folder = RunDir(workplace.runs / name)
        self.said = workplace.path / f"{name}.txt"
        with self.said.open("w") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sft_recipes", "train", "tiny", "--name", name, *arguments],
                cwd=workplace.path, env=workplace.environment(OMP_NUM_THREADS="1", **variables), stdout=said,
                stderr=subprocess.STDOUT,
            )  # fmt: skip

    def at(self, step, ranks):
        """The process ids of the ranks, once each has come to a step."""
        until = time.monotonic() + HANG_SECONDS
        while True:
            there = {
                rank: one.process
                for rank, one in heartbeat.pulses(self.folder.ranks).items()
                if one.step >= step and heartbeat.state(one.process)
            }
            if len(there) == ranks:
                return there
            assert self.process.poll() is None, self.said.read_text()
            assert time.monotonic() < until, "hangs"
            time.sleep(0.02)

    def launcher(self):
        """The process that started the ranks."""
        return launcher_of(self.folder.plan)

    def ends(self, code):
        """Waits for the end, which must leave no process; what was said."""
        self.process.wait(HANG_SECONDS)
        said = self.said.read_text()
        assert self.process.returncode == code, said
        left = [command for _, command in commands() if str(self.folder.plan).encode() in command]
        assert left == [], "a process of the run is left"
        return said

    def error(self, code):
        """The one line of what was wrong."""
        said = self.ends(code)
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        return line

    def stopped(self):
        """StopRequest to stop, it saved one step on all ranks and left with 75; the step."""
        said = self.ends(75)
        step = manifest(self.folder.path)["steps"]
        assert f"stopped at step {step}, saved" in said
        assert manifest(self.folder.path)["state"] == "stopped"
        assert self.folder.latest_complete() == step and not self.folder.final.exists()
        return step


@pytest.fixture(scope="module")
def start(shared_workplace, few_rows, tmp_path_factory):
    """Starts a run on few rows, with what is planted in its ranks."""
    planted = tmp_path_factory.mktemp("planted")
    (planted / "sitecustomize.py").write_text(PLANT)

    def begin(name, ranks, *more, plant="", **variables):
        words = ("--gpus", "0", "--processes", str(ranks), *SMALL)
        if plant:
            variables |= {"PLANTED": plant, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{planted}"}
        return Run(shared_workplace, name, *words, f"data.train={few_rows}", *more, **variables)

    return begin


def test_two_ranks_killed_asked_to_stop_and_halted_end_with_the_weights_of_an_uninterrupted_run(start):
    """Each engine, and each process that may be asked: tests/strategies/test_trajectories.py; every fault: `make chaos`."""
    straight = start("straight-2", 2)
    straight.ends(0)

    run = start("interrupted-2", 2)
    os.kill(run.at(10, 2)[1], signal.SIGKILL)
    line = run.error(1)
    assert "rank 1 on " in line and "was ended by SIGKILL in step " in line and "out-of-memory killer" in line
    assert manifest(run.folder.path)["state"] == "failed"

    run = start("interrupted-2", 2)
    there = run.at(10, 2)
    os.kill(there[0], signal.SIGUSR1)
    time.sleep(0.13)
    for rank in (1, 1):  # once more in the grace, which changes nothing
        os.kill(there[rank], signal.SIGTERM) if heartbeat.state(there[rank]) else None
    stopped = run.stopped()

    run = start("interrupted-2", 2, "monitor.heartbeat_timeout_seconds=5")
    os.kill(run.at(stopped + 2, 2)[1], signal.SIGSTOP)
    line = run.error(1)
    assert "rank 1 on " in line and "hangs in step " in line and "it is stopped by a signal" in line
    assert "rank 0" not in line
    (written,) = run.folder.stack_traces.glob("*-0.txt")
    assert "most recent call first" in written.read_text() and str(run.folder.stack_traces) in line

    start("interrupted-2", 2).ends(0)
    ours, theirs = (load_file(one.folder.last / "model.safetensors") for one in (run, straight))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not run.folder.stack_traces.exists(), "of an earlier start"


def test_three_starts_without_progress_are_the_last_until_the_user_insists(start):
    """One rank each time, and each time another fault: none of them may end with 0."""
    run = start("poisoned", 1, plant="0 3 leave")
    line = run.error(1)
    assert "rank 0 on " in line and "left with exit code 0 in step " in line
    assert manifest(run.folder.path)["starts_without_progress"] == {"step": 0, "count": 1}

    run = start("poisoned", 1)
    run.at(3, 1)
    os.kill(run.launcher(), signal.SIGKILL)
    assert "launcher on " in run.error(1)

    run = start("poisoned", 1)
    os.kill(run.at(3, 1)[0], signal.SIGSTOP)  # so that it does not save
    for _ in range(2):
        run.process.send_signal(signal.SIGINT)
        time.sleep(1)
    assert "stopped before a new checkpoint was whole" in run.ends(75), "the second Ctrl-C ends all at once"
    assert manifest(run.folder.path)["starts_without_progress"]["count"] == 2, "asked to stop is no fault"

    run = start("poisoned", 1, plant="0 3 abort")
    line = run.error(4)
    assert "3 starts in a row have come no further than its beginning" in line and "was ended by SIGABRT" in line
    assert "RESUME=1" in line

    line = start("poisoned", 1).error(4)
    assert "3 starts in a row" in line and "was ended by SIGABRT" in line

    run = start("poisoned", 1, "--resume")
    run.at(3, 1)
    os.kill(run.launcher(), signal.SIGTERM)
    assert run.stopped() > 0


def test_a_stop_that_is_asked_for_before_there_is_a_step_ends_all_at_once(start):
    run = start("early", 2)
    run.at(0, 2)
    run.process.send_signal(signal.SIGTERM)
    assert "stopped before a new checkpoint was whole" in run.ends(75)
    assert run.folder.numbered("checkpoint") == [] and not run.folder.final.exists()


LIMITS = Limits(hang=10.0, save=100.0)


def seen(rank=0, step=5, doing="step", moves=3, still=0.0, longest=0.0, state="S", alive=0.0, failed_at=None):
    at = Heartbeat(rank, 1000 + rank, step, doing, moves, 0.0, longest)
    failure = None if failed_at is None else Failure(rank, 1000 + rank, step, "ValueError", "odd", failed_at, False)
    return RankStatus(at, state, still, alive, failure)


@pytest.mark.parametrize(
    ("doing", "longest", "seconds"),
    [
        ("step", 0.0, 10.0),
        ("step", 7.0, 35.0),
        ("evaluating", 7.0, 35.0),
        ("waiting", 1.0, 10.0),
        ("saving", 7.0, 110.0),
        ("starting", 7.0, timeouts.MODEL_LOADING + 2 * 100),
        ("ending", 0.0, timeouts.MODEL_LOADING + 2 * 100),
    ],
)
def test_a_rank_may_stay_where_it_is_for_as_long_as_that_takes_here(doing, longest, seconds):
    assert watchdog.limit(seen(doing=doing).pulse, longest, LIMITS) == seconds


HANGS = {
    "nobody": ([seen(0, still=9), seen(1, still=9)], []),
    "one that the others do not wait for yet": ([seen(0, still=11), seen(1, step=6, still=1)], []),
    "one stopped from outside": ([seen(0, still=11), seen(1, still=11, state="T")], [1]),
    "one that is a step behind": ([seen(0, step=6, still=11), seen(1, step=5, still=11)], [1]),
    "one that has made fewer moves": ([seen(0, moves=4, still=11), seen(1, moves=3, still=11)], [1]),
    "one for which the other waits": ([seen(0, moves=2, doing="waiting", still=11), seen(1, moves=3, still=11)], [1]),
    "all of them, where none stands out": ([seen(0, still=11), seen(1, still=11)], [0, 1]),
    "all of them, where each waits": ([seen(n, doing="waiting", still=11) for n in (0, 1)], [0, 1]),
    "nobody, while one saves": ([seen(0, doing="saving", still=60), seen(1, doing="waiting", still=60)], []),
    "one that saves too long": ([seen(0, doing="saving", still=111), seen(1, doing="waiting", still=111)], [0]),
    "nobody, where steps are slow": ([seen(0, still=11, longest=4.0), seen(1, still=11)], []),
}  # fmt: skip


@pytest.mark.parametrize("case", HANGS)
def test_of_ranks_that_hang_those_are_named_that_the_others_wait_for(case):
    ranks, wanted = HANGS[case]
    found = [one.pulse.rank for one in watchdog.culprits(ranks)] if watchdog.hangs(ranks, LIMITS) else []
    assert found == wanted


def test_a_rank_that_waits_for_others_is_known_by_its_stacks():
    """As faulthandler writes them; the main thread gets the signal."""
    other = 'Thread 0x1 (most recent call first):\n  File "threading.py", line 1 in wait\n\n'
    waits = 'Current thread 0x2 (most recent call first):\n  File "torch/distributed/distributed_c10d.py", line 7 in barrier\n'
    works = 'Current thread 0x2 (most recent call first):\n  File "fetch.py", line 7 in fetch\n'
    assert watchdog.waits_for_others(other + waits) and not watchdog.waits_for_others(other + works)
    assert not watchdog.waits_for_others(waits.replace("Current thread", "Thread") + "\n" + works)


def test_the_rank_that_ended_first_is_named_and_not_the_one_that_lost_its_peer():
    killed, lost_its_peer = seen(1, state="", alive=10.0), seen(0, failed_at=10.1)
    assert watchdog.first_to_end([lost_its_peer, killed]) is killed
    failed, followed = seen(1, failed_at=10.0), seen(0, failed_at=10.3)
    assert watchdog.first_to_end([followed, failed]) is failed
    assert "rank 1 on " in (line := watchdog.death_line(failed, 1)) and "in step 5: ValueError: odd" in line
    assert "left with exit code 0 in step 5, not at its end" in watchdog.death_line(killed, 0)
    assert "was ended by SIGSEGV in step 5" in watchdog.death_line(killed, -11)


@pytest.mark.parametrize(
    ("codes", "code", "said"),
    [
        ({0: -15, 1: -9}, 1, "rank 1 on .* was ended by SIGKILL.* before it had begun"),
        ({0: 1, 1: -15}, 1, "rank 0 on .* left with exit code 1 before it had begun"),
        ({0: -15, 1: -15}, 75, None),
    ],
)
def test_of_ranks_that_ended_before_they_heard_signals_the_one_that_nobody_asked_is_named(tmp_path, codes, code, said):
    folder = RunDir(tmp_path)
    plan = plans.make(loader.load("tiny"), plans.Topology(gpus=0, processes=2))
    heartbeat.leave_exit_codes(folder.ranks, codes)
    ended = watchdog.Watchdog(folder, plan, 0.0).ended(1, False)
    assert ended.code == code and re.search(said or "^None$", str(ended.fault))


def test_a_data_workers_own_error_is_what_is_said(tmp_path, monkeypatch):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            raise ValueError(f"row {index} is odd")

    folder = RunDir(tmp_path)
    monkeypatch.setattr(rank_heartbeat, "_pen", None)
    rank_heartbeat.begin(folder, 3)
    rank_heartbeat.moved(7, "step")
    with pytest.raises(ValueError, match="row 0 is odd"), rank_heartbeat.until_it_ends():
        next(iter(torch.utils.data.DataLoader(Rows(), num_workers=1)))
    found = heartbeat.failures(folder.ranks)[3]
    assert (found.kind, found.step, found.by_user) == ("ValueError", 7, False)
    assert found.said == "Caught ValueError in DataLoader worker process 0. ValueError: row 0 is odd"


_WORKERS = """
import multiprocessing, os, signal, subprocess, time, torch
from sft_recipes.training import stop_signal

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return os.getpid()

stop_signal.listen()
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


def test_a_data_worker_is_ended_by_its_rank_and_by_nobody_else():
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
def test_a_command_that_slurm_ends_beside_its_parent_was_asked_to_stop(number):
    command_itself = ["bash", "-c", f"kill -{number} $$"]
    assert process_group.run(command_itself, os.environ, process_group.StopRequest()) == watchdog.Ended(
        run_dir.EXIT_STOPPED
    )
    its_child = ["bash", "-c", f"kill -{number} $PPID; exit 1"]
    with process_group.listening() as asked:
        assert process_group.run(its_child, os.environ, asked) == watchdog.Ended(run_dir.EXIT_STOPPED)


def test_a_pulse_is_written_over_in_place_and_taken_away_at_a_good_end(tmp_path, monkeypatch):
    folder = RunDir(tmp_path)
    monkeypatch.setattr(rank_heartbeat, "_pen", None)
    rank_heartbeat.moved(1, "step")  # nobody watches
    rank_heartbeat.begin(folder, 0)
    assert heartbeat.pulses(folder.ranks)[0].doing == "starting"
    for _ in range(3):
        rank_heartbeat.moved(123_456_789, "evaluating")
    now = heartbeat.pulses(folder.ranks)[0]
    assert (now.process, now.step, now.doing, now.moves) == (os.getpid(), 123_456_789, "evaluating", 2)
    assert 0 <= now.longest < HANG_SECONDS
    with rank_heartbeat.until_it_ends():
        pass
    assert heartbeat.pulses(folder.ranks) == {} and list(folder.stack_traces.iterdir()) == []


def test_a_run_whose_ranks_outlived_their_parent_is_not_started_beside_them(tmp_path, monkeypatch):
    monkeypatch.setattr(timeouts, "EARLIER_RANKS_EXIT", 0.5)
    folder = RunDir(tmp_path / "run")
    folder.ranks.mkdir(parents=True)
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", str(folder.plan)])
    try:
        while not Path(f"/proc/{left.pid}/cmdline").read_bytes():  # the system has not laid out its arguments yet
            time.sleep(0.01)
        at = Heartbeat(1, left.pid, 5, "step", 0, 0.0, 0.0)
        heartbeat.place(folder.ranks, 1).write_bytes(heartbeat.to_bytes(at))
        with pytest.raises(UserError, match=f"rank 1 of an earlier start of run is still there .process {left.pid}"):
            run_lock.held(folder).__enter__()
    finally:
        left.kill()
        left.wait()
    with run_lock.held(folder):
        heartbeat.place(folder.ranks, 1).write_bytes(heartbeat.to_bytes(dataclasses.replace(at, process=os.getpid())))
    with run_lock.held(folder):
        pass  # this process got the id since


def test_a_stop_that_was_asked_for_between_two_commands_is_heard(tmp_path):
    with process_group.listening() as asked:
        os.kill(os.getpid(), signal.SIGUSR1)
        touched = tmp_path / "touched"
        ended = process_group.run([shutil.which("touch"), str(touched)], os.environ, asked)
    assert ended.code == 75 and not touched.exists()


def test_torchs_agent_would_wait_half_a_minute_for_ranks_whose_peer_is_gone():
    """Why training/rank_launcher.py changes a default of it; fails when that is another one."""
    from torch.distributed.elastic.multiprocessing.api import PContext

    names = PContext.close.__code__.co_varnames[: PContext.close.__code__.co_argcount]
    assert names == ("self", "death_sig", "timeout") and PContext.close.__defaults__ == (None, 30)


def test_a_build_that_was_killed_blocks_nobody(tmp_path):
    """DeepSpeed compiles at a first start; torch's own lock is a file that a killed builder leaves behind."""
    killed = subprocess.run(
        [sys.executable, "-c", "import os, signal, sys\n"
         "from sft_recipes.training.deepspeed_ops import HeldByTheKernel\n"
         "assert HeldByTheKernel(sys.argv[1]).try_acquire()\n"
         "os.kill(os.getpid(), signal.SIGKILL)", str(tmp_path / "lock")],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL
    mine, others = HeldByTheKernel(str(tmp_path / "lock")), HeldByTheKernel(str(tmp_path / "lock"))
    assert mine.try_acquire() and not others.try_acquire()
    mine.release()
    others.wait()


def test_torchs_own_lock_would_still_be_left_behind():
    """Why training/deepspeed_ops.py is there; fails when torch's is the kernel's too."""
    from torch.utils import cpp_extension

    assert "FileBaton(" in inspect.getsource(cpp_extension._jit_compile)
    assert "O_EXCL" in inspect.getsource(cpp_extension.FileBaton.try_acquire)


def test_a_launcher_is_given_the_time_that_a_large_save_needs(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    plan = plans.make(loader.load("70b"), plans.Topology(gpus=32, processes=32, nodes=4, gpu_type="h100-80g"))
    by_a_slow_disk = plan.checkpoint_bytes / 4 / 500_000_000
    assert save_time.seconds_at_most(plan) == by_a_slow_disk > 120
    assert "assumed until a sanity run measures it" in save_time.said(plan)
    save_time.remember(2_000_000, 1.0, "2026-01-01")
    assert save_time.seconds_at_most(plan) == by_a_slow_disk, "so small a save says nothing of so large a one"
    save_time.remember(plan.checkpoint_bytes // 100, 10.0, "2026-01-02")
    assert save_time.seconds(plan) == pytest.approx(
        1000
    ) and "measured by the sanity run of 2026-01-02" in save_time.said(plan)
    assert save_time.seconds_at_most(plan) == pytest.approx(3000)
    given = command.environment(plan, {})
    assert float(given["PET_SHUTDOWN_TIMEOUT"]) >= 3000
    tiny = plans.make(loader.load("tiny"), plans.Topology(gpus=0, processes=1))
    assert command.environment(tiny, {})["PET_SHUTDOWN_TIMEOUT"] == "120"
    assert not any(number.name in given["PET_SIGNALS_TO_HANDLE"] for number in heartbeat.ASKING)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_ranks_on_gpus_get_expandable_segments_unless_the_user_chose(name):
    plan = plans.make(loader.load("8b"), plans.Topology(gpus=8, processes=8, gpu_type="h100-80g"))
    assert command.environment(plan, {})["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    chosen = command.environment(plan, {name: "max_split_size_mb:128"})
    assert {key: value for key, value in chosen.items() if "ALLOC_CONF" in key} == {name: "max_split_size_mb:128"}
    tiny = plans.make(loader.load("tiny"), plans.Topology(gpus=0, processes=1))
    assert "PYTORCH_ALLOC_CONF" not in command.environment(tiny, {})


def test_a_newer_checkpoint_begins_the_count_of_starts_anew(tmp_path):
    folder = RunDir(tmp_path)
    plan = plans.make(loader.load("tiny"), plans.Topology(gpus=0, processes=1))
    again = Start(folder, plan, goes_on=True)
    for _ in range(3):
        assert attempts.refusal(again) is None
        attempts.count(folder)
    assert "3 starts in a row have come no further than its beginning" in attempts.refusal(again)
    assert attempts.refusal(dataclasses.replace(again, insisted=True)) is None
    run_dir.write_json(folder.manifest, {
        **manifest(tmp_path), "diverged": {"step": 7, "rows": ["a.jsonl:3"]}
    })  # fmt: skip
    assert "diverged at step 7, rows a.jsonl:3" in attempts.refusal(again)
    folder.checkpoint(8).mkdir()
    assert "3 starts in a row" in attempts.refusal(again), "it is not whole"
    run_dir.write_json(folder.checkpoint(8) / "complete.json", {"step": 8})
    assert attempts.refusal(again) is None
    attempts.count(folder)
    assert manifest(tmp_path)["starts_without_progress"] == {"step": 8, "count": 1}


@pytest.mark.parametrize(
    ("chosen", "spins"), [({}, "2000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)]
)
def test_openmp_threads_spin_for_a_bounded_time_unless_the_user_chose(chosen, spins):
    """What the command line and every process that it starts see; without a bound, training next to one busy process on
    2 cores hardly moves (benchmarks/threads.py)."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_WAIT"))}
    code = "import os; from sft_recipes import cli; cli.main(['recipes']); print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**kept, **chosen}, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == str(spins)
