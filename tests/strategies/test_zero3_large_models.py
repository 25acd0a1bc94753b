"""ZeRO-3 with a model that is larger than DeepSpeed's reuse distance, whose weights are released between uses.

The distance is a billion weights, so no model of the other tests exceeds it. Without `patches.gather_output_layer_with_model`
such a model fails in its first step: TRL's loss partitions an output layer that is being gathered.
"""

import json
import shutil
import subprocess
import sys

import pytest
from helpers.workplace import FEW_STEPS, REPOSITORY, metrics, needs_compiler

pytestmark = needs_compiler
MODEL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "vocab_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
# `python -m sft_recipes` with the configuration files of a folder.
WITH_CONFIGS = """
import pathlib, sys
from sft_recipes import cli
from sft_recipes.launch import command
command.REPOSITORY = pathlib.Path(sys.argv[1])
sys.exit(cli.main(sys.argv[2:]))
"""
REUSE_DISTANCE = 39_000  # about one of the six layers, as a billion is of 8B


@pytest.mark.parametrize(
    ("tied", "more", "patched"),
    [(False, (), True), (False, (), False), (True, (), True), (False, ("lora.r=4",), True)],
    ids=["untied", "untied, not patched", "tied", "adapters"],
)
def test_weights_that_are_released_between_uses_train(tmp_path, shared_workplace, tied, more, patched):
    copy = tmp_path / "repository"
    for name in ("accelerate_configs", "deepspeed_configs", *(() if patched else ("sft_recipes", "recipes"))):
        shutil.copytree(REPOSITORY / name, copy / name)
    file = copy / "deepspeed_configs" / "zero3.json"
    config = json.loads(file.read_text())
    distances = dict.fromkeys(("stage3_max_reuse_distance", "stage3_max_live_parameters"), REUSE_DISTANCE)
    config["zero_optimization"] |= distances | {"stage3_prefetch_bucket_size": 8000}
    file.write_text(json.dumps(config))
    variables = shared_workplace.environment(RUNS_DIR=str(tmp_path / "runs"))
    if not patched:
        variables["PYTHONPATH"] = str(copy)
        patches = copy / "sft_recipes" / "training" / "patches.py"
        call = "        gather_output_layer_with_model(trainer.model)\n"
        assert patches.read_text().count(call) == 1
        patches.write_text(patches.read_text().replace(call, "        pass\n"))
    done = subprocess.run(
        [
            sys.executable, "-c", WITH_CONFIGS, copy, "train", "tiny", "--name", "large", "--gpus", "0", "--processes", "2",
            "parallelism=zero3", *FEW_STEPS, *more, f"model.architecture={json.dumps({**MODEL, 'tie_word_embeddings': tied})}",
        ],
        cwd=copy, env=variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if not patched:
        assert done.returncode == 1 and "Cannot partition a param in" in done.stderr, (
            "upstream is fixed: remove the patch"
        )
        return
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "runs" / "large" / "deepspeed.json").read_text())["zero_optimization"]
    assert found["stage3_max_reuse_distance"] == REUSE_DISTANCE
    assert [line["step"] for line in metrics(tmp_path / "runs" / "large") if "loss" in line][-1] == 8
