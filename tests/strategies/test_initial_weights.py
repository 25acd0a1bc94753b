"""A run starts from the fp32 weights of the last step of another one, also where training computes with bf16 weights."""

import pytest
import torch
from helpers.trajectories import ADAPTERS, arguments, data, follow
from helpers.workplace import needs_compiler
from safetensors.torch import load_file

__all__ = ["data", "follow"]  # fixtures
pytestmark = needs_compiler

# At this rate no weight moves: a weight that was rounded to bf16 on the way would differ by up to 0.4%.
STAY = ("trainer.max_steps=1", "trainer.learning_rate=1e-12", "allow_out_of_range=[learning_rate]")


@pytest.mark.parametrize(
    ("parent", "child", "method", "file"),
    [
        ("zero2", "zero3", (), "model.safetensors"),
        ("zero3", "zero2", ADAPTERS, "adapter_model.safetensors"),
        ("zero2", "fsdp2", ADAPTERS, "adapter_model.safetensors"),
    ],
)
def test_run_starts_from_fp32_weights(shared_workplace, follow, data, parent, child, method, file):
    packing = not method  # as the runs of test_trajectories.py
    first = follow(parent, 2, packing, "bf16", *method)
    second = shared_workplace.trained(
        "tiny", "--name", f"child-{parent}-{child}", "--init-from", first.name,
        *arguments(data, child, 2, packing, "bf16"), *method, *STAY,
    )  # fmt: skip
    before, after = load_file(first / "last" / file), load_file(second / "last" / file)
    assert {weight.dtype for weight in (*before.values(), *after.values())} == {torch.float32}
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in before.values()), "fp32 in name only"
    for name in after:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-9)
