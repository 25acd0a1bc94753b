"""Verifies that a run resumes exactly: repeats steps after one of its checkpoints, and compares fingerprints with those
that the run recorded."""

import json
import logging
import os
import shutil
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from sft_recipes.launch import attempts, command, launch, node_checks, ranks, run_lock, run_selection
from sft_recipes.launch.node_exchange import NodeMissingError
from sft_recipes.launch.placement import Placement
from sft_recipes.launch.run_context import RunContext
from sft_recipes.launch.stop_request import StoppedError, handle_stop_signals
from sft_recipes.planner import plan as plans
from sft_recipes.planner import render
from sft_recipes.runtime import timeouts
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import EXIT_ERROR, EXIT_STOPPED, FINGERPRINTED_STEPS, RunDir, read_json, write_json

log = logging.getLogger(__name__)
_KINDS = ("weights", "optimizer", "scheduler", "rng")  # as in training/integrity/fingerprint.py
_VALUES = {"rows": "rows_hash", "loss": "loss"}
_SUMS = {"weights", "optimizer", "loss"}  # what another order of summation changes

_PROGRAM, _FIRST, _SECOND = "tools.replay_worker", "first", "second"
_AGAIN = -1  # instead of an exit code: the nodes run the second replay

Steps = dict[int, dict[str, Any]]  # lines of an integrity log


@dataclass(frozen=True)
class Replay:
    """Result of loading a checkpoint and repeating its next steps.

    Attributes:
        step: of the checkpoint.
        saved: fingerprints of each rank in the checkpoint.
        loaded: fingerprints of each rank after loading.
        skipped: `checkpoint-N: reason` of each skipped checkpoint.
        steps: integrity log of the repeated steps.
    """

    step: int
    saved: list[dict[str, str]]
    loaded: list[dict[str, str]]
    skipped: list[str]
    steps: Steps


def run(run_dir: RunDir, placement: Placement | None = None) -> int:
    """Repeat steps of a run and print the comparison. Call on every node; node 0 compares.

    Args:
        placement: this node's place; None on one machine.

    Returns:
        0 if the run resumes exactly, or within the measured tolerance of non-deterministic kernels; 1 if not.

    Raises:
        SetupError: a live process holds the run, it has no checkpoint, its data has changed, or it was trained on
            another number of nodes.
    """
    plan = plans.read(run_dir.plan)
    node_count = placement.nodes if placement else 1
    if plan.nodes != node_count:
        found = f"RUN: {run_dir.name} was trained on {plan.nodes} nodes and needs as many: found {node_count}"
        raise SetupError(f"{found}. Start it with srun on that many nodes (docs/slurm.md)")
    if placement is None:
        node_checks.check_gpus(plan)
    attempt = placement.attempt if placement else os.getpid()
    folder = run_dir.path.absolute().parent / ".replays" / f"{run_dir.name}-{attempt}"  # all nodes share it
    with handle_stop_signals() as stop_request:
        context = RunContext(RunDir(folder), plan, stop_request, placement=placement)
        try:
            if not context.is_first_node:
                return _follow(context)
            with run_lock.lock(run_dir):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True, mode=0o700)
                return _verify(context, run_dir)
        except StoppedError:
            return EXIT_STOPPED
        except NodeMissingError as error:
            log.error(error)
            return EXIT_ERROR
        finally:
            if context.is_first_node:
                shutil.rmtree(folder, ignore_errors=True)


def _verify(context: RunContext, run_dir: RunDir) -> int:
    recorded, placement = _read_log(run_dir), context.placement
    candidates = _find_candidates(run_dir, recorded)
    if code := _prepare(context):
        return code
    _write_replay(context, run_dir, _FIRST, candidates)
    if placement:
        attempts.write(context.run_dir, attempts.Attempt(placement.attempt, placement.nodes, prepared=True))
        if code := node_checks.check_all_nodes(context, placement.name):
            return code
    first = _replay(context, candidates, _FIRST)
    if isinstance(first, int):
        return first
    for reason in first.skipped:
        log.info(f"skipping {reason}")
    run_selection.check_versions(run_dir, False)
    steps = f"steps {' to '.join(map(str, first.steps))}" if first.steps else "no recorded step"
    ranked = render.describe_ranks(context.plan)
    log.info(f"resumed {run_dir.name} from checkpoint-{first.step} ({ranked}), repeated {steps}")
    states, kinds = compare(first, recorded), (*_KINDS, *_VALUES)
    rows = [[state, *(results.get(kind, "") for kind in kinds)] for state, results in states.items()]
    log.info(render.format_table([["step", *kinds], *rows]))
    differing = find_differing(states)
    again = bool(differing) and differs_in_sums_only(states)
    candidates = [(first.step, max(first.steps, default=first.step))]
    _write_replay(context, run_dir, _SECOND, candidates)
    code = context.agree(_AGAIN if again else 0)
    if code == _AGAIN:
        second = _replay(context, candidates, _SECOND)
        return second if isinstance(second, int) else context.agree() or check_tolerance(first, second, recorded)
    if code or differing:
        return code or _report_difference(states)
    log.info(f"exact: bit for bit equal to {_describe_reference(first, recorded)}")
    return 0


def _follow(context: RunContext) -> int:
    """Run the same replays on another node than node 0."""
    placement = context.placement
    if not attempts.wait_until_visible(lambda: attempts.read(context.run_dir).prepared, placement, timeouts.NODES_MEET):
        raise SetupError(f"RUNS_DIR: {context.run_dir.path} not visible on {placement.name}. Use a disk of all nodes")
    code = node_checks.check_all_nodes(context, placement.name)
    for name in () if code else (_FIRST, _SECOND):
        ended = ranks.run_ranks(context.within(RunDir(context.run_dir.path / name)), _PROGRAM, can_save=False)
        code = ended.code or context.agree()
        if code != _AGAIN:
            break
    return code


def _prepare(context: RunContext) -> int:
    """Prepare the run's data; return 0 or the exit code.

    Raises:
        SetupError: the data differs from that of the run.
    """
    plan, folder = context.plan, context.run_dir
    plans.write(plan, folder.plan)
    if code := launch.prepare_data(context, folder.plan):
        return code
    fingerprint = read_json(folder.prepared)["fingerprint"]
    if fingerprint != plan.data_fingerprint:
        raise SetupError(launch.data_changed_message(plan, plan.data_fingerprint, fingerprint))
    command.write_accelerate_config(plan, folder)  # for the all-reduce test
    return 0


def _write_replay(context: RunContext, run_dir: RunDir, name: str, candidates: list[tuple[int, int]]) -> None:
    """Write what the ranks of a replay read, to its folder."""
    replay_dir = RunDir(context.run_dir.path / name)
    replay_dir.path.mkdir()
    plans.write(context.plan, replay_dir.plan)
    shutil.copy(context.run_dir.prepared, replay_dir.prepared)
    command.write_accelerate_config(context.plan, replay_dir)
    write_json(replay_dir.replay, {"run": str(run_dir.path.absolute()), "candidates": candidates})


def _describe_reference(replay: Replay, recorded: Steps) -> str:
    if not replay.steps:
        return "the saved state; no step was compared"
    resumed = recorded[max(replay.steps)]["resumed_from"] == replay.step
    return "steps of an attempt that had itself resumed from this checkpoint" if resumed else "the uninterrupted run"


def _read_log(run_dir: RunDir) -> Steps:
    """Return a run's integrity log by step, without a last line that a killed process has not completed."""
    text = run_dir.integrity_log.read_text(encoding="utf-8") if run_dir.integrity_log.is_file() else ""
    lines = [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]
    return {line["step"]: line for line in lines}


def _find_candidates(run_dir: RunDir, recorded: Steps) -> list[tuple[int, int]]:
    """Return the checkpoints, each with the last consecutive recorded step after it; the latest one with such a step
    first.

    Raises:
        SetupError: the run has no checkpoint.
    """
    steps = run_dir.numbered("checkpoint")
    if not steps:
        raise SetupError(f"RUN: {run_dir.path} has no checkpoint to resume from. Wait for its first save")
    later = {step: range(step + 1, step + 1 + FINGERPRINTED_STEPS) for step in steps}
    candidates = [(step, step + len(list(takewhile(recorded.__contains__, later[step])))) for step in steps]
    return sorted(candidates, key=lambda candidate: (candidate[1] > candidate[0], candidate[0]), reverse=True)


def _replay(context: RunContext, candidates: list[tuple[int, int]], name: str) -> Replay | int:
    """Run the ranks of the run in a directory of the context; return an exit code if there is no result."""
    replay_dir = RunDir(context.run_dir.path / name)
    ended = ranks.run_ranks(context.within(replay_dir), _PROGRAM, can_save=False)
    result, outcome = read_json(replay_dir.result), read_json(replay_dir.outcome)
    if outcome.get("error"):
        log.error(outcome["error"])
        return int(outcome["exit_code"]) if ended.code else context.agree(int(outcome["exit_code"]))
    if ended.code or not result:
        if ended.code != EXIT_STOPPED:
            run = read_json(replay_dir.replay)["run"]
            log.error(f"{run} could not be resumed: {ended.error or ended.code}. See the log above")
        return ended.code or context.agree(EXIT_ERROR)
    until = dict(candidates)[result["step"]]
    steps = {step: line for step, line in _read_log(replay_dir).items() if step <= until}
    return Replay(**result, steps=steps)


def compare(replay: Replay, recorded: Steps) -> dict[str, dict[str, str]]:
    """Compare the loaded state and each repeated step with what the run recorded.

    Returns:
        Per state and kind: `equal`, `differs`, or `differs` with the ranks.
    """
    loaded = _compare({"fingerprints": replay.saved}, {"fingerprints": replay.loaded})
    steps = {str(step): _compare(recorded[step], line) for step, line in replay.steps.items()}
    return {f"{replay.step} (loaded)": loaded, **steps}


def _compare(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    results = {}
    for kind in _KINDS:
        pairs = enumerate(zip(before["fingerprints"], now["fingerprints"], strict=True))
        differing = [str(rank) for rank, (a, b) in pairs if a[kind] != b[kind]]
        some = f" (rank {', '.join(differing)})" if len(differing) < len(now["fingerprints"]) else ""
        results[kind] = f"differs{some}" if differing else "equal"
    for name, key in _VALUES.items():
        if key in now:
            results[name] = "equal" if before[key] == now[key] else "differs"
    return results


def find_differing(states: dict[str, dict[str, str]]) -> set[str]:
    """Return the kinds that differ in any state."""
    return {kind for results in states.values() for kind, result in results.items() if result != "equal"}


def differs_in_sums_only(states: dict[str, dict[str, str]]) -> bool:
    """Return whether only repeated steps differ, in what another order of summation explains."""
    loaded = next(iter(states.values()))
    return set(loaded.values()) == {"equal"} and find_differing(states) <= _SUMS


def _report_difference(states: dict[str, dict[str, str]]) -> int:
    differing = find_differing(states)
    log.info(f"not exact: different {', '.join(kind for kind in (*_KINDS, *_VALUES) if kind in differing)}")
    return EXIT_ERROR


def check_tolerance(first: Replay, second: Replay, recorded: Steps) -> int:
    """Compare the recorded losses with a replay, and two replays with each other; return the exit code.

    Two replays that are equal bit for bit explain no difference.
    """
    if first.steps == second.steps:
        return _report_difference(compare(first, recorded))
    losses = [[steps[step]["loss"] for steps in (recorded, first.steps, second.steps)] for step in first.steps]
    deviation = max(min(abs(loss - one), abs(loss - other)) for loss, one, other in losses)
    tolerance = max(abs(one - other) for _, one, other in losses)
    exceeded = deviation > tolerance
    log.info(
        f"not bit for bit, {'and not' if exceeded else 'but'} within the measured tolerance of non-deterministic "
        f"kernels: recorded losses deviate by up to {deviation:.3g}, two replays from each other by {tolerance:.3g}"
    )
    return EXIT_ERROR if exceeded else 0
