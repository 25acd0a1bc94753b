"""Writes a run as one page that a newcomer can read and that needs nothing else: diagnosis, curves, samples, plan."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

from sft_recipes.monitor import plots
from sft_recipes.monitor.advice import Finding
from sft_recipes.monitor.diagnose import healthy, not_judged
from sft_recipes.monitor.metrics_log import Run
from sft_recipes.monitor.rules import RULES
from sft_recipes.runtime.units import GIB

_MOST_PROMPTS, _MOST_ANSWERS = 12, 8  # of each prompt the first answer and the newest
_STYLE = """
:root{color-scheme:light}
html{background:#f4f5f7}
body{font:15px/1.55 system-ui,-apple-system,'Segoe UI',sans-serif;color:#1c2128;max-width:60rem;margin:0 auto;padding:2rem 1rem 4rem}
h1{font-size:1.9rem;margin:0;overflow-wrap:anywhere}h2{font-size:1.25rem;margin:2.4rem 0 .8rem}h3{font-size:1.02rem;margin:0}
.under{color:#59636e;margin:.2rem 0 1.4rem}
.state{font-size:.85rem;font-weight:600;padding:.15rem .6rem;border-radius:1rem;vertical-align:middle;background:#dde1e6;color:#1c2128}
.finished{background:#d3efe4;color:#00543d}.diverged,.failed{background:#fbdccb;color:#8a3300}.running{background:#d4e8f5;color:#004a75}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(13.5rem,1fr));gap:.7rem}
.figures div,figure,.sample,details,.finding{background:#fff;border:1px solid #dfe3e8;border-radius:.5rem;padding:.7rem .9rem}
.figures .wide{grid-column:span 2}.wide b{font-size:1rem}.figures b{display:block;font-size:1.2rem;overflow-wrap:anywhere}.figures span{color:#59636e;font-size:.85rem}.figures small{color:#59636e}
.finding{border-left:.4rem solid #009E73;margin:.7rem 0}.finding.red{border-left-color:#D55E00}.finding.yellow{border-left-color:#E69F00}
.finding p{margin:.3rem 0}.finding ol{margin:.3rem 0;padding-left:1.3rem}.label{text-transform:uppercase;font-size:.75rem;font-weight:700;letter-spacing:.04em;margin-left:.5rem;color:#59636e}
figure{margin:0 0 1rem}figure svg{display:block;width:100%;height:auto;background:#fff}figcaption{color:#59636e;font-size:.9rem}
table{border-collapse:collapse;width:100%;font-size:.9rem}td,th{text-align:left;vertical-align:top;padding:.3rem .6rem .3rem 0;border-top:1px solid #e6e8eb;overflow-wrap:anywhere;white-space:pre-wrap}
th{font-weight:600;color:#59636e;border-top:0}td:first-child{width:14rem}.sample td:first-child{width:6rem}
.sample{margin:0 0 1rem}.said{font:13px/1.5 ui-monospace,monospace}pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.3rem 0;font:13px/1.5 ui-monospace,monospace}
code{font:13px ui-monospace,monospace;background:#eef0f3;padding:.05rem .3rem;border-radius:.25rem;overflow-wrap:anywhere}
details{margin:0 0 1rem}summary{cursor:pointer;font-weight:600}
@media print{html{background:#fff}figure,.sample,.finding{break-inside:avoid}}
"""  # noqa: E501


def page(run: Run, findings: Sequence[Finding]) -> str:
    """The page as HTML; everything that comes from data is escaped."""
    name, model = _text(run.folder.name), run.plan.get("model") or "a model that the plan does not name"
    parts = [
        f'<h1>{name} <span class="state {_text(run.state)}">{_text(run.state)}</span></h1>',
        f'<p class="under">{_text(model)}; recipe {_text(run.plan.get("recipe", "?"))}, {_text(_method(run))}</p>',
        f'<div class="figures">{"".join(_figure(*figure) for figure in _figures(run))}</div>',
        f"<h2>Diagnosis</h2>{_diagnosis(run, findings)}",
        f"<h2>Curves</h2>{''.join(_plot(plot, run) for plot in plots.plots(run))}",
        *_samples(run),
        f"<h2>Plan and environment</h2>{_details('The plan, and where each value came from', _plan(run))}",
        _details("The environment, start by start", _environment(run)),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>{name}</title><style>{_STYLE}</style></head><body>{"".join(parts)}'
        f"</body></html>\n"
    )


def _text(said: Any) -> str:
    """Escaped, and control characters shown instead of obeyed."""
    return html.escape("".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in str(said)))


def _method(run: Run) -> str:
    return {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}.get(
        str(run.plan.get("method")), "fine-tuning"
    )


def _figure(label: str, value: str, note: str) -> str:
    wide = ' class="wide"' if len(value) > 18 else ""
    return f"<div{wide}><span>{_text(label)}</span><b>{_text(value)}</b><small>{_text(note)}</small></div>"


def _figures(run: Run) -> Iterable[tuple[str, str, str]]:
    """Label, value and note of what a person asks first."""
    steps, done = run.planned("optimizer_steps"), run.last_step
    yield "optimizer steps", f"{done:,}", f"of {steps:,} planned" if steps else ""
    for _, epoch in run.points("epoch")[-1:]:
        yield "epochs", f"{epoch:.2f}", f"of {run.plan.get('num_train_epochs', '?')}"
    for label, key in (("validation loss", "eval_loss"), ("training loss", "loss")):
        points = run.points(key)
        if points:
            step, value = min(points, key=lambda point: point[1]) if key == "eval_loss" else points[-1]
            noted = f"best, at step {step:,}" if key == "eval_loss" else "last"
            yield label, f"{value:.4g}", f"{noted}; first {points[0][1]:.4g}"
    before, after = (run.manifest.get(f"exact_match_{when}") for when in ("before", "after"))
    if isinstance(after, float):
        yield "held-out answers exactly right", f"{after:.1%}", f"before {before:.1%}" if before is not None else ""
    seconds = run.manifest.get("training_seconds")
    if seconds:
        yield "training time", _duration(seconds), f"{_duration(run.manifest.get('wall_seconds', seconds))} in all"
    supervised = max((value for _, value in run.points("supervised_tokens_seen")), default=0)
    if supervised:
        yield "supervised tokens seen", f"{supervised:,.0f}", "the answers' tokens, all epochs"
    peak = run.manifest.get("peak_memory_bytes")
    if peak:
        yield "peak memory of a GPU", f"{peak / GIB:.1f} GiB", str(run.plan.get("gpu_type") or "")
    batch = run.plan.get("effective_batch_size")
    if batch:
        yield (
            "effective batch",
            f"{batch} rows",
            f"{run.plan.get('world_size', '?')} ranks, {run.plan.get('parallelism')}",
        )
    data = run.section("data")
    train = data.get("train", "?")
    shown = ", ".join(train) if isinstance(train, list) else str(train)
    yield "data", shown, f"{run.plan['examples']:,} examples" if run.plan.get("examples") else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _diagnosis(run: Run, findings: Sequence[Finding]) -> str:
    titles = {rule.name: rule.title for rule in RULES}
    lacking = ", ".join(rule.title.lower() for rule in not_judged(run))
    judged = len(RULES) - len(not_judged(run))
    note = f"<p>{judged} of {len(RULES)} signs could be looked for."
    note += f" Not judged, for too few figures: {_text(lacking)}.</p>" if lacking else "</p>"
    if healthy(list(findings)):
        return f'<div class="finding"><h3>All quiet</h3><p>None of the known warning signs is there.</p>{note}</div>'
    return "".join(_finding(finding, titles.get(finding.rule, finding.rule)) for finding in findings) + note


def _finding(finding: Finding, title: str) -> str:
    since = "" if finding.step is None else f", since step {finding.step:,}"
    evidence = finding.evidence[:1].upper() + finding.evidence[1:]
    said = "".join(f"<li>{_recipe_line(line)}</li>" for line in finding.advice)
    return (
        f'<div class="finding {_text(finding.severity)}"><h3>{_text(title)}<span class="label">'
        f"{_text(finding.severity)}{since}</span></h3><p>{_text(evidence)}.</p><p>What to do, the first thing "
        f"first:</p><ol>{said}</ol></div>"
    )


def _recipe_line(line: str) -> str:
    """A piece of advice, its recipe's lines and commands as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", _text(line))


def _plot(plot: plots.Plot, run: Run) -> str:
    drawn = plots.svg(plot, max(run.last_step, run.planned("optimizer_steps") or 0))
    return f"<figure><h3>{_text(plot.title)}</h3>{drawn}<figcaption>{_text(plot.reading)}</figcaption></figure>"


def _samples(run: Run) -> Iterable[str]:
    """The same prompts, and what the model answered step by step."""
    told = sorted(run.samples, key=lambda sample: str(sample.get("prompt")))
    prompts = [list(group) for _, group in itertools.groupby(told, key=lambda sample: str(sample.get("prompt")))]
    if prompts:
        yield "<h2>Answers over time</h2><p>The same held-out prompts, answered as the model was at each step.</p>"
    for asked in prompts[:_MOST_PROMPTS]:
        answers = sorted(asked, key=lambda sample: sample["step"])
        rows = "".join(
            f'<tr><td>{answer["step"]:,}</td><td class="said">{_text(answer.get("completion", ""))}</td></tr>'
            for answer in [*answers[:1], *answers[1:][1 - _MOST_ANSWERS :]]
        )
        yield (
            f'<div class="sample"><h3>Prompt</h3><pre>{_text(answers[0].get("prompt", ""))}</pre><h3>Wanted</h3>'
            f"<pre>{_text(answers[0].get('reference', ''))}</pre><table><tr><th>step</th><th>answer</th></tr>{rows}"
            f"</table></div>"
        )


def _details(title: str, rows: Iterable[Sequence[str]]) -> str:
    written = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<details><summary>{_text(title)}</summary><table>{written}</table></details>"


def _plan(run: Run) -> Iterable[tuple[str, str, str]]:
    origins = run.plan.get("origins") or {}
    for key, value in _flat({key: value for key, value in run.plan.items() if key != "origins"}):
        short = key.removeprefix("sections.")
        yield short, str(value), str(origins.get(short) or origins.get(f"trainer.{short}") or "")


def _environment(run: Run) -> Iterable[tuple[str, str]]:
    for number, start in enumerate(run.manifest.get("starts") or [], 1):
        yield from ((f"start {number}: {key}", str(value)) for key, value in _flat(start))


def _flat(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if not isinstance(value, dict) or not value:
        yield prefix, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
