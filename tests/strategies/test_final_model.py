"""A bf16 base model gives a bf16 final/, converted from the weights of the best step, with each kind of saved weights.

One process: tests/unit/test_weight_files.py; DDP saves as it does, and ZeRO with precision fp32 as FSDP2.
"""

import json

import pytest
import torch
from helpers.workplace import SHORT, manifest, needs_compiler
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize(
    ("strategy", "precision", "trained"),
    [
        ("fsdp2", "bf16", torch.float32),
        pytest.param("zero3", "bf16", torch.bfloat16, marks=needs_compiler),  # language: ok, pytest
    ],
)
def test_final_has_the_dtype_of_the_base_model(
    shared_workplace, bf16_model_folder, few_rows, strategy, precision, trained
):
    run = shared_workplace.trained(
        "tiny", "--name", f"published-{strategy}", "--gpus", "0", "--processes", "2", f"parallelism={strategy}",
        f"precision={precision}", *SHORT, "model.from_scratch=false", "model.architecture={}",
        f"model.name_or_path={bf16_model_folder}", f"data.train={few_rows}",
    )  # fmt: skip
    final, best = (
        load_file(run / name / "model.safetensors") for name in ("final", f"best-{manifest(run)['best_step']}")
    )
    assert {tensor.dtype for tensor in best.values()} == {trained}
    assert final.keys() == best.keys()
    assert all(torch.equal(final[name], best[name].bfloat16()) for name in best)
    assert json.loads((run / "final" / "config.json").read_text())["dtype"] == "bfloat16"
    model, loading = AutoModelForCausalLM.from_pretrained(run / "final", output_loading_info=True)
    assert model.dtype == torch.bfloat16 and not loading["missing_keys"]
