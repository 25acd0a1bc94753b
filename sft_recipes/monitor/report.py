"""Render a run as one self-contained HTML page: diagnosis, metrics, completions, plan, environment."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

from sft_recipes.config.schema import source_paths
from sft_recipes.monitor import plots
from sft_recipes.monitor.advice import Finding
from sft_recipes.monitor.diagnose import alerts_without_finding, skipped_rules
from sft_recipes.monitor.metrics_log import Run
from sft_recipes.monitor.rules import RULES
from sft_recipes.runtime.text import escape_unprintable, flatten
from sft_recipes.runtime.units import GIB, format_duration

_MAX_PROMPTS, _MAX_COMPLETIONS = 12, 8  # per prompt the first completion and the latest
_MAX_ALERTS = 5
_STYLE = """
:root{color-scheme:light}
html{background:#f4f5f7}
body{font:15px/1.55 system-ui,-apple-system,'Segoe UI',sans-serif;color:#1c2128;max-width:60rem;margin:0 auto;padding:2rem 1rem 4rem}
h1{font-size:1.9rem;margin:0;overflow-wrap:anywhere}h2{font-size:1.25rem;margin:2.4rem 0 .8rem}h3{font-size:1.02rem;margin:0}
.under{color:#59636e;margin:.2rem 0 1.4rem}
.state{font-size:.85rem;font-weight:600;padding:.15rem .6rem;border-radius:1rem;vertical-align:middle;background:#dde1e6;color:#1c2128}
.finished{background:#d3efe4;color:#00543d}.diverged,.failed{background:#fbdccb;color:#8a3300}.running{background:#d4e8f5;color:#004a75}
.metrics{display:grid;grid-template-columns:repeat(auto-fill,minmax(13.5rem,1fr));gap:.7rem}
.metrics div,.plot,.sample,details,.finding{background:#fff;border:1px solid #dfe3e8;border-radius:.5rem;padding:.7rem .9rem}
.metrics .wide{grid-column:span 2}.wide b{font-size:1rem}.metrics b{display:block;font-size:1.2rem;overflow-wrap:anywhere}.metrics span{color:#59636e;font-size:.85rem}.metrics small{color:#59636e}
.finding{border-left:.4rem solid #009E73;margin:.7rem 0}.finding.error{border-left-color:#D55E00}.finding.warning{border-left-color:#E69F00}
.finding p{margin:.3rem 0}.finding ol{margin:.3rem 0;padding-left:1.3rem}.label{text-transform:uppercase;font-size:.75rem;font-weight:700;letter-spacing:.04em;margin-left:.5rem;color:#59636e}
.plot{margin:0 0 1rem}.plot svg{display:block;width:100%;height:auto;background:#fff}.caption{margin:0;color:#59636e;font-size:.9rem}
table{border-collapse:collapse;width:100%;font-size:.9rem}td,th{text-align:left;vertical-align:top;padding:.3rem .6rem .3rem 0;border-top:1px solid #e6e8eb;overflow-wrap:anywhere;white-space:pre-wrap}
th{font-weight:600;color:#59636e;border-top:0}td:first-child{width:14rem}.sample td:first-child{width:6rem}
.sample{margin:0 0 1rem}.completion{font:13px/1.5 ui-monospace,monospace}pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.3rem 0;font:13px/1.5 ui-monospace,monospace}
code{font:13px ui-monospace,monospace;background:#eef0f3;padding:.05rem .3rem;border-radius:.25rem;overflow-wrap:anywhere}
details{margin:0 0 1rem}summary{cursor:pointer;font-weight:600}
@media print{html{background:#fff}.plot,.sample,.finding{break-inside:avoid}}
"""  # noqa: E501


def page(run: Run, findings: Sequence[Finding]) -> str:
    """Return the page as HTML; all text that comes from data is escaped."""
    name, model = _text(run.folder.name), run.plan.get("model") or "unknown model"
    parts = [
        f'<h1>{name} <span class="state {_text(run.state)}">{_text(run.state)}</span></h1>',
        f'<p class="under">{_text(model)}; recipe {_text(run.plan.get("recipe", "?"))}, {_text(_method(run))}</p>',
        f'<div class="metrics">{"".join(_tile(*metric) for metric in _metrics(run))}</div>',
        f"<h2>Diagnosis</h2>{_diagnosis(run, findings)}",
        f"<h2>Metrics</h2>{''.join(_plot(plot, run) for plot in plots.plots(run))}",
        *_samples(run),
        f"<h2>Plan and environment</h2>{_details('Plan, with the origin of each value', _plan(run))}",
        _details("Environment of each attempt", _environment(run)),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>{name}</title><style>{_STYLE}</style></head><body>{"".join(parts)}'
        f"</body></html>\n"
    )


def _text(value: Any) -> str:
    """Escape HTML and control characters."""
    return html.escape(escape_unprintable(str(value), keep="\n\t"))


def _method(run: Run) -> str:
    return {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}.get(
        str(run.plan.get("method")), "fine-tuning"
    )


def _tile(label: str, value: str, note: str) -> str:
    wide = ' class="wide"' if len(value) > 18 else ""
    return f"<div{wide}><span>{_text(label)}</span><b>{_text(value)}</b><small>{_text(note)}</small></div>"


def _metrics(run: Run) -> Iterable[tuple[str, str, str]]:
    """Label, value and note of the main results."""
    steps, done = run.planned("optimizer_steps"), run.last_step
    yield "optimizer steps", f"{done:,}", f"of {steps:,} planned" if steps else ""
    for _, epoch in run.points("epoch")[-1:]:
        yield "epochs", f"{epoch:.2f}", f"of {run.plan.get('num_train_epochs', '?')}"
    for label, key in (("validation loss", "eval_loss"), ("training loss", "loss")):
        points = run.points(key)
        if points:
            step, value = min(points, key=lambda point: point[1]) if key == "eval_loss" else points[-1]
            which = f"best, at step {step:,}" if key == "eval_loss" else "last"
            yield label, f"{value:.4g}", f"{which}; first {points[0][1]:.4g}"
    before, after = (run.manifest.get(f"exact_match_{when}") for when in ("before", "after"))
    if isinstance(after, float):
        yield "exact match", f"{after:.1%}", f"before training {before:.1%}" if before is not None else ""
    seconds = run.manifest.get("training_seconds")
    if seconds:
        yield (
            "training time",
            format_duration(seconds),
            f"{format_duration(run.manifest.get('wall_seconds', seconds))} in total",
        )
    supervised = max((value for _, value in run.points("supervised_tokens_seen")), default=0)
    if supervised:
        yield "supervised tokens seen", f"{supervised:,.0f}", "tokens in the loss, all epochs"
    peak = run.manifest.get("peak_memory_bytes")
    if peak:
        yield "peak memory per GPU", f"{peak / GIB:.1f} GiB", str(run.plan.get("gpu_type") or "")
    batch = run.plan.get("effective_batch_size")
    if batch:
        yield (
            "effective batch",
            f"{batch} rows",
            f"{run.plan.get('world_size', '?')} ranks, {run.plan.get('parallelism')}",
        )
    if parent := run.plan.get("init_from"):
        yield "initial weights", str(parent["run"]), f"its last step, {parent['step']:,}"
    data = run.section("data")
    shown = ", ".join(map(str, source_paths(data.get("train", "?"))))
    yield "data", shown, f"{run.plan['examples']:,} examples" if run.plan.get("examples") else ""


def _diagnosis(run: Run, findings: Sequence[Finding]) -> str:
    titles = {rule.name: rule.title for rule in RULES}
    skipped = skipped_rules(run)
    note = f"<p>{len(RULES) - len(skipped)} of {len(RULES)} rules checked."
    note += f" Skipped (not enough data): {_text(', '.join(rule.name for rule in skipped))}.</p>" if skipped else "</p>"
    for alert in alerts_without_finding(run, findings)[:_MAX_ALERTS]:
        note += f"<p>Alert at step {alert.step:,}: {_text(alert.rule)}: {_text(alert.evidence)}</p>"
    if not findings:
        return f'<div class="finding"><h3>No issues found</h3>{note}</div>'
    return "".join(_finding(finding, titles.get(finding.rule, finding.rule)) for finding in findings) + note


def _finding(finding: Finding, title: str) -> str:
    since = "" if finding.step is None else f", step {finding.step:,}"
    evidence = finding.evidence[:1].upper() + finding.evidence[1:]
    steps = "".join(f"<li>{_advice(line)}</li>" for line in finding.advice)
    return (
        f'<div class="finding {_text(finding.severity)}"><h3>{_text(title)}<span class="label">'
        f"{_text(finding.severity)}{since}</span></h3><p>{_text(evidence)}.</p><p>Advice, most effective "
        f"first:</p><ol>{steps}</ol></div>"
    )


def _advice(line: str) -> str:
    """A line of advice, with recipe lines and commands as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", _text(line))


def _plot(plot: plots.Plot, run: Run) -> str:
    svg = plots.svg(plot, max(run.last_step, run.planned("optimizer_steps") or 0))
    return f'<div class="plot"><h3>{_text(plot.title)}</h3>{svg}<p class="caption">{_text(plot.caption)}</p></div>'


def _samples(run: Run) -> Iterable[str]:
    """Completions of the same prompts over the steps."""
    samples = sorted(run.samples, key=lambda sample: str(sample.get("prompt")))
    prompts = [list(group) for _, group in itertools.groupby(samples, key=lambda sample: str(sample.get("prompt")))]
    if prompts:
        yield "<h2>Completions</h2><p>Greedy completions of the same held-out prompts at each evaluation.</p>"
    for group in prompts[:_MAX_PROMPTS]:
        completions = sorted(group, key=lambda sample: sample["step"])
        rows = "".join(
            f'<tr><td>{sample["step"]:,}</td><td class="completion">{_text(sample.get("completion", ""))}</td></tr>'
            for sample in [*completions[:1], *completions[1:][1 - _MAX_COMPLETIONS :]]
        )
        yield (
            f'<div class="sample"><h3>Prompt</h3><pre>{_text(completions[0].get("prompt", ""))}</pre><h3>Reference</h3>'
            f"<pre>{_text(completions[0].get('reference', ''))}</pre><table><tr><th>step</th><th>completion</th></tr>"
            f"{rows}</table></div>"
        )


def _details(title: str, rows: Iterable[Sequence[str]]) -> str:
    cells = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<details><summary>{_text(title)}</summary><table>{cells}</table></details>"


def _plan(run: Run) -> Iterable[tuple[str, str, str]]:
    origins = run.plan.get("origins") or {}
    for key, value in flatten(
        {key: value for key, value in run.plan.items() if key != "origins"}, keep_empty=True
    ).items():
        short = key.removeprefix("sections.")
        yield short, str(value), str(origins.get(short) or origins.get(f"trainer.{short}") or "")


def _environment(run: Run) -> Iterable[tuple[str, str]]:
    for number, attempt in enumerate(run.manifest.get("starts") or [], 1):
        yield from (
            (f"attempt {number}: {key}", str(value)) for key, value in flatten(attempt, keep_empty=True).items()
        )
