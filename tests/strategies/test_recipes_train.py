"""Shipped recipes train, with their architecture shrunk to two thin layers, under their own strategy: on one process if
they have one GPU, else on two. Of recipes alike one trains; SFTConfig and launch of each: tests/integration/test_fake_gpus.py.
"""

import json
import math

import pytest
import torch
from helpers.recipes import SHIPPED
from helpers.workplace import manifest, metrics, needs_compiler
from safetensors.torch import load_file

from sft_recipes.config import loader, sizes
from sft_recipes.data.toy import toy_dataset
from sft_recipes.launch.topology import plan_topology
from sft_recipes.planner import plan as plans

pytestmark = needs_compiler

# They differ in what does not change how they train: size, model family, learning rate.
ALIKE = {"3b": "1b", "8b": "7b", "32b": "13b", "70b": "13b", "70b-qlora": "8b-qlora"}
NAMES = [name for name in SHIPPED if name != "tiny" and name not in ALIKE]
# A small vocabulary and thin layers, in multiples of 64 for 4-bit blocks; all else is the recipe's.
THIN = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}


def shrink(recipe):
    architecture = {**recipe.model.architecture, **THIN, "max_position_embeddings": 512}
    grouped = recipe.model.architecture["num_key_value_heads"] < recipe.model.architecture["num_attention_heads"]
    architecture["num_key_value_heads"] = 2 if grouped else 4
    architecture.pop("head_dim", None)
    if "num_experts" in architecture:
        architecture |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return architecture


def kind(name):
    """What decides how a recipe trains. Activation checkpointing is not part of it: it changes no result."""
    recipe = loader.load(name)
    plan = plans.resolve(recipe, plan_topology(recipe))
    return plan.parallelism, plan.method, plan.precision, plan.packing, plan.sections.trainer.get("optim")


def test_each_recipe_that_does_not_train_is_like_one_that_does():
    assert set(NAMES) | set(ALIKE) | {"tiny"} == set(SHIPPED) and len(NAMES) >= 8
    assert {name: kind(name) for name in ALIKE} == {name: kind(other) for name, other in ALIKE.items()}


@pytest.fixture(scope="session")
def rows(shared_workplace):
    """400 conversations; each architecture prepares them separately."""
    file = shared_workplace.path / "for-recipes.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in toy_dataset.rows(400, held_out=False)))
    return file


@pytest.mark.parametrize("name", NAMES)
def test_recipe_trains_three_steps(shared_workplace, rows, name):
    recipe = loader.load(name)
    planned = plans.resolve(recipe, plan_topology(recipe))  # on the recipe's own hardware
    parallelism, processes = planned.parallelism, min(planned.world_size, 2)
    recomputes = planned.sections.trainer["gradient_checkpointing"]
    run = shared_workplace.trained(
        name, "--name", name, "--gpus", "0", "--processes", str(processes), "model.name_or_path=", "model.from_scratch=true",
        f"model.architecture={json.dumps(shrink(recipe))}", f"data.train={rows}",
        "data.validation=toy:validation", "data.max_eval_samples=20", "trainer.max_length=64",
        "trainer.max_steps=3", "trainer.logging_steps=1", "trainer.eval_steps=2", "trainer.save_steps=2",
        "generation.show=0", "batch.max_per_device_batch_size=4", f"parallelism={parallelism}", f"trainer.gradient_checkpointing={recomputes}".lower(),
    )  # fmt: skip
    plan, config = (json.loads((run / file).read_text()) for file in ("plan.json", "sft_config.json"))
    assert (plan["parallelism"], plan["method"], plan["precision"]) == (parallelism, recipe.method, "bf16")
    assert manifest(run)["dtypes"].items() >= plan["dtypes"].items()
    for key in sizes.size_classes()[plan["size"]].ranges:
        value = sizes.hyperparameter(recipe, key)[0]
        assert plan[key] == value
        if key in config:
            assert config[key] == value, key
    batch = config["per_device_train_batch_size"] * config["gradient_accumulation_steps"] * processes
    assert batch == plan["effective_batch_size"]
    losses = [line["loss"] for line in metrics(run) if "loss" in line]
    assert len(losses) == 3 and all(abs(loss - math.log(THIN["vocab_size"])) < 0.5 for loss in losses), (
        "not the loss of random weights"
    )
    if recipe.lora:
        adapters = load_file(run / "final" / "adapter_model.safetensors")
        assert all(tensor.abs().sum() > 0 for tensor in adapters.values()), "B starts at zero"
    else:
        before = load_file(json.loads((run / "prepared.json").read_text())["model"] + "/model.safetensors")
        after = load_file(run / "final" / "model.safetensors")
        changed = [name for name in before if not torch.equal(before[name].to(after[name].dtype), after[name])]
        assert len(changed) > len(before) / 2
