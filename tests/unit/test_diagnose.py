"""Planted diseases are told by name, and healthy runs are left in peace (monitor.rules, monitor.diagnose).

`PYTHONPATH=.:tests .venv/bin/python tests/unit/test_diagnose.py` writes docs/troubleshooting.md anew.
"""

from __future__ import annotations

import dataclasses
import json
import string

import pytest
from helpers.planted_faults import (
    DISEASES,
    as_it_is,
    exploding_gradients,
    forgetting,
    from_scratch,
    memorising,
    not_a_number,
    out_of_memory,
    rising_for_good,
    schedule,
    slow_loader,
    too_low_a_rate,
)
from helpers.simulated_runs import GIB, Simulated
from helpers.workplace import REPOSITORY

from sft_recipes.config.schema import Monitor
from sft_recipes.config.sizes import scientific
from sft_recipes.monitor.diagnose import diagnose, ruined, text, to_json
from sft_recipes.monitor.metrics_log import read
from sft_recipes.monitor.rules import RULES
from sft_recipes.runtime.errors import UserError
from sft_recipes.runtime.run_dir import RunDir

PAGE = REPOSITORY / "docs" / "troubleshooting.md"


def said(findings):
    return "\n".join(line for finding in findings for line in finding.advice)


@pytest.mark.parametrize(
    ("recipe", "seed", "noise", "lines"), [("tiny", 1, 0.03, 40), ("8b", 2, 0.05, 100), ("70b", 3, 0.1, 200)]
)
@pytest.mark.parametrize("disease", DISEASES)
def test_a_planted_disease_is_told_first_and_alone(disease, recipe, seed, noise, lines, tmp_path):
    plant, rule = DISEASES[disease]
    findings = diagnose(plant(Simulated(recipe, seed=seed, noise=noise, lines=lines)).write(tmp_path))
    assert [finding.rule for finding in findings] == [rule]
    assert json.loads(to_json(findings))["healthy"] is False
    assert findings[0].evidence and findings[0].advice and findings[0].step is not None


def test_every_rule_has_a_disease_that_it_tells():
    assert {rule for _, rule in DISEASES.values()} == {rule.name for rule in RULES}


def constant_gap(run):
    run.gap = 0.15
    return run


def one_mild_spike(run):
    return run.change("loss", lambda loss, share: loss * (1.6 if share == 0.5 else 1))


def one_slow_line(run):
    for key, odd in (("tokens_per_second", 900.0), ("data_wait_fraction", 0.9), ("rank_lag", 2.0)):
        run.change(key, lambda usual, share, odd=odd: odd if share == 0.9 else usual)
    return run


def memory_that_steps_up(run):
    """At the third evaluation the allocator takes more, and keeps it."""
    for key in ("memory_allocated_bytes", "host_memory_bytes"):
        run.change(key, lambda held, share: held + (9 * GIB if share > 0.3 else 0))
    return run


def one_odd_evaluation(run):
    return run.change("eval_loss", lambda loss, share: loss + (0.15 if share == 0.6 else 0))


def large_norms_while_it_warms_up(run):
    return run.change("grad_norm", lambda norm, share: 30.0 if share <= 0.02 else norm)


OTHER_SCHEDULES = ("allow_out_of_range=[lr_scheduler_type]",)
HEALTHY = {
    "tiny": (Simulated("tiny", steps=896, lines=36, gpu=False, ranks=False), from_scratch),
    "tiny on many lines": (Simulated("tiny", steps=2000, lines=200, noise=0.1, gpu=False, ranks=False), from_scratch),
    "1b": (Simulated("1b", begin=1.9, end=1.4), as_it_is),
    "1b, twenty steps": (Simulated("1b", steps=20, lines=20, evaluations=2), as_it_is),
    "8b": (Simulated("8b", steps=5000, lines=500), as_it_is),
    "8b, noisy": (Simulated("8b", noise=0.1, seed=5), as_it_is),
    "8b, a strong model": (Simulated("8b", begin=1.2, end=1.08, noise=0.03, lines=200), as_it_is),
    "8b, five percent": (Simulated("8b", begin=1.1, end=1.045, noise=0.03, lines=300, steps=3000), as_it_is),
    "8b, low loss": (Simulated("8b", begin=0.5, end=0.3, seed=2), as_it_is),
    "8b, a gap of 0.15": (Simulated("8b", seed=3), constant_gap),
    "8b, one mild spike": (Simulated("8b", noise=0.03), one_mild_spike),
    "8b, one slow line": (Simulated("8b"), one_slow_line),
    "8b, one odd evaluation": (Simulated("8b"), one_odd_evaluation),
    "8b, retained rows": (Simulated("8b", retain=True), as_it_is),
    "8b, memory steps up": (Simulated("8b"), memory_that_steps_up),
    "8b, linear": (Simulated("8b", overrides=("trainer.lr_scheduler_type=linear", *OTHER_SCHEDULES)), as_it_is),
    "8b, constant": (
        Simulated("8b", overrides=("trainer.lr_scheduler_type=constant_with_warmup", *OTHER_SCHEDULES)),
        as_it_is,
    ),
    "8b, two cosines": (Simulated("8b", overrides=('trainer.lr_scheduler_kwargs={"num_cycles": 0.4}',)), as_it_is),
    "8b, still going on": (Simulated("8b", state="running", until=0.4), as_it_is),
    "8b, just begun": (Simulated("8b", state="running", until=0.02), as_it_is),
    "70b": (Simulated("70b", steps=2000, seed=7), as_it_is),
    "70b, large norms at first": (Simulated("70b", seed=8, lines=50), large_norms_while_it_warms_up),
    "8b-lora": (Simulated("8b-lora", steps=300, lines=30, ranks=False, evaluations=3), as_it_is),
    "8b-lora, stopped": (Simulated("8b-lora", state="stopped", until=0.63, seed=9), as_it_is),
    "8b-lora, at seven": (Simulated("8b-lora", begin=7, end=3), as_it_is),
}


@pytest.mark.parametrize("seed", [0, 10])
@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_runs_are_left_in_peace(name, seed, tmp_path):
    simulated, alter = HEALTHY[name]
    copied = dataclasses.replace(simulated, seed=simulated.seed + seed, changes=[])
    run = alter(copied).write(tmp_path)
    findings = diagnose(run)
    assert findings == []
    assert json.loads(to_json(findings)) == {"healthy": True, "findings": []}
    assert text(run, findings)[0].startswith("all quiet: ")


def test_at_least_twenty_healthy_runs_are_looked_at():
    assert len(HEALTHY) >= 20


def test_lines_of_before_a_resume_are_replaced_and_a_torn_one_is_passed_over(tmp_path):
    run = Simulated("8b", state="running", until=0.5).write(tmp_path)
    lines = run.folder.metrics.read_text().splitlines()
    old = [line.replace('"loss": ', '"loss": 9') for line in lines[-20:]]
    run.folder.metrics.write_text("\n".join([*lines[:-20], *old, *lines[-20:], '{"step": 990, "loss": 1.\xe9'[:-1]]))
    again = read(run.folder)
    assert again.training == run.training and again.validation == run.validation
    assert diagnose(again) == []


@pytest.mark.parametrize("written", ['"NaN"', "NaN", '"Infinity"', "-Infinity"])
def test_a_loss_that_is_no_number_is_told_however_it_is_written(written, tmp_path):
    run = Simulated("8b", until=0.5).write(tmp_path)
    with run.folder.metrics.open("a") as lines:
        lines.write(f'{{"step": 510, "loss": {written}, "learning_rate": 1e-5}}\n')
    (finding,) = [found for found in diagnose(read(run.folder)) if found.rule == "divergence"]
    assert finding.step == 510


def test_the_rows_of_a_loss_that_is_no_number_are_named_before_the_rate(tmp_path):
    (finding,) = diagnose(not_a_number(Simulated("8b")).write(tmp_path))
    assert finding.step == 400 and "my.jsonl:17" in finding.evidence
    assert "my.jsonl:17, my.jsonl:18" in finding.advice[0]
    assert finding.advice[1].startswith("`trainer.learning_rate: 6.7e-6` (was 2.0e-5)")


def test_a_run_that_diverged_before_its_first_line_is_diagnosed_all_the_same(tmp_path):
    run = not_a_number(Simulated("8b")).write(tmp_path)
    run.folder.metrics.write_text("")
    assert [finding.rule for finding in diagnose(read(run.folder))] == ["divergence"]


def test_a_schedule_that_is_not_known_in_closed_form_is_not_said_to_be_looked_at(tmp_path):
    run = Simulated("8b", overrides=("trainer.lr_scheduler_type=polynomial", "allow_out_of_range=[lr_scheduler_type]"))
    lines = text(run.change("learning_rate", lambda _, share: 1e-3).write(tmp_path), [])
    assert "schedule (scheduled_rate)" in lines[-1] and "schedule" not in lines[-2]


def with_rate(rate, recipe="8b", **named):
    outside = (f"trainer.learning_rate={rate}", "allow_out_of_range=[learning_rate]")
    return Simulated(recipe, overrides=outside, **named)


@pytest.mark.parametrize(
    ("rate", "rule", "severity", "evidence"),
    [
        ("2e-4", "instability", "yellow", "4 times the highest of row 7-13b"),
        ("2e-2", "instability", "red", "400 times the highest of row 7-13b"),
        ("2e-6", "plateau", "yellow", "5 times below the lowest of row 7-13b"),
        ("1e-8", "plateau", "red", "1000 times below the lowest of row 7-13b"),
    ],
)
def test_a_rate_far_from_its_row_is_told_where_its_curves_look_like_any(rate, rule, severity, evidence, tmp_path):
    """A rate that Adam and clipping bear, or that learns slowly, shows in no curve."""
    (finding,) = diagnose(with_rate(rate).write(tmp_path))
    assert (finding.rule, finding.severity) == (rule, severity) and evidence in finding.evidence
    assert "`trainer.learning_rate: 2.0e-5`" in finding.advice[0] and "where row 7-13b starts" in finding.advice[0]


def test_a_rate_that_is_meant_to_be_outside_its_row_is_left_in_peace(tmp_path):
    assert diagnose(with_rate("1e-4").write(tmp_path / "twice")) == []
    assert diagnose(with_rate("2e-4", accuracy=0.97).write(tmp_path / "learnt")) == []


def test_norms_that_began_near_the_limit_do_not_explode(tmp_path):
    """A model from nothing begins with norms of 8; that they are 11 later is no reason to lower a rate."""
    run = Simulated("tiny", begin=7.4, end=5.0).change("grad_norm", lambda _, share: 8 + 3 * share)
    assert diagnose(run.write(tmp_path)) == []


def test_a_run_that_has_logged_nothing_is_refused_in_one_line(tmp_path):
    run = Simulated("8b", state="running").write(tmp_path)
    run.folder.metrics.unlink()
    with pytest.raises(UserError, match="has logged nothing yet") as refused:
        read(RunDir(tmp_path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("disease", "recipe", "line"),
    [
        (
            rising_for_good,
            "8b",
            "`trainer.learning_rate: 6.7e-6` (was 2.0e-5), and `allow_out_of_range: [learning_rate]`",
        ),
        (rising_for_good, "tiny", "`trainer.learning_rate: 6.7e-4` (was 2.0e-3)"),
        (exploding_gradients, "8b", "`trainer.learning_rate: 1.0e-5` (was 2.0e-5)"),
        (
            exploding_gradients,
            "1b",
            "`trainer.learning_rate: 2.5e-5` (was 5.0e-5), and `allow_out_of_range: [learning_rate]`",
        ),
        (exploding_gradients, "1b", "`trainer.warmup_ratio: 0.1` (was 0.05)"),
        (exploding_gradients, "70b", "`trainer.warmup_ratio: 0.05` (was 0.03)"),
        (too_low_a_rate, "8b", "`trainer.learning_rate: 4.0e-5` (was 2.0e-5)"),
        (
            too_low_a_rate,
            "70b",
            "`trainer.learning_rate: 4.0e-5` (was 2.0e-5), and `allow_out_of_range: [learning_rate]`",
        ),
        (memorising, "8b", "`trainer.learning_rate: 1.0e-5` (was 2.0e-5)"),
        (memorising, "8b", "`trainer.num_train_epochs: 2` (was 3)"),
        (memorising, "8b", "`trainer.weight_decay: 0.05` (was 0.01), and `allow_out_of_range: [weight_decay]`"),
        (memorising, "1b", "`trainer.weight_decay: 0.05` (was 0.01)"),
        (forgetting, "8b", "size: lora-7-13b"),
        (slow_loader, "8b", "`trainer.dataloader_num_workers: 4` (was 0)"),
        (out_of_memory, "8b", "takes less memory: `parallelism=zero3`"),
    ],
)
def test_advice_is_the_recipes_line_with_its_new_value(disease, recipe, line, tmp_path):
    advice = said(diagnose(disease(Simulated(recipe, lines=200)).write(tmp_path)))
    (found,) = [given for given in advice.splitlines() if line in given]
    assert ("allow_out_of_range" in line) == ("allow_out_of_range" in found)


def test_what_is_advised_is_a_recipe_that_loads(tmp_path):
    from sft_recipes.config import loader

    for number, (disease, recipe) in enumerate([(rising_for_good, "8b"), (memorising, "8b"), (too_low_a_rate, "70b")]):
        for line in said(diagnose(disease(Simulated(recipe, lines=200)).write(tmp_path / str(number)))).splitlines():
            if line.startswith("`trainer.learning_rate"):
                key, value = line.split("`")[1].split(": ")
                outside = ["allow_out_of_range=[learning_rate]"] if "allow_out_of_range" in line else []
                assert loader.load(recipe, [f"{key}={value}", *outside]).trainer["learning_rate"] == float(value)


def test_overfitting_is_dated_by_the_best_step_and_says_that_it_is_kept(tmp_path):
    (finding,) = diagnose(memorising(Simulated("8b")).write(tmp_path))
    assert finding.step == 400 and "final/ is the best step" in finding.evidence


def test_thresholds_are_the_plans(tmp_path):
    quiet = Simulated("8b", overrides=("monitor.data_wait=0.5",))
    assert diagnose(slow_loader(quiet).write(tmp_path)) == []


def test_a_run_that_went_on_under_another_rate_is_not_held_against_the_new_one(tmp_path):
    run = schedule(peak=3)(Simulated("8b")).write(tmp_path)
    plan = json.loads(run.folder.plan.read_text())
    run.folder.plan.write_text(json.dumps({**plan, "allowed_changes": ["learning_rate"]}))
    assert diagnose(read(run.folder)) == []


def test_a_folder_of_another_version_is_read_with_what_it_has(tmp_path):
    run = Simulated("8b").write(tmp_path)
    run.folder.plan.write_text('{"recipe": "8b"}')
    run.folder.manifest.unlink()
    lines = [{"step": step, "loss": 2 - step / 100} for step in range(1, 40)]
    run.folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    bare = read(run.folder)
    assert diagnose(bare) == []
    shown = "\n".join(text(bare, []))
    assert "not judged, too few figures" in shown and "forgetting (eval_retention_loss)" in shown


def test_the_text_holds_nothing_that_a_terminal_obeys(tmp_path):
    run = not_a_number(Simulated("8b"))
    run.manifest["diverged"]["rows"] = ["a\x1b[2Jb.jsonl:1"]
    written = run.write(tmp_path)
    shown = text(written, diagnose(written))
    assert shown[0].startswith("not healthy, 1 finding: ")
    assert all(line.isprintable() or not line for line in shown) and "a\\x1b[2Jb.jsonl:1" in "".join(shown)


def test_red_findings_ruin_a_run_and_yellow_ones_do_not(tmp_path):
    assert ruined(diagnose(forgetting(Simulated("8b")).write(tmp_path / "red")))
    yellow = diagnose(slow_loader(Simulated("8b")).write(tmp_path / "yellow"))
    assert yellow and not ruined(yellow)


def test_the_page_is_what_the_rules_say():
    assert PAGE.read_text(encoding="utf-8") == _page(), f"run {__doc__.split('`')[1]}"


HEAD = """# Troubleshooting

    make diagnose RUN=tiny-1     what is wrong with a run, and which line of the recipe to change
    make report RUN=tiny-1       its curves on one page, runs/tiny-1/report.html

Both read a run's folder while it trains or after, here or elsewhere. `diagnose --json` prints the findings for machines,
and leaves with 1 where one is red. A value that is advised outside the range of the recipe's size row comes with the
`allow_out_of_range` that lets it pass. The table is written by `tests/unit/test_diagnose.py` from the rules themselves.

## What ends a run before there is something to diagnose

| what is seen | what it is | what to do |
|---|---|---|
| `error: …`, exit code 2 | the recipe or the data is wrong | the line says what, where, and the way out |
| out of memory | the plan's estimate was short, or another process holds memory | `make plan` shows the parts; `batch.max_per_device_batch_size: 1`, `trainer.gradient_checkpointing: true`, a sharded engine (`parallelism=zero3`), more GPUs, LoRA |
| `rank 1 on … was ended by SIGKILL` | the memory of the host or of its container, or a scheduler | the system's log; the same command goes on from the newest checkpoint |
| `rank 1 on … hangs in step 7` | no rank moved for `monitor.heartbeat_timeout_seconds` | `stack_traces/` in the run's folder says what each rank was doing; the same command goes on; raise the guard where steps are that slow |
| `3 starts in a row have come no further`, exit code 4 | the same fault each time, such as one row | the line says which; mend it, then `RESUME=1` goes on |
| no line for minutes | the first start compiles, downloads, or loads | `log.txt` in the run's folder |
| garbled answers, a loss that falls | the loss looks at other words than meant | `make inspect` shows what it looks at |

## Signs, and what to do

Thresholds are set under `guards:` in the recipe; these are the defaults. A sign is believed where it stands outside what
the run's own lines scatter, so a short or noisy run is left in peace. The first finding is the first to act on; what it
explains is not told beside it.

"""


def _page():
    defaults = dataclasses.asdict(Monitor())
    rows = ["| sign | what is looked at | set by | what to do |", "|---|---|---|---|"]
    for rule in RULES:
        keys = [key for _, key, _, _ in string.Formatter().parse(rule.looks_at) if key]
        values = {key: scientific(defaults[key]) if defaults[key] < 1e-3 else f"{defaults[key]:g}" for key in keys}
        set_by = ", ".join(f"`guards.{key}: {value}`" for key, value in values.items()) or "fixed"
        looks_at = rule.looks_at.format(**values)
        rows.append(f"| **{rule.title}**<br>`{rule.name}` | {looks_at} | {set_by} | {rule.remedy} |")
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(_page(), encoding="utf-8")
