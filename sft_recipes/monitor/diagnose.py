"""Apply every rule to a run, drop findings that another explains, and print the result for people and programs."""

import dataclasses
import json
from collections.abc import Sequence

from sft_recipes.monitor.metrics_log import Run
from sft_recipes.monitor.rules import RULES, Finding, Rule
from sft_recipes.runtime.text import escape_unprintable


def diagnose(run: Run) -> list[Finding]:
    """The findings of a run, errors first; empty if it is healthy."""
    results = [(rule, rule.find(run)) for rule in RULES if rule.has_data(run)]
    explained = {name for rule, finding in results if finding for name in rule.explains}
    findings = [
        dataclasses.replace(finding, advice=[*finding.advice, rule.advice])
        for rule, finding in results
        if finding and rule.name not in explained
    ]
    return sorted(findings, key=lambda finding: finding.severity != "error")


def has_errors(findings: Sequence[Finding]) -> bool:
    """Whether a finding ruins the run: `diagnose` then exits with 1."""
    return any(finding.severity == "error" for finding in findings)


def skipped_rules(run: Run) -> list[Rule]:
    """The rules for whose metrics the run has no or too few values."""
    return [rule for rule in RULES if not rule.has_data(run)]


def to_json(findings: Sequence[Finding]) -> str:
    """`{"healthy": bool, "findings": [{"rule", "severity", "step", "evidence", "advice"}]}`."""
    return json.dumps({"healthy": not findings, "findings": [*map(dataclasses.asdict, findings)]}, indent=2)


def text(run: Run, findings: Sequence[Finding]) -> list[str]:
    """The diagnosis as lines for a terminal; the first one has the result."""
    count = f"{len(findings) or 'no'} issue{'' if len(findings) == 1 else 's'} found"
    place = f"step {run.last_step} of {run.plan.optimizer_steps or '?'}"
    lines = [f"{count} in {run.folder.name} ({run.folder.state()}, {place})"]
    for finding in findings:
        since = "" if finding.step is None else f" at step {finding.step:,}"
        lines += ["", f"{finding.severity}: {finding.rule}{since}: {finding.evidence}"]
        lines += [f"     -> {step}" for step in finding.advice]
    if findings:
        lines += ["", f'apply: in recipes/{run.plan.recipe}.yaml, or as ARGS="key=value" (docs/troubleshooting.md)']
    lines += [f"Alerts during the run: {len(run.alerts)}, in {run.folder.warnings}"] if run.alerts else []
    lines.append(f"Checked: {', '.join(rule.name for rule in RULES if rule.has_data(run)) or 'none'}")
    skipped = ", ".join(f"{rule.name} ({' or '.join(rule.metrics)})" for rule in skipped_rules(run))
    lines += [f"Skipped (not enough data): {skipped}"] if skipped else []
    return [escape_unprintable(line) for line in lines]
