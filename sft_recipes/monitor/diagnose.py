"""Asks every rule about a run, leaves out what another finding explains, and says the result to people and machines."""

from __future__ import annotations

import dataclasses
import json

from sft_recipes.monitor.advice import Finding
from sft_recipes.monitor.metrics_log import Run
from sft_recipes.monitor.rules import RULES, Rule


def diagnose(run: Run) -> list[Finding]:
    """What is wrong with a run, the gravest first; nothing where all is well."""
    judged = [(rule, rule.look(run)) for rule in RULES if rule.judges(run)]
    explained = {name for rule, finding in judged if finding for name in rule.explains}
    found = [finding for rule, finding in judged if finding and rule.name not in explained]
    return sorted(found, key=lambda finding: finding.severity != "red")


def healthy(findings: list[Finding]) -> bool:
    """Whether no rule found anything."""
    return not findings


def ruined(findings: list[Finding]) -> bool:
    """Whether one of them ruins the run: what `diagnose` leaves with 1 for."""
    return any(finding.severity == "red" for finding in findings)


def not_judged(run: Run) -> list[Rule]:
    """The rules whose figures this run does not have, or has too few of."""
    return [rule for rule in RULES if not rule.judges(run)]


def to_json(findings: list[Finding]) -> str:
    """`{"healthy": bool, "findings": [{"rule", "severity", "step", "evidence", "advice"}]}`."""
    found = [dataclasses.asdict(finding) for finding in findings]
    return json.dumps({"healthy": healthy(findings), "findings": found}, indent=2)


def progress(run: Run) -> str:
    """How far the run is: `tiny-1, finished, step 896 of 896`."""
    return f"{run.folder.name}, {run.state}, step {run.last_step:,} of {run.planned('optimizer_steps') or '?'}"


def text(run: Run, findings: list[Finding]) -> list[str]:
    """The diagnosis for a terminal; its first line says whether the run is healthy."""
    judged = ", ".join(rule.name for rule in RULES if rule.judges(run))
    count = f"{len(findings)} finding{'s' if len(findings) > 1 else ''}"
    lines = [f"all quiet: {progress(run)}" if healthy(findings) else f"not healthy, {count}: {progress(run)}"]
    for finding in findings:
        since = "" if finding.step is None else f", since step {finding.step:,}"
        lines += ["", f"{finding.severity}  {finding.rule}{since}: {finding.evidence}"]
        lines += [f"     -> {said}" for said in finding.advice]
    if findings:
        lines += [
            "",
            f"such lines go into recipes/{run.plan.get('recipe')}.yaml, or key=value into ARGS=; more of each ",
        ]
        lines[-1] += "sign: docs/troubleshooting.md"
    lines.append(f"looked at: {judged or 'nothing'}")
    lacking = ", ".join(f"{rule.name} ({' or '.join(rule.needs)})" for rule in not_judged(run))
    if lacking:
        lines.append(f"not judged, too few figures: {lacking}")
    return [printable(line) for line in lines]


def printable(said: str) -> str:
    """Nothing that a terminal would obey: what a run read may hold anything."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in said)
