"""Planted faults are found by name, and healthy runs have no findings (monitor.rules, monitor.diagnose).

`PYTHONPATH=.:tests .venv/bin/python tests/unit/test_diagnose.py` writes docs/troubleshooting.md.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import string
import typing

import pytest
from helpers.planted_faults import (
    FAULTS,
    exploding_gradients,
    forgetting,
    from_scratch,
    memorizing,
    nan_loss,
    out_of_memory,
    rising_permanently,
    schedule,
    slow_data_loader,
    spiking,
    throughput_drop,
    too_low_learning_rate,
    unchanged,
    vanishing_gradients,
)
from helpers.simulated_runs import GIB, Simulated
from helpers.workplace import REPOSITORY

from sft_recipes.config import schema
from sft_recipes.config.schema import Monitor
from sft_recipes.config.sizes import scientific
from sft_recipes.monitor.detectors import AlertStream
from sft_recipes.monitor.diagnose import diagnose, has_errors, text, to_json
from sft_recipes.monitor.metrics_log import MetricSeries, read
from sft_recipes.monitor.rules import RULES
from sft_recipes.runtime.errors import UserError
from sft_recipes.runtime.run_dir import RunDir

PAGE = REPOSITORY / "docs" / "troubleshooting.md"


def advice_of(findings):
    return "\n".join(line for finding in findings for line in finding.advice)


@pytest.mark.parametrize(
    ("recipe", "seed", "noise", "lines"), [("tiny", 2, 0.03, 40), ("8b", 2, 0.05, 100), ("70b", 3, 0.1, 200)]
)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_the_only_finding(fault, recipe, seed, noise, lines, tmp_path):
    plant, rule = FAULTS[fault]
    findings = diagnose(plant(Simulated(recipe, seed=seed, noise=noise, lines=lines)).write(tmp_path))
    assert [finding.rule for finding in findings] == [rule]
    assert json.loads(to_json(findings))["healthy"] is False
    assert findings[0].evidence and findings[0].advice and findings[0].step is not None


def test_every_rule_has_a_planted_fault():
    assert {rule for _, rule in FAULTS.values()} == {rule.name for rule in RULES}
    assert all(rule.detect is None or rule.detect.__name__ == rule.name for rule in RULES)


def constant_gap(run):
    run.gap = 0.15
    return run


def one_mild_spike(run):
    return run.change("loss", lambda loss, share: loss * (1.7 if share == 0.5 else 1))


def one_slow_line(run):
    for key, odd in (("tokens_per_second", 900.0), ("data_wait_fraction", 0.9)):
        run.change(key, lambda usual, share, odd=odd: odd if share == 0.9 else usual)
    return run


def memory_jump(run):
    """At the third evaluation the allocator takes more, and keeps it."""
    for key in ("memory_allocated_bytes", "host_memory_bytes"):
        run.change(key, lambda held, share: held + (9 * GIB if share > 0.3 else 0))
    return run


def one_odd_evaluation(run):
    return run.change("eval_loss", lambda loss, share: loss + (0.15 if share == 0.6 else 0))


def large_norms_during_warmup(run):
    return run.change("grad_norm", lambda norm, share: 30.0 if share <= 0.02 else norm)


OTHER_SCHEDULES = ("allow_out_of_range=[lr_scheduler_type]",)
HEALTHY = {
    "tiny": (Simulated("tiny", steps=896, lines=36, gpu=False), from_scratch),
    "tiny, many lines": (Simulated("tiny", steps=2000, lines=200, noise=0.1, gpu=False), from_scratch),
    "1b": (Simulated("1b", begin=1.9, end=1.4), unchanged),
    "1b, twenty steps": (Simulated("1b", steps=20, lines=20, evaluations=2), unchanged),
    "8b": (Simulated("8b", steps=5000, lines=500), unchanged),
    "8b, noisy": (Simulated("8b", noise=0.1, seed=5), unchanged),
    "8b, strong model": (Simulated("8b", begin=1.2, end=1.08, noise=0.03, lines=200), unchanged),
    "8b, falls by 5%": (Simulated("8b", begin=1.1, end=1.045, noise=0.03, lines=300, steps=3000), unchanged),
    "8b, low loss": (Simulated("8b", begin=0.5, end=0.3, seed=2), unchanged),
    "8b, gap of 0.15": (Simulated("8b", seed=3), constant_gap),
    "8b, one mild spike": (Simulated("8b", noise=0.03), one_mild_spike),
    "8b, one slow line": (Simulated("8b"), one_slow_line),
    "8b, one odd evaluation": (Simulated("8b"), one_odd_evaluation),
    "8b, retention set": (Simulated("8b", retain=True), unchanged),
    "8b, memory jump": (Simulated("8b"), memory_jump),
    "8b, linear": (Simulated("8b", overrides=("trainer.lr_scheduler_type=linear", *OTHER_SCHEDULES)), unchanged),
    "8b, constant": (
        Simulated("8b", overrides=("trainer.lr_scheduler_type=constant_with_warmup", *OTHER_SCHEDULES)),
        unchanged,
    ),
    "8b, other cosine": (Simulated("8b", overrides=('trainer.lr_scheduler_kwargs={"num_cycles": 0.4}',)), unchanged),
    "8b, running": (Simulated("8b", state="running", until=0.4), unchanged),
    "8b, just started": (Simulated("8b", state="running", until=0.02), unchanged),
    "70b": (Simulated("70b", steps=2000, seed=7), unchanged),
    "70b, large first norms": (Simulated("70b", seed=8, lines=50), large_norms_during_warmup),
    "8b-lora": (Simulated("8b-lora", steps=300, lines=30, evaluations=3), unchanged),
    "8b-lora, stopped": (Simulated("8b-lora", state="stopped", until=0.63, seed=9), unchanged),
    "8b-lora, starts at 7": (Simulated("8b-lora", begin=7, end=3), unchanged),
}


@pytest.mark.parametrize("seed", [0, 10])
@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_run_has_no_findings(name, seed, tmp_path):
    simulated, alter = HEALTHY[name]
    copied = dataclasses.replace(simulated, seed=simulated.seed + seed, changes=[])
    run = alter(copied).write(tmp_path)
    findings = diagnose(run)
    assert findings == []
    assert json.loads(to_json(findings)) == {"healthy": True, "findings": []}
    assert text(run, findings)[0].startswith("no issues found in ")


# --- live and offline -------------------------------------------------------------------------------------------------

LIVE = [rule for rule in RULES if rule.detect]
STALLED = Simulated("8b", begin=1.4, end=1.4, noise=0.02, evaluations=3, lines=500)


def live_alerts(run):
    """What the running job reports if it measures what the log lines have."""
    stream = AlertStream([rule.detect for rule in LIVE], MetricSeries(run.plan))
    return [alert for line in run.lines for alert in stream.add(line["step"], line)]


@pytest.mark.parametrize(
    ("rule", "simulated"),
    [
        ("loss_spike", spiking(Simulated("8b"))),
        ("exploding_gradients", exploding_gradients(Simulated("8b"))),
        ("vanishing_gradients", vanishing_gradients(Simulated("8b", lines=500))),
        ("throughput_drop", throughput_drop(Simulated("8b"))),
        ("plateau", STALLED),
    ],
)
def test_live_and_offline_rules_agree(rule, simulated, tmp_path):
    """One series gives one result, whether the alert callback or `diagnose` reads it."""
    run = simulated.write(tmp_path)
    alerts = [alert for alert in live_alerts(run) if alert.rule == rule]
    (finding,) = diagnose(run)
    assert finding.rule == rule and alerts
    if rule == "plateau":  # a state: live it is reported as soon as the noise allows, afterwards of the complete run
        assert "since warm-up the training loss fell by" in finding.evidence and "fell by" in alerts[0].evidence
    else:
        assert finding.step == alerts[0].step and alerts[0].evidence in finding.evidence
    # Recorded while it trained, and not visible in the log lines: the same finding.
    recorded = [{"step": alert.step, "rule": rule, "evidence": alert.evidence} for alert in alerts]
    healthy = Simulated("8b", warnings=recorded).write(tmp_path / "recorded")
    (again,) = diagnose(healthy)
    assert (again.rule, again.step) == (rule, alerts[0].step) and alerts[0].evidence in again.evidence


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_run_has_no_live_alerts(name, tmp_path):
    simulated, alter = HEALTHY[name]
    run = alter(dataclasses.replace(simulated, changes=[])).write(tmp_path)
    allowed = {"8b, one mild spike": ["loss_spike"], "8b, falls by 5%": ["plateau"]}  # events, and a state halfway
    assert {alert.rule for alert in live_alerts(run)} == {*allowed.get(name, [])}


def test_single_spike_is_listed_without_finding(tmp_path):
    simulated = Simulated("8b").change("loss", lambda loss, share: loss * (4 if share == 0.5 else 1))
    (alert,) = live_alerts(simulated.write(tmp_path))
    simulated.warnings = [dataclasses.asdict(alert)]
    run = simulated.write(tmp_path)
    findings = diagnose(run)
    assert findings == [] and run.alerts == [alert]
    assert f"Alerts during the run: 1, in {run.folder.warnings}" in text(run, findings)


def test_stop_on_accepts_the_rules_of_single_steps():
    assert set(typing.get_args(schema.StoppingAlert)) == {rule.name for rule in LIVE if rule.per_step}


# --- reading ----------------------------------------------------------------------------------------------------------


def test_read_replaces_lines_after_resume_and_skips_incomplete_line(tmp_path):
    run = Simulated("8b", state="running", until=0.5).write(tmp_path)
    lines = run.folder.metrics.read_text().splitlines()
    old = [line.replace('"loss": ', '"loss": 9') for line in lines[-20:]]
    run.folder.metrics.write_text("\n".join([*lines[:-20], *old, *lines[-20:], '{"step": 990, "loss": 1.\xe9'[:-1]]))
    again = read(run.folder)
    assert again.lines == run.lines
    assert diagnose(again) == []


@pytest.mark.parametrize("value", ['"NaN"', "NaN", '"Infinity"', "-Infinity"])
def test_non_finite_loss_is_found_in_any_spelling(value, tmp_path):
    run = Simulated("8b", until=0.5).write(tmp_path)
    with run.folder.metrics.open("a") as lines:
        lines.write(f'{{"step": 510, "loss": {value}, "learning_rate": 1e-5}}\n')
    (finding,) = [finding for finding in diagnose(read(run.folder)) if finding.rule == "divergence"]
    assert finding.step == 510


def test_divergence_names_rows_before_learning_rate(tmp_path):
    (finding,) = diagnose(nan_loss(Simulated("8b")).write(tmp_path))
    assert finding.step == 400 and "my.jsonl:17" in finding.evidence
    assert "my.jsonl:17, my.jsonl:18" in finding.advice[0]
    assert finding.advice[1].startswith("trainer.learning_rate=6.7e-6 ") and finding.advice[1].endswith(", was 2.0e-5")


def test_divergence_before_first_log_line(tmp_path):
    run = nan_loss(Simulated("8b")).write(tmp_path)
    run.folder.metrics.write_text("")
    assert [finding.rule for finding in diagnose(read(run.folder))] == ["divergence"]


def with_learning_rate(rate, recipe="8b", **named):
    outside = (f"trainer.learning_rate={rate}", "allow_out_of_range=[learning_rate]")
    return Simulated(recipe, overrides=outside, **named)


@pytest.mark.parametrize(
    ("rate", "rule", "severity", "evidence"),
    [
        ("2e-4", "learning_rate", "warning", "4 times the highest of size class 7-13b"),
        ("2e-2", "learning_rate", "error", "400 times the highest of size class 7-13b"),
        ("2e-6", "learning_rate", "warning", "5 times below the lowest of size class 7-13b"),
        ("1e-8", "learning_rate", "error", "1000 times below the lowest of size class 7-13b"),
    ],
)
def test_learning_rate_far_outside_range_is_found(rate, rule, severity, evidence, tmp_path):
    """Adam and clipping can hide such a rate: no curve shows it."""
    (finding,) = diagnose(with_learning_rate(rate).write(tmp_path))
    assert (finding.rule, finding.severity) == (rule, severity) and evidence in finding.evidence
    assert finding.advice[0].startswith("trainer.learning_rate=2.0e-5, was ")
    assert finding.advice[0].endswith(" (the default of size class 7-13b)")


def test_learning_rate_slightly_outside_range_is_healthy(tmp_path):
    assert diagnose(with_learning_rate("1e-4").write(tmp_path / "twice")) == []
    assert diagnose(with_learning_rate("2e-4", accuracy=0.97).write(tmp_path / "converged")) == []


def test_norms_that_start_near_the_limit_do_not_explode(tmp_path):
    """A from-scratch model starts with norms of 8; 11 later is no reason for a lower learning rate."""
    run = Simulated("tiny", begin=7.4, end=5.0).change("grad_norm", lambda _, share: 8 + 3 * share)
    assert diagnose(run.write(tmp_path)) == []


def test_run_without_log_lines_is_rejected(tmp_path):
    run = Simulated("8b", state="running").write(tmp_path)
    run.folder.metrics.unlink()
    with pytest.raises(UserError, match="nothing logged yet") as error:
        read(RunDir(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fault", "recipe", "line"),
    [
        (
            rising_permanently,
            "8b",
            "trainer.learning_rate=6.7e-6 allow_out_of_range=[learning_rate] (size class 7-13b allows 1e-05 to 5e-05), "
            "was 2.0e-5",
        ),
        (rising_permanently, "tiny", "trainer.learning_rate=6.7e-4, was 2.0e-3"),
        (exploding_gradients, "8b", "trainer.learning_rate=1.0e-5, was 2.0e-5"),
        (exploding_gradients, "1b", "trainer.learning_rate=2.5e-5 allow_out_of_range=[learning_rate]"),
        (too_low_learning_rate, "8b", "trainer.learning_rate=4.0e-5, was 2.0e-5"),
        (too_low_learning_rate, "70b", "trainer.learning_rate=4.0e-5 allow_out_of_range=[learning_rate]"),
        (memorizing, "8b", "trainer.learning_rate=1.0e-5, was 2.0e-5"),
        (memorizing, "8b", "trainer.num_train_epochs=2, was 3"),
        (memorizing, "8b", "trainer.weight_decay=0.05 allow_out_of_range=[weight_decay]"),
        (memorizing, "1b", "trainer.weight_decay=0.05, was 0.01"),
        (forgetting, "8b", "trainer.learning_rate=1.0e-5, was 2.0e-5"),
        (slow_data_loader, "8b", "trainer.dataloader_num_workers=4, was 2"),
        (out_of_memory, "8b", "uses less memory: `parallelism=zero3`"),
    ],
)
def test_advice_is_a_recipe_line_with_its_new_value(fault, recipe, line, tmp_path):
    advice = advice_of(diagnose(fault(Simulated(recipe, lines=200)).write(tmp_path)))
    (given,) = [given for given in advice.splitlines() if line in given]
    assert ("allow_out_of_range" in line) == ("allow_out_of_range" in given)


def test_advised_learning_rate_loads_as_a_recipe(tmp_path):
    from sft_recipes.config import loader

    loaded = 0
    for fault, recipe in ((rising_permanently, "8b"), (memorizing, "8b"), (too_low_learning_rate, "70b")):
        run = fault(Simulated(recipe, lines=200)).write(tmp_path / f"{fault.__name__}-{recipe}")
        for line in advice_of(diagnose(run)).splitlines():
            if line.startswith("trainer.learning_rate"):
                overrides = line.partition(" (")[0].partition(",")[0].split()
                value = float(overrides[0].partition("=")[2])
                assert loader.load(recipe, overrides).trainer["learning_rate"] == value
                loaded += 1
    assert loaded == 3


def test_overfitting_starts_at_the_best_step_which_is_kept(tmp_path):
    (finding,) = diagnose(memorizing(Simulated("8b")).write(tmp_path))
    assert finding.step == 400 and "(step 400, the best)" in finding.evidence


def test_thresholds_come_from_the_plan(tmp_path):
    assert [finding.rule for finding in diagnose(slow_data_loader(Simulated("8b")).write(tmp_path / "default"))]
    higher = Simulated("8b", overrides=("monitor.data_wait=0.5",))
    assert diagnose(slow_data_loader(higher).write(tmp_path / "higher")) == []


def test_schedule_is_skipped_after_resume_with_another_learning_rate(tmp_path):
    run = schedule(peak=3)(Simulated("8b")).write(tmp_path)
    plan = json.loads(run.folder.plan.read_text())
    run.folder.plan.write_text(json.dumps({**plan, "allowed_changes": ["learning_rate"]}))
    changed = read(run.folder)
    assert diagnose(changed) == []
    lines = text(changed, [])
    assert lines[-1].startswith("Skipped") and "schedule (scheduled_learning_rate)" in lines[-1]
    assert lines[-2].startswith("Checked") and "schedule" not in lines[-2]


def test_run_of_another_version_is_rejected(tmp_path):
    run = Simulated("8b").write(tmp_path)
    run.folder.plan.write_text('{"recipe": "8b"}')
    with pytest.raises(UserError, match="not a plan of this version"):
        read(run.folder)


def test_run_is_read_with_the_metrics_it_has(tmp_path):
    run = Simulated("8b").write(tmp_path)
    run.folder.manifest.unlink()
    lines = [{"step": step, "loss": 2 - step / 100} for step in range(1, 40)]
    run.folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    bare = read(run.folder)
    assert diagnose(bare) == []
    (skipped,) = [line for line in text(bare, []) if line.startswith("Skipped (not enough data): ")]
    assert "forgetting (eval_retention_loss)" in skipped


def test_text_escapes_terminal_sequences(tmp_path):
    run = nan_loss(Simulated("8b"))
    run.manifest["diverged"]["rows"] = ["a\x1b[2Jb.jsonl:1"]
    run = run.write(tmp_path)
    lines = text(run, diagnose(run))
    assert lines[0].startswith("1 issue found in ")
    assert all(line.isprintable() or not line for line in lines) and "a\\x1b[2Jb.jsonl:1" in "".join(lines)


def test_only_errors_fail_a_diagnosis(tmp_path):
    assert has_errors(diagnose(forgetting(Simulated("8b")).write(tmp_path / "error")))
    warnings = diagnose(slow_data_loader(Simulated("8b")).write(tmp_path / "warning"))
    assert warnings and not has_errors(warnings)


def test_page_matches_the_rules():
    assert PAGE.read_text(encoding="utf-8") == _page(), f"run {__doc__.split('`')[1]}"


HEAD = """# Troubleshooting

    make diagnose RUN=tiny-1     the issues of a run, and which line of the recipe to change
    make report RUN=tiny-1       its curves on one page, runs/tiny-1/report.html

Both read a run directory during or after training, on any machine. `diagnose --json` prints the findings as JSON and
exits with 1 if one is an error. A recommended value outside the range of the size class comes with the
`allow_out_of_range` it needs. `tests/unit/test_diagnose.py` writes the table below from the rules.

## Errors before there is a run to diagnose

| output | cause | fix |
|---|---|---|
| `error: …`, exit code 2 | invalid recipe or data | the line has the place, the problem and the fix |
| out of memory | the estimate was too low, or another process uses memory | `make plan` prints the parts; `batch.max_per_device_batch_size: 1`, `trainer.gradient_checkpointing: true`, sharded parameters (`parallelism=zero3`), more GPUs, LoRA |
| `rank 1 on …`, killed by SIGKILL | the memory limit of the host or of its container, or a scheduler | read the system log; the same command resumes from the latest checkpoint |
| `rank 1 on …`, stalled in step 7 | no rank made progress for `monitor.heartbeat_timeout_seconds` | `stack_traces/` in the run directory has the stack of each rank; the same command resumes; raise the timeout if steps are that slow |
| three attempts without progress, exit code 4 | the same error each time, such as one row | fix what the line names; `RESUME=1` resumes |
| no output for minutes | the first start compiles, downloads, or loads | read `log.txt` in the run directory |
| garbled completions although the loss falls | a wrong loss mask | `make inspect` prints the loss mask |

## Rules

Thresholds are keys of `monitor:` in the recipe; the table has the defaults. A finding has to exceed the scatter of the
run's own log lines, so a short or noisy run is more often healthy. Act on the first finding first; findings that it
explains are not listed. Rules with `live` also run during training: their alerts are printed and recorded in
`warnings.jsonl`, which `diagnose` reads.

"""


def _page():
    defaults = dataclasses.asdict(Monitor())
    rows = ["| rule | condition | thresholds | live | advice |", "|---|---|---|---|---|"]
    for rule in RULES:
        condition = " ".join(inspect.getdoc(rule.find).partition("\n\n")[0].split())
        keys = [key for _, key, _, _ in string.Formatter().parse(condition) if key]
        values = {key: scientific(defaults[key]) if defaults[key] < 1e-3 else f"{defaults[key]:g}" for key in keys}
        thresholds = ", ".join(f"`monitor.{key}: {value}`" for key, value in values.items()) or "fixed"
        live = ("every step" if rule.per_step else "every log line") if rule.detect else ""
        row = (f"**{rule.title}**<br>`{rule.name}`", condition.format(**values), thresholds, live, rule.advice)
        rows.append(f"| {' | '.join(row)} |")
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(_page(), encoding="utf-8")
