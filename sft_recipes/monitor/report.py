"""Render a run as one self-contained HTML page: diagnosis, metrics, completions, plan, environment."""

import base64
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

from sft_recipes.monitor import plots
from sft_recipes.monitor.diagnose import skipped_rules
from sft_recipes.monitor.metrics_log import Run
from sft_recipes.monitor.rules import RULES, Finding
from sft_recipes.runtime.run_dir import read_json
from sft_recipes.runtime.text import escape_unprintable, flatten
from sft_recipes.runtime.units import GIB, format_duration


def page(run: Run, findings: Sequence[Finding]) -> str:
    """Return the page as HTML; all text that comes from data is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=lambda value: escape_unprintable(str(value), keep="\n\t"),
    )
    return environment.get_template("report.html.j2").render(
        run=run,
        findings=findings,
        titles={rule.name: rule.title for rule in RULES},
        skipped=skipped_rules(run),
        evaluations=[read_json(path) for path in sorted(run.folder.evaluation.glob("*.json"))],
        draw=lambda *plot: base64.b64encode(plots.svg(run, *plot).encode()).decode(),
        plan=dataclasses.asdict(run.plan),
        flatten=functools.partial(flatten, keep_empty=True),
        format_duration=format_duration,
        GIB=GIB,
    )
