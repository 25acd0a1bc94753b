"""The faults by number: what is done to a real run, under the strategy that it affects most, and the required result.

`run_fault` injects a fault, resumes the run and compares it with an uninterrupted one. helpers/chaos_coverage.py lists
the faults that other tests cover, and those that are not covered.
"""

from __future__ import annotations

import errno
import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from chaos.harness import HANG_SECONDS, Chaos, Result, kill, state_of

STEPS = ("trainer.max_steps=40", "trainer.save_steps=4", "trainer.eval_steps=20")
SELDOM = ("trainer.max_steps=40", "trainer.save_steps=8", "trainer.eval_steps=20")
STAIRS = ("trainer.max_steps=180", "trainer.save_steps=1", "trainer.eval_steps=180")


@dataclass(frozen=True)
class Fault:
    """One fault; `inject` starts a run, injects the fault and returns its starts, of which the last may have finished."""

    number: str
    what: str
    setup: str
    inject: Callable[[Chaos, str, str], list[Result]]
    arguments: tuple[str, ...] = STEPS


@dataclass(frozen=True)
class FaultResult:
    """The result of a fault: exit codes of the starts, the step the last one resumed from, differences at the end."""

    number: str
    what: str
    setup: str
    codes: list[int]
    resumed_from: int
    differences: list[str]


def run_fault(chaos: Chaos, fault: Fault) -> FaultResult:
    """Inject a fault, resume, and compare the end with the uninterrupted run."""
    name = "-".join(re.findall(r"[\w.]+", f"{fault.number} {fault.setup} {fault.what}"))[:80]
    reference = chaos.uninterrupted(fault.setup, *fault.arguments)
    results = fault.inject(chaos, name, fault.setup)
    if results[-1].code != 0:
        results.append(chaos.run_to_end(name, fault.setup, "--resume", *fault.arguments))
    differences = state_of(chaos.run(name)).differences_at_the_end(reference)
    return FaultResult(
        fault.number,
        fault.what,
        fault.setup,
        [result.code for result in results],
        results[-1].resumed_from(),
        differences,
    )


def send_signal(
    number: int, *ranks: int, step: int = 10, apart: float = 0.0, code: int = 1
) -> Callable[..., list[Result]]:
    """Send a signal to ranks after a step, `apart` seconds apart; without ranks, to the node launcher."""

    def inject(chaos: Chaos, name: str, setup: str) -> list[Result]:
        process = chaos.start(name, setup, *STEPS)
        chaos.wait_for_step(name, process, step)
        of_rank = chaos.ranks(name)
        launcher = next(pid for pid in chaos.processes(name) if pid not in of_rank.values())
        for pid in [of_rank[rank] for rank in ranks] or [launcher]:
            kill(pid, number)
            time.sleep(apart)
        result = chaos.wait_for_exit(name, process)
        assert result.code == code, (result.code, result.output)
        return [result]

    return inject


def expect_output(inject: Callable[..., list[Result]], *expected: str) -> Callable[..., list[Result]]:
    """Require these words in the output of the first start."""

    def checked(chaos: Chaos, name: str, setup: str) -> list[Result]:
        results = inject(chaos, name, setup)
        missing = [word for word in expected if word not in results[0].output]
        assert not missing, f"{missing} missing: {results[0].output}"
        return results

    return checked


def stopped_rank(chaos: Chaos, name: str, setup: str) -> list[Result]:
    """SIGSTOP: the rank is alive and makes no progress."""
    process = chaos.start(name, setup, "monitor.heartbeat_timeout_seconds=5", *STEPS)
    chaos.wait_for_step(name, process, 10)
    kill(chaos.ranks(name)[1], signal.SIGSTOP)
    result = chaos.wait_for_exit(name, process)
    assert result.code == 1 and "rank 1" in result.output and "step" in result.output, result.output
    return [result]


def three_starts(chaos: Chaos, name: str, setup: str) -> list[Result]:
    """The same rank dies before the first checkpoint each time; the third attempt is the last."""
    results = []
    for _ in range(3):
        process = chaos.start(name, setup, *STEPS)
        chaos.wait_for(name, process, lambda: chaos.ranks(name))
        kill(chaos.ranks(name)[0])
        results.append(chaos.wait_for_exit(name, process))
    assert [result.code for result in results] == [1, 1, 4], [result.output for result in results]
    results.append(chaos.wait_for_exit(name, chaos.start(name, setup, *STEPS)))
    assert results[-1].code == 4
    return results


def wrong_setting(chaos: Chaos, name: str, setup: str) -> list[Result]:
    """A user error; nothing is started."""
    result = chaos.wait_for_exit(name, chaos.start(name, setup, "trainer.learning_rate=-1", *STEPS))
    assert result.code == 2 and not chaos.run(name).exists(), result.output
    return [result, chaos.run_to_end(name, setup, *STEPS)]


def stop_while_loading(chaos: Chaos, name: str, setup: str) -> list[Result]:
    """SIGTERM to the command before the first step."""
    process = chaos.start(name, setup, *STEPS)
    chaos.wait_for(name, process, lambda: chaos.ranks(name))
    kill(process.pid, signal.SIGTERM)
    result = chaos.wait_for_exit(name, process)
    assert result.code == 75 and not state_of(chaos.run(name)).losses, (result.code, result.output)
    return [result]


def stop_while_saving(chaos: Chaos, name: str, setup: str) -> list[Result]:
    """SIGTERM to the command while files are written, three times."""
    process = chaos.start(name, setup, *STEPS)
    chaos.wait_for(name, process, lambda: list(chaos.run(name).glob(".saving/checkpoint-*")))
    for _ in range(3):
        kill(process.pid, signal.SIGTERM)
        time.sleep(0.05)
    result = chaos.wait_for_exit(name, process)
    assert result.code == 75, (result.code, result.output)
    return [result]


def too_little_time(chaos: Chaos, name: str, setup: str) -> list[Result]:
    """SIGTERM, then SIGKILL to all once the save has begun, as a scheduler with a short grace period does."""
    process = chaos.start(name, setup, *SELDOM)
    chaos.wait_for_step(name, process, 8)
    chaos.wait_for(name, process, (chaos.run(name) / "checkpoint-8").is_dir)
    kill(process.pid, signal.SIGTERM)
    chaos.wait_for(name, process, lambda: list(chaos.run(name).glob(".saving/checkpoint-*")))
    for pid in [process.pid, *chaos.processes(name)]:
        kill(pid)
    return [chaos.wait_for_exit(name, process)]


def leftover_partial(chaos: Chaos, name: str, setup: str) -> list[Result]:
    """A partial directory of the step that is saved next."""
    results = send_signal(signal.SIGKILL, 0, step=9)(chaos, name, setup)
    partial = chaos.run(name) / ".saving" / "checkpoint-12"
    partial.mkdir(parents=True, exist_ok=True)
    (partial / "optimizer.pt").write_bytes(b"half")
    (partial / "stranger.bin").write_bytes(b"from another save")
    return results


def second_start(chaos: Chaos, name: str, setup: str) -> list[Result]:
    """A second start of a live run is rejected; then the first is killed, and its lock does not block the next."""
    first = chaos.start(name, setup, *STEPS)
    chaos.wait_for_step(name, first, 4)
    second = subprocess.run(
        chaos.command(name, setup, STEPS), env=chaos.environment(), capture_output=True, text=True, check=False,
        timeout=HANG_SECONDS,
    )  # fmt: skip
    assert second.returncode == 2 and f"process {first.pid} on" in second.stderr, second.stderr
    kill(first.pid)
    return [chaos.wait_for_exit(name, first)]


def corrupt_checkpoint(corrupt: Callable[[Path], None], *output: str) -> Callable[..., list[Result]]:
    """Corrupt the latest checkpoint between two starts: it must be skipped by name, and the older one used."""

    def inject(chaos: Chaos, name: str, setup: str) -> list[Result]:
        results = send_signal(signal.SIGKILL, 0, step=14)(chaos, name, setup)
        newest = max(state_of(chaos.run(name)).checkpoints)
        corrupt(chaos.run(name) / f"checkpoint-{newest}")
        results.append(chaos.run_to_end(name, setup, "--resume", *STEPS))
        assert f"skipping checkpoint-{newest}: " in results[-1].output, results[-1].output
        assert all(word in results[-1].output for word in output), results[-1].output
        assert results[-1].resumed_from() < newest
        return results

    return inject


def other_versions(chaos: Chaos, name: str, setup: str) -> list[Result]:
    """Another torch version than at the last start: rejected with --strict-versions, else reported."""
    results = send_signal(signal.SIGKILL, 0)(chaos, name, setup)
    path = chaos.run(name) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["starts"][-1]["versions"]["torch"] = "2.12.0"
    path.write_text(json.dumps(manifest))
    results.append(chaos.wait_for_exit(name, chaos.start(name, setup, "--strict-versions", *STEPS)))
    assert results[-1].code == 2 and "torch 2.12.0 -> " in results[-1].output, results[-1].output
    results.append(chaos.run_to_end(name, setup, *STEPS))
    assert "library versions changed since the last attempt: torch 2.12.0 -> " in results[-1].output
    return results


def another_plan(chaos: Chaos, name: str, setup: str) -> list[Result]:
    """Each changed field is rejected, with its old and new value."""
    results = send_signal(signal.SIGKILL, 0)(chaos, name, setup)
    changes = {
        "batch.effective_batch_size=8": "effective_batch_size 4 -> 8",
        "trainer.max_length=256": "max_length 512 -> 256",
        "trainer.learning_rate=1.0e-4": "learning_rate 0.002 -> 0.0001",
        "trainer.data_seed=7": "data_seed",
    }
    for change, output in changes.items():
        results.append(chaos.wait_for_exit(name, chaos.start(name, setup, *STEPS, change)))
        assert results[-1].code == 2 and output in results[-1].output, results[-1].output
    rows = chaos.data.read_text()
    chaos.data.write_text(rows.replace("?", "!"))
    try:
        results.append(chaos.wait_for_exit(name, chaos.start(name, setup, *STEPS)))
    finally:
        chaos.data.write_text(rows)
    assert results[-1].code == 2 and "data_fingerprint" in results[-1].output, results[-1].output
    return results


def stairs(rank: int, *errors: int) -> Callable[..., list[Result]]:
    """The j-th file operation of a save fails in the save of step 2j + 1, for every j; the steps between are saved."""

    def inject(chaos: Chaos, name: str, setup: str) -> list[Result]:
        listed = ",".join(map(str, errors))
        result = chaos.run_to_end(name, setup, *STAIRS, **chaos.with_faults(name, setup, rank, stairs=listed))
        failed = [operation for operation in chaos.operations(name) if operation[3]]
        fewest = 15 if rank else 20  # a second rank writes only its own files
        assert len(failed) > fewest and result.output.count("was not saved: ") > fewest, (
            len(failed),
            result.output[-2000:],
        )
        steps = {int(match[1]) for failure in failed if (match := re.search(r"checkpoint-(\d+)", failure[2]))}
        assert max(steps) < max(state_of(chaos.run(name)).losses) - 2, (
            "a save has more operations than were made to fail"
        )
        assert not list(chaos.run(name).glob(".saving/*")), "a partial directory remains"
        return [result]

    return inject


def nothing_removed(chaos: Chaos, name: str, setup: str) -> list[Result]:
    """Older checkpoints cannot be removed: reported, and training continues; after a kill it restarts."""
    faults = chaos.with_faults(name, setup, 0, fail_in=".removing", errno=errno.EPERM)
    process = chaos.start(name, setup, *STEPS, **faults)
    chaos.wait_for_step(name, process, 14)
    kill(chaos.ranks(name)[0])
    results = [chaos.wait_for_exit(name, process), chaos.run_to_end(name, setup, "--resume", *STEPS, **faults)]
    assert all("could not be removed (Operation not permitted)" in result.output for result in results), results
    assert len(list(chaos.run(name).glob("checkpoint-*"))) > 2
    return results


def workers(chaos: Chaos, name: str, setup: str) -> list[Result]:
    """Two data workers per rank, killed in between: the same rows as without."""
    process = chaos.start(name, setup, *STEPS, "trainer.dataloader_num_workers=2")
    chaos.wait_for_step(name, process, 10)
    kill(chaos.ranks(name)[0])
    results = [chaos.wait_for_exit(name, process)]
    results.append(chaos.run_to_end(name, setup, "--resume", *STEPS, "trainer.dataloader_num_workers=2"))
    return results


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _optimizer_of_rank_1(checkpoint: Path) -> Path:
    return next(checkpoint.glob("global_step*/zero_pp_rank_1_mp_rank_00_optim_states.pt"))


FAULTS = [
    Fault("1", "SIGKILL of rank 1", "ddp", expect_output(send_signal(signal.SIGKILL, 1), "rank 1")),
    Fault("2", "SIGKILL of rank 0", "zero2", expect_output(send_signal(signal.SIGKILL, 0), "rank 0")),
    Fault("3", "SIGKILL of the node launcher", "zero3", send_signal(signal.SIGKILL)),
    Fault("4", "SIGSTOP of rank 1", "zero3", stopped_rank),
    Fault("6", "SIGABRT of rank 1", "ddp", expect_output(send_signal(signal.SIGABRT, 1), "rank 1")),
    Fault("6", "SIGSEGV of rank 0", "ddp", expect_output(send_signal(signal.SIGSEGV, 0), "rank 0")),
    Fault("8", "three attempts without progress", "single", three_starts),
    Fault("9", "a wrong setting", "single", wrong_setting),
    Fault("10", "SIGTERM to rank 1 alone", "zero2", send_signal(signal.SIGTERM, 1, code=75)),
    Fault("10", "SIGTERM to both ranks, 0.13 s apart", "zero3", send_signal(signal.SIGTERM, 0, 1, apart=0.13, code=75)),
    Fault("10", "SIGUSR1 to the node launcher", "ddp", send_signal(signal.SIGUSR1, code=75)),
    Fault("10", "SIGTERM to the launcher of a single process", "single", send_signal(signal.SIGTERM, code=75)),
    Fault("11", "SIGTERM while the model is loading", "ddp", stop_while_loading),
    Fault("12, 13", "SIGTERM in a save, three times", "zero2", stop_while_saving),
    Fault("15", "SIGTERM and then too little time to save", "zero2", too_little_time, SELDOM),
    Fault("18, 19", "each file operation of a save fails in turn: ENOSPC, EIO, EACCES, EROFS, EDQUOT", "single",
          stairs(0, errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EDQUOT), STAIRS),
    Fault("18, 20", "each file operation of rank 1 in a save fails in turn: ENOSPC", "zero3",
          stairs(1, errno.ENOSPC), STAIRS),
    Fault("18, 20", "each file operation of rank 0 in a save fails in turn: ENOSPC", "zero2",
          stairs(0, errno.ENOSPC), STAIRS),
    Fault("21", "the file that names DeepSpeed's latest state is empty", "zero2",
          corrupt_checkpoint(lambda at: (at / "latest").write_text(""), "size mismatch in latest: found 0 bytes")),
    Fault("23", "a leftover partial directory of the step that is saved next", "zero3", leftover_partial),
    Fault("26", "nothing can be removed: EPERM", "single", nothing_removed),
    Fault("27", "a second start on the same run, and a stale lock", "ddp", second_start),
    Fault("28", "one bit of the optimizer state of rank 1", "zero3",
          corrupt_checkpoint(lambda at: flip(_optimizer_of_rank_1(at)), "checksum mismatch")),
    Fault("30", "the random state of rank 1 is missing", "ddp",
          corrupt_checkpoint(lambda at: (at / "rng_state_1.pth").unlink(), "rng_state_1.pth is missing")),
    Fault("31", "the optimizer state of rank 1 is missing", "zero2",
          corrupt_checkpoint(lambda at: _optimizer_of_rank_1(at).unlink(), "optim_states.pt is missing")),
    Fault("31", "the scheduler is missing", "single",
          corrupt_checkpoint(lambda at: (at / "scheduler.pt").unlink(), "scheduler.pt is missing")),
    Fault("36", "batch, length, rate, seed, data changed", "single", another_plan),
    Fault("37", "other library versions", "single", other_versions),
    Fault("39", "two data workers, packed rows, a kill in between", "ddp", workers),
]  # fmt: skip
