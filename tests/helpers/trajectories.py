"""Twenty optimizer steps over two epochs of a prime number of rows of ragged lengths, and how two such runs differ.

Each run is trained once and shared by the tests.
"""

import hashlib
import json
import os
import random
from pathlib import Path

import pytest
import torch
from helpers.workplace import SMALL_ARCHITECTURE, metrics
from safetensors.torch import load_file

from sft_recipes.data.toy import toy_dataset

SEVERAL = ("ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2")
RECIPE = (
    "batch.effective_batch_size=8", "batch.max_per_device_batch_size=2", "trainer.num_train_epochs=2", "trainer.max_length=128",
    "trainer.eval_steps=5", "trainer.save_steps=10", "trainer.logging_steps=1", "generation.show=0",
    "generation.score=0", "size=tiny",
)  # fmt: skip
# Adapters, in bf16: at twice this learning rate its rounding grows to 6e-3 of a loss within the twenty steps.
ADAPTERS = ("lora.r=4", "trainer.learning_rate=5e-3", "trainer.gradient_checkpointing=true")


@pytest.fixture(scope="session")
def data(shared_workplace):
    """83 conversations to train on unpacked, 299 that pack into 97 rows; 31 to validate on."""
    rows = toy_dataset.rows(600, held_out=False)
    random.Random(7).shuffle(rows)
    for name, part in (("few", rows[:83]), ("many", rows[100:399]), ("validation", rows[500:531])):
        written = shared_workplace.path / f"{name}.jsonl"
        if not written.exists():
            partial = written.with_suffix(f".{random.random()}")
            partial.write_text("".join(json.dumps(row) + "\n" for row in part))
            partial.replace(written)
    return shared_workplace.path


@pytest.fixture(scope="session")
def follow(shared_workplace, data):
    """Train with a strategy and return the run."""

    def train(parallelism, processes, packing=False, precision="fp32", *overrides):
        key = hashlib.sha256(" ".join(overrides).encode()).hexdigest()[:8] if overrides else "plain"
        name = "-".join([parallelism, str(processes), "packed" if packing else "padded", precision, key])
        return shared_workplace.trained_once(
            name, *arguments(data, parallelism, processes, packing, precision), *overrides
        )

    return train


def arguments(data, parallelism, processes, packing, precision):
    """The arguments after `train tiny --name …`."""
    source = "many" if packing else "few"
    return [
        "--gpus", "0", "--processes", str(processes), f"parallelism={parallelism}",
        f"precision={precision}", f"trainer.packing={str(packing).lower()}", f"data.train={data / source}.jsonl",
        f"data.validation={data / 'validation'}.jsonl", *RECIPE, SMALL_ARCHITECTURE,
    ]  # fmt: skip


def differences(one, several):
    """The largest relative difference of a loss, of an eval_loss, and the largest absolute one of a final weight."""
    left, right = ([line for line in metrics(run) if "loss" in line or "eval_loss" in line] for run in (one, several))
    assert [line["step"] for line in left] == [line["step"] for line in right]
    found = {"loss": 0.0, "eval_loss": 0.0}
    for mine, theirs in zip(left, right, strict=True):
        assert mine["supervised_tokens_seen"] == theirs["supervised_tokens_seen"]
        assert mine.get("rows_hash") == theirs.get("rows_hash"), f"other rows at step {mine['step']}"
        for key in ("loss", "eval_loss"):
            if key in mine:
                found[key] = max(found[key], abs(theirs[key] - mine[key]) / abs(mine[key]))
    ours, theirs = (trained_weights(run / "last") for run in (one, several))
    for weights in (ours, theirs):  # DeepSpeed and FSDP2 also write the output layer of a tied architecture
        tied = weights.pop("lm_head.weight", None)
        assert tied is None or torch.equal(tied, weights["model.embed_tokens.weight"])
    assert ours.keys() == theirs.keys()
    found["weight"] = max((ours[name].float() - theirs[name].float()).abs().max().item() for name in ours)
    return found


def trained_weights(folder):
    adapters = folder / "adapter_model.safetensors"
    return load_file(adapters if adapters.is_file() else folder / "model.safetensors")


def record(**measured):
    """Append a measurement for docs and benchmarks/strategies.py to the file STRATEGIES_REPORT, if it is set."""
    if os.environ.get("STRATEGIES_REPORT"):
        with Path(os.environ["STRATEGIES_REPORT"]).open("a") as lines:
            lines.write(json.dumps(measured) + "\n")
