"""The faults by their number: what is done to a real run, under the engine where it bites hardest, and what must come of it.

One loop injects, goes on and compares (`tried`); what another test of this repository holds is listed with its name, and
what does not apply with the reason.
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
    """One fault; `inject` harms a run and returns its starts, of which the last may have come to the end."""

    number: str
    what: str
    engine: str
    inject: Callable[[Chaos, str, str], list[Result]]
    words: tuple[str, ...] = STEPS


@dataclass(frozen=True)
class Tried:
    """What came of a fault: exit codes of its starts, where the last went on from, and what differs at the end."""

    number: str
    what: str
    engine: str
    codes: list[int]
    resumed_from: int
    differences: list[str]


def tried(chaos: Chaos, fault: Fault) -> Tried:
    """Injects a fault, goes on, and compares the end with the uninterrupted run's."""
    name = "-".join(re.findall(r"[\w.]+", f"{fault.number} {fault.engine} {fault.what}"))[:80]
    whole = chaos.uninterrupted(fault.engine, *fault.words)
    results = fault.inject(chaos, name, fault.engine)
    if results[-1].code != 0:
        results.append(chaos.complete(name, fault.engine, "--resume", *fault.words))
    differences = state_of(chaos.run(name)).differences_at_the_end(whole)
    return Tried(
        fault.number, fault.what, fault.engine, [one.code for one in results], results[-1].resumed_from(), differences
    )


def struck(number: int, *ranks: int, step: int = 10, apart: float = 0.0, code: int = 1) -> Callable[..., list[Result]]:
    """A signal to ranks, so far apart, behind a step; no rank: to the launcher below the parent."""

    def inject(chaos: Chaos, name: str, engine: str) -> list[Result]:
        process = chaos.start(name, engine, *STEPS)
        chaos.wait_for_step(name, process, step)
        of_rank = chaos.ranks(name)
        launcher = next(pid for pid in chaos.processes(name) if pid not in of_rank.values())
        for pid in [of_rank[rank] for rank in ranks] or [launcher]:
            kill(pid, number)
            time.sleep(apart)
        result = chaos.ended(name, process)
        assert result.code == code, (result.code, result.said)
        return [result]

    return inject


def named(inject: Callable[..., list[Result]], *words: str) -> Callable[..., list[Result]]:
    """The start must have said these words."""

    def injected(chaos: Chaos, name: str, engine: str) -> list[Result]:
        results = inject(chaos, name, engine)
        missing = [word for word in words if word not in results[0].said]
        assert not missing, f"{missing} not said: {results[0].said}"
        return results

    return injected


def stopped_rank(chaos: Chaos, name: str, engine: str) -> list[Result]:
    """SIGSTOP: the rank lives and does not move."""
    process = chaos.start(name, engine, "monitor.heartbeat_timeout_seconds=5", *STEPS)
    chaos.wait_for_step(name, process, 10)
    kill(chaos.ranks(name)[1], signal.SIGSTOP)
    result = chaos.ended(name, process)
    assert result.code == 1 and "rank 1" in result.said and "step" in result.said, result.said
    return [result]


def three_starts(chaos: Chaos, name: str, engine: str) -> list[Result]:
    """The same rank dies before a first checkpoint, each time; the third is the last."""
    results = []
    for _ in range(3):
        process = chaos.start(name, engine, *STEPS)
        chaos.wait_for(name, process, lambda: chaos.ranks(name))
        kill(chaos.ranks(name)[0])
        results.append(chaos.ended(name, process))
    assert [one.code for one in results] == [1, 1, 4], [one.said for one in results]
    results.append(chaos.ended(name, chaos.start(name, engine, *STEPS)))
    assert results[-1].code == 4
    return results


def wrong_setting(chaos: Chaos, name: str, engine: str) -> list[Result]:
    """A user's error, and nothing begun."""
    result = chaos.ended(name, chaos.start(name, engine, "trainer.learning_rate=-1", *STEPS))
    assert result.code == 2 and not chaos.run(name).exists(), result.said
    return [result, chaos.complete(name, engine, *STEPS)]


def asked_while_loading(chaos: Chaos, name: str, engine: str) -> list[Result]:
    """SIGTERM to the parent before there is a step."""
    process = chaos.start(name, engine, *STEPS)
    chaos.wait_for(name, process, lambda: chaos.ranks(name))
    kill(process.pid, signal.SIGTERM)
    result = chaos.ended(name, process)
    assert result.code == 75 and not state_of(chaos.run(name)).losses, (result.code, result.said)
    return [result]


def asked_in_a_save(chaos: Chaos, name: str, engine: str) -> list[Result]:
    """SIGTERM to the parent while files are written, and again."""
    process = chaos.start(name, engine, *STEPS)
    chaos.wait_for(name, process, lambda: list(chaos.run(name).glob(".saving/checkpoint-*")))
    for _ in range(3):
        kill(process.pid, signal.SIGTERM)
        time.sleep(0.05)
    result = chaos.ended(name, process)
    assert result.code == 75, (result.code, result.said)
    return [result]


def too_little_time(chaos: Chaos, name: str, engine: str) -> list[Result]:
    """SIGTERM, and SIGKILL to all as soon as the save has begun, as a scheduler does whose grace is short."""
    process = chaos.start(name, engine, *SELDOM)
    chaos.wait_for_step(name, process, 8)
    chaos.wait_for(name, process, (chaos.run(name) / "checkpoint-8").is_dir)
    kill(process.pid, signal.SIGTERM)
    chaos.wait_for(name, process, lambda: list(chaos.run(name).glob(".saving/checkpoint-*")))
    for pid in [process.pid, *chaos.processes(name)]:
        kill(pid)
    return [chaos.ended(name, process)]


def left_over(chaos: Chaos, name: str, engine: str) -> list[Result]:
    """A half-written folder of the step that is saved next."""
    results = struck(signal.SIGKILL, 0, step=9)(chaos, name, engine)
    partial = chaos.run(name) / ".saving" / "checkpoint-12"
    partial.mkdir(parents=True, exist_ok=True)
    (partial / "optimizer.pt").write_bytes(b"half")
    (partial / "stranger.bin").write_bytes(b"of another save")
    return results


def two_on_one(chaos: Chaos, name: str, engine: str) -> list[Result]:
    """A second start of the same run while it is carried out; then the first is killed, and its lock is no hindrance."""
    first = chaos.start(name, engine, *STEPS)
    chaos.wait_for_step(name, first, 4)
    second = subprocess.run(
        chaos.command(name, engine, STEPS), env=chaos.environment(), capture_output=True, text=True, check=False,
        timeout=HANG_SECONDS,
    )  # fmt: skip
    assert second.returncode == 2 and f"process {first.pid} on" in second.stderr, second.stderr
    kill(first.pid)
    return [chaos.ended(name, first)]


def harmed_checkpoint(harm: Callable[[Path], None], *said: str) -> Callable[..., list[Result]]:
    """The newest checkpoint is harmed between two starts: it must be named, and the older one taken."""

    def inject(chaos: Chaos, name: str, engine: str) -> list[Result]:
        results = struck(signal.SIGKILL, 0, step=14)(chaos, name, engine)
        newest = max(state_of(chaos.run(name)).checkpoints)
        harm(chaos.run(name) / f"checkpoint-{newest}")
        results.append(chaos.complete(name, engine, "--resume", *STEPS))
        assert f"passing over checkpoint-{newest}: " in results[-1].said, results[-1].said
        assert all(word in results[-1].said for word in said), results[-1].said
        assert results[-1].resumed_from() < newest
        return results

    return inject


def other_versions(chaos: Chaos, name: str, engine: str) -> list[Result]:
    """Another torch than at the last start: refused where that was asked for, else said."""
    results = struck(signal.SIGKILL, 0)(chaos, name, engine)
    path = chaos.run(name) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["starts"][-1]["versions"]["torch"] = "2.12.0"
    path.write_text(json.dumps(manifest))
    results.append(chaos.ended(name, chaos.start(name, engine, "--strict-versions", *STEPS)))
    assert results[-1].code == 2 and "torch 2.12.0 -> " in results[-1].said, results[-1].said
    results.append(chaos.complete(name, engine, *STEPS))
    assert "other library versions than at the last start, recorded: torch 2.12.0 -> " in results[-1].said
    return results


def another_plan(chaos: Chaos, name: str, engine: str) -> list[Result]:
    """Each changed field is refused old -> new."""
    results = struck(signal.SIGKILL, 0)(chaos, name, engine)
    changes = {
        "batch.effective_batch_size=8": "effective_batch_size 4 -> 8",
        "trainer.max_length=256": "max_length 512 -> 256",
        "trainer.learning_rate=1.0e-4": "learning_rate 0.002 -> 0.0001",
        "trainer.data_seed=7": "data_seed",
    }
    for change, said in changes.items():
        results.append(chaos.ended(name, chaos.start(name, engine, *STEPS, change)))
        assert results[-1].code == 2 and said in results[-1].said, results[-1].said
    rows = chaos.data.read_text()
    chaos.data.write_text(rows.replace("?", "!"))
    try:
        results.append(chaos.ended(name, chaos.start(name, engine, *STEPS)))
    finally:
        chaos.data.write_text(rows)
    assert results[-1].code == 2 and "data_fingerprint" in results[-1].said, results[-1].said
    return results


def stairs(rank: int, *errors: int) -> Callable[..., list[Result]]:
    """The j-th file operation of a save fails in the save of step 2j + 1, for every j; the steps between are saved."""

    def inject(chaos: Chaos, name: str, engine: str) -> list[Result]:
        listed = ",".join(map(str, errors))
        result = chaos.complete(name, engine, *STAIRS, **chaos.harmed(name, engine, rank, stairs=listed))
        failed = [operation for operation in chaos.operations(name) if operation[3]]
        fewest = 15 if rank else 20  # a second rank writes its own files alone
        assert len(failed) > fewest and result.said.count("NOT SAVED: ") > fewest, (len(failed), result.said[-2000:])
        of_steps = {int(found[1]) for one in failed if (found := re.search(r"checkpoint-(\d+)", one[2]))}
        assert max(of_steps) < max(state_of(chaos.run(name)).losses) - 2, "a save does more than was made to fail"
        assert not list(chaos.run(name).glob(".saving/*")), "a partial folder was left"
        return [result]

    return inject


def nothing_removed(chaos: Chaos, name: str, engine: str) -> list[Result]:
    """Older checkpoints stay, which is said, and training goes on; killed, it starts again all the same."""
    harm = chaos.harmed(name, engine, 0, fail_in=".removing", errno=errno.EPERM)
    process = chaos.start(name, engine, *STEPS, **harm)
    chaos.wait_for_step(name, process, 14)
    kill(chaos.ranks(name)[0])
    results = [chaos.ended(name, process), chaos.complete(name, engine, "--resume", *STEPS, **harm)]
    assert all("could not be removed (Operation not permitted)" in one.said for one in results), results
    assert len(list(chaos.run(name).glob("checkpoint-*"))) > 2
    return results


def workers(chaos: Chaos, name: str, engine: str) -> list[Result]:
    """Two data workers a rank, killed in between: the same rows as without."""
    process = chaos.start(name, engine, *STEPS, "trainer.dataloader_num_workers=2")
    chaos.wait_for_step(name, process, 10)
    kill(chaos.ranks(name)[0])
    results = [chaos.ended(name, process)]
    results.append(chaos.complete(name, engine, "--resume", *STEPS, "trainer.dataloader_num_workers=2"))
    return results


def flip(path: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _optimizer_of_rank_1(checkpoint: Path) -> Path:
    return next(checkpoint.glob("global_step*/zero_pp_rank_1_mp_rank_00_optim_states.pt"))


FAULTS = [
    Fault("1", "SIGKILL of rank 1", "ddp", named(struck(signal.SIGKILL, 1), "rank 1")),
    Fault("2", "SIGKILL of rank 0", "zero2", named(struck(signal.SIGKILL, 0), "rank 0")),
    Fault("3", "SIGKILL of the launcher below the parent", "zero3", struck(signal.SIGKILL)),
    Fault("4", "SIGSTOP of rank 1", "zero3", stopped_rank),
    Fault("6", "SIGABRT of rank 1", "ddp", named(struck(signal.SIGABRT, 1), "rank 1")),
    Fault("6", "SIGSEGV of rank 0", "ddp", named(struck(signal.SIGSEGV, 0), "rank 0")),
    Fault("8", "three starts without progress", "single", three_starts),
    Fault("9", "a wrong setting", "single", wrong_setting),
    Fault("10", "SIGTERM to rank 1 alone", "zero2", struck(signal.SIGTERM, 1, code=75)),
    Fault("10", "SIGTERM to both ranks, 0.13 s apart", "zero3", struck(signal.SIGTERM, 0, 1, apart=0.13, code=75)),
    Fault("10", "SIGUSR1 to the launcher below the parent", "ddp", struck(signal.SIGUSR1, code=75)),
    Fault("10", "SIGTERM to the launcher of one process", "single", struck(signal.SIGTERM, code=75)),
    Fault("11", "SIGTERM while the model is loaded", "ddp", asked_while_loading),
    Fault("12, 13", "SIGTERM in a save, three times", "zero2", asked_in_a_save),
    Fault("15", "SIGTERM and then too little time to save", "zero2", too_little_time, SELDOM),
    Fault("18, 19", "each file operation of a save fails in turn: ENOSPC, EIO, EACCES, EROFS, EDQUOT", "single",
          stairs(0, errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EDQUOT), STAIRS),
    Fault("18, 20", "each file operation of rank 1 in a save fails in turn: ENOSPC", "zero3",
          stairs(1, errno.ENOSPC), STAIRS),
    Fault("18, 20", "each file operation of rank 0 in a save fails in turn: ENOSPC", "zero2",
          stairs(0, errno.ENOSPC), STAIRS),
    Fault("21", "the file that names DeepSpeed's newest state is empty", "zero2",
          harmed_checkpoint(lambda at: (at / "latest").write_text(""), "latest has 0 bytes")),
    Fault("23", "a left-over partial folder of the step that is saved next", "zero3", left_over),
    Fault("26", "nothing can be removed: EPERM", "single", nothing_removed),
    Fault("27", "a second start on the same run, and a stale lock", "ddp", two_on_one),
    Fault("28", "one bit of rank 1's optimizer state", "zero3",
          harmed_checkpoint(lambda at: flip(_optimizer_of_rank_1(at)), "does not match its checksum")),
    Fault("30", "rank 1's random numbers are missing", "ddp",
          harmed_checkpoint(lambda at: (at / "rng_state_1.pth").unlink(), "rng_state_1.pth is missing")),
    Fault("31", "rank 1's optimizer state is missing", "zero2",
          harmed_checkpoint(lambda at: _optimizer_of_rank_1(at).unlink(), "optim_states.pt is missing")),
    Fault("31", "the scheduler is missing", "single",
          harmed_checkpoint(lambda at: (at / "scheduler.pt").unlink(), "scheduler.pt is missing")),
    Fault("36", "batch, length, rate, seed, data changed", "single", another_plan),
    Fault("37", "other library versions", "single", other_versions),
    Fault("39", "two data workers, packed rows, a kill in between", "ddp", workers),
]  # fmt: skip
