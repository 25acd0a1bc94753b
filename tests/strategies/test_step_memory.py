"""The plan's memory forecast against one optimizer step on fake tensors of the real shapes, within 2%.

This compares the forecast with the allocations of torch, transformers, peft, accelerate and TRL; the plan's reserve
covers the driver, context, NCCL and fragmentation of a GPU.
"""

import pytest
from helpers.fake_step import peak_bytes, simulate_cuda

from sft_recipes.config import loader
from sft_recipes.planner import memory
from sft_recipes.planner import plan as plans

GIB = 2**30
# Recipe, GPUs, overrides, and number of decoder layers if fewer show every phase of a step.
CASES = {
    "1b": ("1b", 1, ("batch.max_per_device_batch_size=4",), None),
    "3b": ("3b", 1, ("batch.max_per_device_batch_size=2",), 18),
    "8b": ("8b", 1, ("parallelism=single", "batch.max_per_device_batch_size=4"), 16),
    "8b, LoRA": ("8b-lora", 1, ("batch.max_per_device_batch_size=2",), 3),
    "8b, FSDP2": ("8b", 8, ("parallelism=fsdp2", "batch.max_per_device_batch_size=4"), 8),
}
ONE_GPU = ("1b", "3b", "8b")


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [*((name, "true") for name in CASES), *((name, "false") for name in ONE_GPU), ("1b", "2"), ("8b, FSDP2", "2")],
)
def test_step_peak_is_within_two_percent_of_plan(monkeypatch, name, checkpointing):
    recipe_name, gpus, overrides, layers = CASES[name]
    recipe = loader.load(recipe_name, (*overrides, f"trainer.gradient_checkpointing={checkpointing}"))
    plan = plans.resolve(recipe, plans.Topology(gpus, gpus, gpu_type="h200-141g"))
    architecture = dict(recipe.model.architecture)
    architecture["num_hidden_layers"] = layers or architecture["num_hidden_layers"]
    planned = memory.bytes_per_gpu(plans.memory_inputs(plan, architecture))
    simulate_cuda(monkeypatch)
    tracked = peak_bytes(plan, architecture)
    parts = {part: round(number / GIB, 2) for part, number in planned.items()}
    assert tracked == pytest.approx(planned["total"], rel=0.02), f"{tracked / GIB:.2f} GiB tracked, planned {parts}"
