"""Proves that a run resumes exactly: has steps behind one of its checkpoints taken again, and compares them with what
the run itself recorded of them."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.launch import command, launch, preflight, process_group, ranks, run_lock, slurm
from sft_recipes.launch.node_launchers import NodeLaunchers
from sft_recipes.launch.process_group import StopRequest
from sft_recipes.planner import plan as plans
from sft_recipes.planner import render
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import EXIT_FAULT, EXIT_STOPPED, FINGERPRINTED_STEPS, RunDir, read_json, write_json

_KINDS = ("weights", "optimizer", "scheduler", "rng")  # as training/digests.py names them


@dataclass(frozen=True)
class Replay:
    """What came of loading a checkpoint and taking its next steps: the loaded state of each rank, and a line a step."""

    step: int
    saved: dict[str, Any]
    loaded: list[dict[str, str]]
    steps: dict[int, dict[str, Any]]
    passed_over: list[str]
    start: dict[str, Any]


class _EndedError(Exception):
    """A replay that came to no end; its exit code."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


def carry_out(folder: RunDir, say: Callable[[str], None], peers: NodeLaunchers | None = None) -> int:
    """Takes steps of a run again and says what came of it: 0 where the run resumes exactly, or within what kernels that
    are not deterministic explain; 1 where it does not.

    Args:
        peers: the parents on the other nodes.

    Raises:
        SetupError: a live process holds the run, it has nothing to go on from, or it was trained on another number of
            nodes.
    """
    plan = plans.read(folder.plan)
    here = peers.allocation.nodes if peers else 1
    if plan.nodes != here:
        raise SetupError(
            f"RUN: {folder.name} was trained on {plan.nodes} nodes, and is tried on as many; here there are {here}: "
            f"salloc --nodes={plan.nodes} --exclusive --gpus-per-node={plan.gpus // plan.nodes} "
            f"srun --ntasks-per-node=1 --cpu-bind=none .venv/bin/python -m sft_recipes verify-resume {folder.name}"
        )
    if peers is None:
        preflight.check_gpus(plan)
    if code := slurm.check_nodes(peers, plan, say):
        return code
    shared = peers.folder if peers else None
    with (
        run_lock.held(folder),
        tempfile.TemporaryDirectory(prefix="sft-", dir=shared) as place,
        process_group.listening() as asked,
    ):
        recorded = _recorded(folder)
        candidates = _candidates(folder, recorded)
        try:
            prepared = _prepare(plan, Path(place), asked, peers)
            first = _replay(plan, folder, candidates, prepared, Path(place) / "first", asked, peers)
            for line in first.passed_over:
                say(f"passing over {line}")
            say(_announcement(folder, plan, first))
            say(render.table(_table(first, recorded)))
            if not _wrong(_as_loaded(first)) and _only_bits(first, recorded):
                same = [(first.step, max(first.steps))]
                second = _replay(plan, folder, same, prepared, Path(place) / "second", asked, peers)
                if _is_within_the_tolerance(first, second, recorded, say):
                    return 0
        except _EndedError as error:
            return error.code
    return _tell(folder, first, recorded, say)


def _recorded(folder: RunDir) -> dict[int, dict[str, Any]]:
    """What the run wrote of each proved step."""
    return {line["step"]: line for line in _lines(folder.integrity_log)}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            yield json.loads(line)
        except ValueError:  # a kill cut it short
            return


def _candidates(folder: RunDir, recorded: dict[int, dict[str, Any]]) -> list[tuple[int, int]]:
    """Checkpoints with the last step behind each that was recorded in a row; first the newest that has such a step.

    Raises:
        SetupError: the run has no checkpoint.
    """
    found = []
    for step in folder.numbered("checkpoint"):
        until = step
        while until + 1 in recorded and until < step + FINGERPRINTED_STEPS:
            until += 1
        found.append((step, until))
    if not found:
        raise SetupError(f"RUN: {folder.path} holds no checkpoint to resume from; wait for its first save")
    return sorted(found, key=lambda one: (one[1] > one[0], one[0]), reverse=True)


def _prepare(plan: Plan, place: Path, asked: StopRequest, peers: NodeLaunchers | None) -> Path:
    """Where the run's rows lie now: prepared again where they are gone.

    Raises:
        SetupError: they are not those that the run began with.
    """
    plans.write(plan, place / "plan.json")
    code = launch.prepare(place / "plan.json", command.environment(plan, os.environ), asked, peers)
    if code:
        raise _EndedError(code)
    found = read_json(RunDir(place).prepared)
    if found["fingerprint"] != plan.data_fingerprint:
        raise SetupError(launch.other_data(plan, plan.data_fingerprint, found["fingerprint"]))
    return RunDir(place).prepared


def _replay(
    plan: Plan,
    folder: RunDir,
    candidates: list[tuple[int, int]],
    prepared: Path,
    place: Path,
    asked: StopRequest,
    peers: NodeLaunchers | None,
) -> Replay:
    """Starts the run's own ranks in a folder of their own."""
    place.mkdir()
    copy = RunDir(place)
    plans.write(plan, copy.plan)
    shutil.copy(prepared, copy.prepared)
    write_json(copy.replay, {"run": str(folder.path.absolute()), "candidates": candidates})
    ended = ranks.carry_out(plan, copy, "tools.replay_worker", asked, peers, saves=False)
    verdict, outcome = read_json(copy.verdict), read_json(copy.outcome)
    if outcome.get("error"):
        print(f"error: {outcome['error']}", file=sys.stderr)
        raise _EndedError(int(outcome["exit_code"]))
    if ended.code == EXIT_STOPPED:
        raise _EndedError(EXIT_STOPPED)
    if ended.code or not verdict:
        said = ended.fault or f"exit code {ended.code}"
        print(f"error: {folder.path} could not be resumed: {said}; more is above", file=sys.stderr)
        raise _EndedError(EXIT_FAULT)
    until = dict(candidates)[verdict["step"]]
    steps = {line["step"]: line for line in _lines(copy.integrity_log) if line["step"] <= until}
    return Replay(**verdict, steps=steps, start=read_json(copy.manifest)["starts"][-1])


def _announcement(folder: RunDir, plan: Plan, replay: Replay) -> str:
    where = f"checkpoint-{replay.step} of {folder.name} ({render.engine_and_ranks(plan)})"
    if not replay.steps:
        return f"{where} was loaded as a resume does; no step behind it was recorded to be taken again"
    return f"{where} was loaded as a resume does, and {_span(sorted(replay.steps))} taken again"


def _span(steps: list[int]) -> str:
    return f"step {steps[0]} was" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]} were"


def _as_loaded(replay: Replay) -> dict[str, str]:
    """Of each kind of state: `equal`, or on which ranks what was loaded is not what was saved."""
    return {kind: _equal(kind, replay.saved["fingerprints"], replay.loaded) for kind in _KINDS}


def _of_step(replayed: dict[str, Any], recorded: dict[str, Any]) -> dict[str, str]:
    """Of each kind of state, and of rows and loss: `equal`, or where they differ."""
    of_ranks = {kind: _equal(kind, recorded["fingerprints"], replayed["fingerprints"]) for kind in _KINDS}
    return of_ranks | {key: "equal" if recorded[key] == replayed[key] else "differs" for key in ("rows_hash", "loss")}


def _equal(kind: str, saved: list[dict[str, str]], found: list[dict[str, str]]) -> str:
    ranks = [rank for rank, (one, other) in enumerate(zip(saved, found, strict=True)) if one[kind] != other[kind]]
    if not ranks:
        return "equal"
    return "differs" if len(ranks) == len(saved) else f"differs (rank {', '.join(map(str, ranks))})"


def _wrong(found: dict[str, str]) -> list[str]:
    return [kind for kind, said in found.items() if said != "equal"]


def _table(replay: Replay, recorded: dict[int, dict[str, Any]]) -> list[list[str]]:
    rows = [["step", *_KINDS, "rows", "loss"], [f"{replay.step}, as loaded", *_as_loaded(replay).values(), "", ""]]
    return rows + [[str(step), *_of_step(line, recorded[step]).values()] for step, line in sorted(replay.steps.items())]


def _only_bits(replay: Replay, recorded: dict[int, dict[str, Any]]) -> bool:
    """Whether steps differ in what sums in another order explain: weights, optimizer and loss alone."""
    wrong = {kind for step, line in replay.steps.items() for kind in _wrong(_of_step(line, recorded[step]))}
    return bool(wrong) and wrong <= {"weights", "optimizer", "loss"}


def _tell(folder: RunDir, replay: Replay, recorded: dict[int, dict[str, Any]], say: Callable[[str], None]) -> int:
    said = [f"step {replay.step} as loaded: {', '.join(wrong)}"] if (wrong := _wrong(_as_loaded(replay))) else []
    for step, line in sorted(replay.steps.items()):
        if wrong := _wrong(_of_step(line, recorded[step])):
            said.append(f"step {step}: {', '.join(wrong)}")
    if said:
        say(f"not exact: {'; '.join(said)}{_other_circumstances(folder, replay)}")
        return EXIT_FAULT
    if not replay.steps:
        say("exact as far as it can be told: all that was loaded is what was saved, bit for bit")
    elif recorded[max(replay.steps)]["resumed_from"] == replay.step:
        say("exact, bit for bit; the steps were recorded by a start that had itself resumed from this checkpoint")
    else:
        say("exact: this run resumes as if it had not stopped, bit for bit")
    return 0


def _is_within_the_tolerance(
    first: Replay, second: Replay, recorded: dict[int, dict[str, Any]], say: Callable[[str], None]
) -> bool:
    """Where bits differ: whether the recorded losses lie as near to a replay as two replays lie to each other. Two
    replays that are the same bit for bit explain nothing."""
    rows, tolerance, off = [["step", "recorded loss", "replayed", "replayed again"]], 0.0, 0.0
    for step in sorted(first.steps):
        loss, *replayed = (line["loss"] for line in (recorded[step], first.steps[step], second.steps[step]))
        rows.append([str(step), *(f"{one:.9f}" for one in (loss, *replayed))])
        tolerance = max(tolerance, abs(replayed[0] - replayed[1]))
        off = max(off, min(abs(loss - one) for one in replayed))
    say(render.table(rows))
    measured = (
        f"two replays differ by up to {tolerance:.3g} in the loss, the recorded ones from them by up to {off:.3g}"
    )
    if first.steps == second.steps or off > tolerance:
        say(f"{measured}: more than this machine's own tolerance")
        return False
    say(f"not bit for bit, but within the tolerance that was measured (kernels are not deterministic): {measured}")
    return True


def _other_circumstances(folder: RunDir, replay: Replay) -> str:
    """What this start has otherwise than the run's newest: machine, threads, versions."""
    starts = read_json(folder.manifest).get("starts", [])
    then = starts[-1] if starts else {}
    changed = [
        f"{name} {before.get(name)} -> {now}"
        for part in ("host", "versions")
        for name, now in replay.start[part].items()
        if (before := then.get(part, {})) and before.get(name) != now
    ]
    return f" (otherwise than in the run: {'; '.join(changed)})" if changed else ""
