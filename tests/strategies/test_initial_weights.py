"""A run starts from the fp32 weights of the last step of another one, also where training computes with bf16 weights."""

import pytest
import torch
from helpers.workplace import SHORT, needs_compiler
from safetensors.torch import load_file

pytestmark = needs_compiler

# At this rate no weight moves: a weight that was rounded to bf16 on the way would differ by up to 0.4%.
STAY = ("trainer.learning_rate=1e-12", "allow_out_of_range=[learning_rate]")


@pytest.mark.parametrize(
    ("parent", "child", "method", "file"),
    [
        ("zero2", "zero3", (), "model.safetensors"),
        ("zero3", "zero2", ("lora.r=4",), "adapter_model.safetensors"),
        ("zero2", "fsdp2", ("lora.r=4",), "adapter_model.safetensors"),
    ],
)
def test_run_starts_from_fp32_weights(shared_workplace, few_rows, parent, child, method, file):
    common = ("--gpus", "0", "--processes", "2", "precision=bf16", f"data.train={few_rows}", *method, *SHORT)
    names = [f"{kind}-{parent}-{child}" for kind in ("parent", "child")]
    first = shared_workplace.trained(
        "tiny", "--name", names[0], f"parallelism={parent}", *common, "trainer.max_steps=4"
    )
    second = shared_workplace.trained(
        "tiny", "--name", names[1], "--init-from", names[0], f"parallelism={child}", *common, "trainer.max_steps=1", *STAY
    )  # fmt: skip
    before, after = load_file(first / "last" / file), load_file(second / "last" / file)
    assert {weight.dtype for weight in (*before.values(), *after.values())} == {torch.float32}
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in before.values()), "fp32 in name only"
    for name in after:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-9)
