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


def test_plan_json_has_the_keys_of_the_contract(in_process):
    done = in_process("plan", "tiny", "--json")
    assert done.returncode == 0
    assert [key for key in CONTRACT if key not in json.loads(done.stdout)] == []


def test_plan_imports_no_heavy_library():
    code = (
        "import sys; from sft_recipes.cli import main; "
        "[main(arguments) for arguments in (['recipes'], ['plan', 'tiny'], ['plan', 'tiny', '--json'])]; "
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'accelerate', 'numpy', 'rich'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_plan_round_trips_through_json(tmp_path):
    plan = tiny("trainer.learning_rate=1e-3")
    plans.write(plan, tmp_path / "plan.json")
    assert plans.read(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
def test_plan_read_refuses_broken_file(tmp_path, content):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(UserError, match="not a plan of this version"):
        plans.read(tmp_path / "plan.json")


def test_plan_steps_are_estimates_until_data_is_prepared():
    plan = tiny()
    assert not plan.data_prepared
    settled = plans.with_prepared_data(plan, prepared(rows=101))
    assert settled.data_prepared
    assert settled.steps_per_epoch == 101 // plan.effective_batch_size
    assert settled.dropped_rows_per_epoch == 101 % plan.effective_batch_size
    assert settled.optimizer_steps == settled.steps_per_epoch * plan.num_train_epochs
    assert settled.examples_per_step == 10 * plan.effective_batch_size
    assert settled.supervised_tokens_per_step == 50 * plan.effective_batch_size


def test_plan_refuses_fewer_rows_than_one_batch():
    with pytest.raises(UserError, match="fewer than one effective batch: found 1 rows of 10 examples, expected 2"):
        plans.with_prepared_data(tiny(), prepared(rows=1))


def test_plan_refuses_too_few_steps_and_names_the_fix():
    with pytest.raises(UserError, match=r"expected 1000 or more. Add examples or epochs.*batch.min_optimizer_steps="):
        plans.with_prepared_data(tiny("batch.min_optimizer_steps=1000"), prepared(rows=100))


def test_plan_keeps_batch_on_two_processes():
    one, two = tiny(), tiny(processes=2)
    assert one.effective_batch_size == two.effective_batch_size
    for plan in (one, two):
        product = plan.per_device_train_batch_size * plan.gradient_accumulation_steps * plan.world_size
        assert product == plan.effective_batch_size
    assert (one.parallelism, two.parallelism) == ("single", "ddp")


def test_plan_differences_ignore_dates_and_forecasts():
    old, new = tiny(), plans.with_prepared_data(tiny(), prepared(rows=101))
    assert plans.find_differences(old, dataclasses.replace(new, created="another day")) == {}
    assert plans.find_differences(old, tiny("trainer.learning_rate=1e-3")) == {
        "learning_rate": (old.learning_rate, 1e-3),
    }
    other_data = dataclasses.replace(new, data_fingerprint="g")
    assert plans.find_differences(new, other_data) == {"data_fingerprint": ("f", "g")}


def test_override_of_data_or_model_drops_its_numbers():
    plan = tiny("data.train=mine.jsonl")
    assert plan.optimizer_steps is None and plan.sections.data.validation is None
    plan = tiny("model.from_scratch=false", "model.name_or_path=some/model")
    assert plan.parameters is None and plan.memory_bytes_per_gpu is None and plan.fits is None
    kept = tiny("data.train=mine.jsonl", "data.validation=held_out.jsonl")
    assert kept.sections.data.validation == "held_out.jsonl"


def test_explain_prints_origin_of_every_value():
    plan = tiny("trainer.learning_rate=1e-3")
    lines = {line.split("  ")[0]: line for line in render.format_plan(plan, explain=True).splitlines()}
    assert lines["learning rate"].endswith("command line")
    assert lines["max grad norm"].endswith("recipes/sizes.yaml, size class tiny")
    assert "recipes/tiny.yaml:" in lines["train data"]
    assert lines["gradient accumulation steps"].endswith("derived: effective batch / (micro-batch x world size)")
    without = render.format_plan(plan).splitlines()
    assert len(without) == len(lines)


def test_plan_refuses_single_on_two_processes():
    with pytest.raises(UserError, match="parallelism: single: found 2 processes, expected 1"):
        tiny("parallelism=single", processes=2)


def test_bf16_weights_have_fp32_master_weights():
    strategies = [
        tiny(f"parallelism={strategy}", f"precision={precision}", processes=2)
        for strategy in ("ddp", "zero1", "zero2", "zero3")
        for precision in ("bf16", "fp32")
    ]
    assert len(strategies) == 8
    assert all(plan.dtypes["weights"] == "fp32" or plan.dtypes["master"] == "fp32" for plan in strategies)
    assert all(plan.dtypes["gradients"] == plan.dtypes["reduction"] == "fp32" for plan in strategies)
