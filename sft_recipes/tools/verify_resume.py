"""Verifies that a run resumes exactly: repeats steps after one of its checkpoints, and compares fingerprints with those
that the run recorded."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.launch import launch, preflight, ranks, run_lock, slurm
from sft_recipes.launch.node_launchers import NodeLaunchers
from sft_recipes.launch.run_context import RunContext
from sft_recipes.launch.stop_request import handle_stop_signals
from sft_recipes.planner import plan as plans
from sft_recipes.planner import render
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import EXIT_ERROR, EXIT_STOPPED, FINGERPRINTED_STEPS, RunDir, read_json, write_json

log = logging.getLogger(__name__)
_KINDS = ("weights", "optimizer", "scheduler", "rng")  # as in training/integrity/fingerprint.py
_EQUAL = "equal"


@dataclass(frozen=True)
class Replay:
    """Result of loading a checkpoint and repeating its next steps.

    Attributes:
        step: of the checkpoint.
        saved: record of the checkpoint, with the fingerprints of each rank.
        loaded: fingerprints of each rank after loading.
        steps: integrity log of the repeated steps.
        skipped: `checkpoint-N: reason` of each skipped checkpoint.
        start: manifest entry of the replay (host, library versions).
    """

    step: int
    saved: dict[str, Any]
    loaded: list[dict[str, str]]
    steps: dict[int, dict[str, Any]]
    skipped: list[str]
    start: dict[str, Any]


class _ReplayFailedError(Exception):
    """A replay without a result; its exit code."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


def run(run_dir: RunDir, nodes: NodeLaunchers | None = None) -> int:
    """Repeat steps of a run and print the comparison.

    Args:
        nodes: the node launchers, led by this one; None on one machine.

    Returns:
        0 if the run resumes exactly, or within the measured tolerance of non-deterministic kernels; 1 if not.

    Raises:
        SetupError: a live process holds the run, it has no checkpoint, or it was trained on another number of nodes.
    """
    plan = plans.read(run_dir.plan)
    node_count = nodes.allocation.nodes if nodes else 1
    if plan.nodes != node_count:
        raise SetupError(
            f"RUN: {run_dir.name} was trained on {plan.nodes} nodes and needs the same number: found {node_count}. "
            f"Run salloc --nodes={plan.nodes} --exclusive --gpus-per-node={plan.gpus // plan.nodes} "
            f"srun --ntasks-per-node=1 --cpu-bind=none .venv/bin/python -m sft_recipes verify-resume {run_dir.name}"
        )
    if nodes is None:
        preflight.check_gpus(plan)
    if code := slurm.check_nodes(nodes, plan):
        return code
    shared = nodes.folder if nodes else None
    with (
        run_lock.lock(run_dir),
        tempfile.TemporaryDirectory(prefix="sft-", dir=shared) as directory,
        handle_stop_signals() as stop_request,
    ):
        context = RunContext(RunDir(Path(directory)), plan, stop_request, nodes)
        recorded = _read_recorded(run_dir)
        candidates = _find_candidates(run_dir, recorded)
        try:
            _prepare(context)
            first = _replay(context, run_dir, candidates, "first")
            for reason in first.skipped:
                log.info("skipping %s", reason)
            log.info(_replay_message(run_dir, plan, first))
            log.info(render.format_table(_comparison_table(first, recorded)))
            if not _differing(_compare_loaded(first)) and _differs_in_sums_only(first, recorded):
                second = _replay(context, run_dir, [(first.step, max(first.steps))], "second")
                if _is_within_tolerance(first, second, recorded):
                    return 0
        except _ReplayFailedError as error:
            return error.code
    return _report(run_dir, first, recorded)


def _read_recorded(run_dir: RunDir) -> dict[int, dict[str, Any]]:
    """The run's integrity log, by step."""
    return {line["step"]: line for line in _lines(run_dir.integrity_log)}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            yield json.loads(line)
        except ValueError:  # the process was killed while writing it
            return


def _find_candidates(run_dir: RunDir, recorded: dict[int, dict[str, Any]]) -> list[tuple[int, int]]:
    """Checkpoints, each with the last consecutive recorded step after it; the latest one with such a step first.

    Raises:
        SetupError: the run has no checkpoint.
    """
    candidates = []
    for step in run_dir.numbered("checkpoint"):
        until = step
        while until + 1 in recorded and until < step + FINGERPRINTED_STEPS:
            until += 1
        candidates.append((step, until))
    if not candidates:
        raise SetupError(f"RUN: {run_dir.path} has no checkpoint to resume from. Wait for its first save")
    return sorted(candidates, key=lambda candidate: (candidate[1] > candidate[0], candidate[0]), reverse=True)


def _prepare(context: RunContext) -> None:
    """Prepare the run's data in the context's directory; cached rows are used.

    Raises:
        SetupError: the data differs from that of the run.
    """
    plan, run_dir = context.plan, context.run_dir
    plans.write(plan, run_dir.plan)
    code = launch.prepare_data(context, run_dir.plan)
    if code:
        raise _ReplayFailedError(code)
    fingerprint = read_json(run_dir.prepared)["fingerprint"]
    if fingerprint != plan.data_fingerprint:
        raise SetupError(launch.data_changed_message(plan, plan.data_fingerprint, fingerprint))


def _replay(context: RunContext, run_dir: RunDir, candidates: list[tuple[int, int]], name: str) -> Replay:
    """Run the ranks of the run in a directory of the context."""
    replay_dir = RunDir(context.run_dir.path / name)
    replay_dir.path.mkdir()
    plans.write(context.plan, replay_dir.plan)
    shutil.copy(context.run_dir.prepared, replay_dir.prepared)
    write_json(replay_dir.replay, {"run": str(run_dir.path.absolute()), "candidates": candidates})
    ended = ranks.run_ranks(context.within(replay_dir), "tools.replay_worker", can_save=False)
    result, outcome = read_json(replay_dir.result), read_json(replay_dir.outcome)
    if outcome.get("error"):
        log.error(outcome["error"])
        raise _ReplayFailedError(int(outcome["exit_code"]))
    if ended.code == EXIT_STOPPED:
        raise _ReplayFailedError(EXIT_STOPPED)
    if ended.code or not result:
        error = ended.error or f"exit code {ended.code}"
        log.error(f"{run_dir.path} could not be resumed: {error}. See the log above")
        raise _ReplayFailedError(EXIT_ERROR)
    until = dict(candidates)[result["step"]]
    steps = {line["step"]: line for line in _lines(replay_dir.integrity_log) if line["step"] <= until}
    return Replay(**result, steps=steps, start=read_json(replay_dir.manifest)["starts"][-1])


def _replay_message(run_dir: RunDir, plan: Plan, replay: Replay) -> str:
    steps = sorted(replay.steps)
    repeated = "no recorded step after it"
    if steps:
        repeated = f"repeated step {steps[0]}" if len(steps) == 1 else f"repeated steps {steps[0]} to {steps[-1]}"
    return f"resumed {run_dir.name} from checkpoint-{replay.step} ({render.describe_ranks(plan)}), {repeated}"


def _compare_loaded(replay: Replay) -> dict[str, str]:
    """Compare the loaded state with the saved state, by kind: `equal`, or the ranks that differ."""
    return {kind: _compare(kind, replay.saved["fingerprints"], replay.loaded) for kind in _KINDS}


def _compare_step(replayed: dict[str, Any], recorded: dict[str, Any]) -> dict[str, str]:
    """Compare a step with its record: each kind of state, rows and loss."""
    state = {kind: _compare(kind, recorded["fingerprints"], replayed["fingerprints"]) for kind in _KINDS}
    return state | {key: _EQUAL if recorded[key] == replayed[key] else "differs" for key in ("rows_hash", "loss")}


def _compare(kind: str, saved: list[dict[str, str]], actual: list[dict[str, str]]) -> str:
    differing = [rank for rank, (a, b) in enumerate(zip(saved, actual, strict=True)) if a[kind] != b[kind]]
    if not differing:
        return _EQUAL
    return "differs" if len(differing) == len(saved) else f"differs (rank {', '.join(map(str, differing))})"


def _differing(comparison: dict[str, str]) -> list[str]:
    return [kind for kind, result in comparison.items() if result != _EQUAL]


def _comparison_table(replay: Replay, recorded: dict[int, dict[str, Any]]) -> list[list[str]]:
    rows = [["step", *_KINDS, "rows", "loss"], [f"{replay.step} (loaded)", *_compare_loaded(replay).values(), "", ""]]
    for step, line in sorted(replay.steps.items()):
        rows.append([str(step), *_compare_step(line, recorded[step]).values()])
    return rows


def _differs_in_sums_only(replay: Replay, recorded: dict[int, dict[str, Any]]) -> bool:
    """Whether steps differ only in what another order of summation explains: weights, optimizer and loss."""
    kinds = {kind for step, line in replay.steps.items() for kind in _differing(_compare_step(line, recorded[step]))}
    return bool(kinds) and kinds <= {"weights", "optimizer", "loss"}


def _report(run_dir: RunDir, replay: Replay, recorded: dict[int, dict[str, Any]]) -> int:
    """Print the result, and return the exit code."""
    loaded = _differing(_compare_loaded(replay))
    differences = [f"checkpoint-{replay.step} as loaded: {', '.join(loaded)}"] if loaded else []
    for step, line in sorted(replay.steps.items()):
        if kinds := _differing(_compare_step(line, recorded[step])):
            differences.append(f"step {step}: {', '.join(kinds)}")
    if differences:
        log.info(f"not exact: {'; '.join(differences)}{_environment_changes(run_dir, replay)}")
        return EXIT_ERROR
    if not replay.steps:
        log.info("exact: the loaded state equals the saved state bit for bit; no step was compared")
    elif recorded[max(replay.steps)]["resumed_from"] == replay.step:
        log.info("exact: bit for bit equal to steps of an attempt that had itself resumed from this checkpoint")
    else:
        log.info("exact: bit for bit equal to the uninterrupted run")
    return 0


def _is_within_tolerance(first: Replay, second: Replay, recorded: dict[int, dict[str, Any]]) -> bool:
    """Whether the recorded losses are as close to a replay as two replays are to each other. Two replays that are equal
    bit for bit explain no difference."""
    rows, tolerance, deviation = [["step", "recorded loss", "first replay", "second replay"]], 0.0, 0.0
    for step in sorted(first.steps):
        loss, *replayed = (line["loss"] for line in (recorded[step], first.steps[step], second.steps[step]))
        rows.append([str(step), *(f"{value:.9f}" for value in (loss, *replayed))])
        tolerance = max(tolerance, abs(replayed[0] - replayed[1]))
        deviation = max(deviation, min(abs(loss - value) for value in replayed))
    log.info(render.format_table(rows))
    measured = f"recorded losses deviate by up to {deviation:.3g}, two replays from each other by up to {tolerance:.3g}"
    if first.steps == second.steps or deviation > tolerance:
        log.info(f"more than the tolerance of this machine: {measured}")
        return False
    log.info(f"not bit for bit, but within the measured tolerance of non-deterministic kernels: {measured}")
    return True


def _environment_changes(run_dir: RunDir, replay: Replay) -> str:
    """How host and library versions differ from the latest attempt of the run."""
    starts = read_json(run_dir.manifest).get("starts", [])
    latest = starts[-1] if starts else {}
    changed = [
        f"{name} {before.get(name)} -> {now}"
        for part in ("host", "versions")
        for name, now in replay.start[part].items()
        if (before := latest.get(part, {})) and before.get(name) != now
    ]
    return f" (changed since the run: {'; '.join(changed)})" if changed else ""
