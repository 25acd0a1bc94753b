import dataclasses
import json
import subprocess
import sys

import pytest

from sft_recipes.config import loader
from sft_recipes.planner import plan as plans
from sft_recipes.planner import render
from sft_recipes.planner.plan import Prepared, Topology
from sft_recipes.runtime.errors import UserError

# The keys that scripts may rely on.
CONTRACT = (
    "recipe model parallelism world_size per_device_train_batch_size gradient_accumulation_steps effective_batch_size "
    "learning_rate lr_scheduler_type num_train_epochs warmup_ratio warmup_steps weight_decay max_grad_norm max_length "
    "optimizer_steps memory_bytes_per_gpu fits"
).split()


def tiny(*overrides, processes=1):
    return plans.resolve(loader.load("tiny", overrides), Topology(gpus=0, processes=processes))


def prepared(rows, **changes):
    facts = {"fingerprint": "f", "folder": "x", "model": "m", "architecture": {}, "examples": rows * 10, "rows": rows}
    return Prepared(**{**facts, "supervised_tokens": rows * 50, "tokens": rows * 400, "validation_rows": 5, **changes})


def test_the_plan_for_machines_carries_the_contract(workplace):
    done = workplace.sft("plan", "tiny", "--json")
    assert done.returncode == 0
    assert [key for key in CONTRACT if key not in json.loads(done.stdout)] == []


def test_planning_never_imports_a_heavy_library():
    code = (
        "import sys; from sft_recipes.cli import main; "
        "[main(words) for words in (['recipes'], ['plan', 'tiny'], ['plan', 'tiny', '--json'])]; "
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'accelerate', 'numpy', 'rich'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_plan_written_and_read_is_the_same_plan(tmp_path):
    plan = tiny("trainer.learning_rate=1e-3")
    plans.write(plan, tmp_path / "plan.json")
    assert plans.read(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
def test_a_broken_plan_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(UserError, match="not a plan that this version wrote"):
        plans.read(tmp_path / "plan.json")


def test_steps_and_warm_up_are_estimates_until_the_data_is_prepared():
    plan = tiny()
    assert not plan.data_prepared
    settled = plans.with_prepared_data(plan, prepared(rows=101))
    assert settled.data_prepared
    assert settled.steps_per_epoch == 101 // plan.effective_batch_size
    assert settled.dropped_rows_per_epoch == 101 % plan.effective_batch_size
    assert settled.optimizer_steps == settled.steps_per_epoch * plan.num_train_epochs
    assert settled.examples_per_step == 10 * plan.effective_batch_size
    assert settled.supervised_tokens_per_step == 50 * plan.effective_batch_size


def test_fewer_rows_than_one_effective_batch_are_refused_before_anything_loads():
    with pytest.raises(UserError, match="1 rows, fewer than one effective batch"):
        plans.with_prepared_data(tiny(), prepared(rows=1))


def test_fewer_steps_than_the_recipe_wants_are_refused_with_the_way_out():
    with pytest.raises(UserError, match=r"fewer than 1000; add examples or epochs.*batch.min_optimizer_steps="):
        plans.with_prepared_data(tiny("batch.min_optimizer_steps=1000"), prepared(rows=100))


def test_the_same_batch_is_kept_on_two_processes():
    one, two = tiny(), tiny(processes=2)
    assert one.effective_batch_size == two.effective_batch_size
    for plan in (one, two):
        product = plan.per_device_train_batch_size * plan.gradient_accumulation_steps * plan.world_size
        assert product == plan.effective_batch_size
    assert (one.parallelism, two.parallelism) == ("single", "ddp")


def test_two_plans_of_one_run_differ_in_dates_and_forecasts_at_most():
    old, new = tiny(), plans.with_prepared_data(tiny(), prepared(rows=101))
    assert plans.find_differences(old, dataclasses.replace(new, created="another day")) == {}
    assert plans.find_differences(old, tiny("trainer.learning_rate=1e-3")) == {
        "learning_rate": (old.learning_rate, 1e-3),
    }
    other_data = dataclasses.replace(new, data_fingerprint="g")
    assert plans.find_differences(new, other_data) == {"data_fingerprint": ("f", "g")}


def test_other_data_or_another_model_takes_the_recipes_own_figures_along():
    plan = tiny("data.train=mine.jsonl")
    assert plan.optimizer_steps is None and plan.sections.data.validation is None
    plan = tiny("model.from_scratch=false", "model.name_or_path=some/model")
    assert plan.parameters is None and plan.memory_bytes_per_gpu is None and plan.fits is None
    kept = tiny("data.train=mine.jsonl", "data.validation=held_out.jsonl")
    assert kept.sections.data.validation == "held_out.jsonl"


def test_explain_says_of_every_value_where_it_came_from():
    plan = tiny("trainer.learning_rate=1e-3")
    lines = {line.split("  ")[0]: line for line in render.format_plan(plan, explain=True).splitlines()}
    assert lines["learning rate"].endswith("command line")
    assert lines["max grad norm"].endswith("recipes/sizes.yaml, row tiny")
    assert "recipes/tiny.yaml:" in lines["train data"]
    assert lines["gradient accumulation steps"].endswith("derived: effective batch / (micro-batch x world size)")
    without = render.format_plan(plan).splitlines()
    assert len(without) == len(lines)


def test_a_single_process_engine_on_two_processes_is_refused():
    with pytest.raises(UserError, match="parallelism is 'single', which is one process, found 2"):
        tiny("parallelism=single", processes=2)


def test_weights_are_never_bf16_without_a_master_copy():
    engines = [
        tiny(f"parallelism={engine}", f"precision={precision}", processes=2)
        for engine in ("ddp", "zero1", "zero2", "zero3")
        for precision in ("bf16", "fp32")
    ]
    assert len(engines) == 8
    assert all(plan.dtypes["weights"] == "fp32" or plan.dtypes["master"] == "fp32" for plan in engines)
    assert all(plan.dtypes["gradients"] == plan.dtypes["reduction"] == "fp32" for plan in engines)
