"""A model that returns NaN for one character, and the checks of a run that trains it."""

import json

import pytest
import torch
from helpers.workplace import SHORT, SMALL_LLAMA, manifest, metrics
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_recipes.data.toy import toy_model

POISON = "%"


@pytest.fixture(scope="module")
def poisoned_model(tmp_path_factory):
    """A model whose logits are NaN for rows with one character, as a single broken weight makes it."""
    folder = tmp_path_factory.mktemp("poisoned") / "model"
    texts = ["Add 12 and 30.", "It is 42.", POISON] * 50
    toy_model.build({**SMALL_LLAMA, "tie_word_embeddings": False}, texts, folder, seed=0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer(POISON, add_special_tokens=False)["input_ids"][-1]] = torch.nan
    model.save_pretrained(folder)
    return folder


def rows_with(poisoned, count=120):
    rows = [
        {"messages": [{"role": "user", "content": f"Add {n} and {n}."}, {"role": "assistant", "content": f"It is {2 * n}."}]}
        for n in range(count)
    ]  # fmt: skip
    for number in poisoned:
        rows[number]["messages"][0]["content"] = f"Add {POISON} and {number}."
    return rows


def from_model(folder, *more):
    return ("model.from_scratch=false", "model.architecture={}", f"model.name_or_path={folder}", *more)


def check_nan_stops_run(workplace, poisoned_model, write_rows, strategy, processes, packing):
    """Train on one such row, which only one rank has; the weights must be those of the step before."""
    train, validation = write_rows(rows_with([77])), write_rows(rows_with([], 8), "validation.jsonl")
    done = workplace.sft(
        "train", "tiny", "--gpus", "0", "--processes", str(processes), f"parallelism={strategy}", *SHORT,
        *from_model(poisoned_model, f"data.train={train}", f"data.validation={validation}"),
        "data.max_overlap=1", f"trainer.packing={packing}", "trainer.max_steps=15", "trainer.eval_steps=100",
        "trainer.save_steps=1", "trainer.max_length=64", "batch.max_per_device_batch_size=2",
    )  # fmt: skip
    assert done.returncode == 3, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "the loss is NaN or Inf; no rank applied the step" in line and f"{train.name}:78" in line
    (run,) = [path.parent for path in workplace.runs.glob("*/manifest.json")]
    record = manifest(run)
    assert (record["state"], record["exit_code"]) == ("diverged", 3)
    assert any(place.endswith(f"{train.name}:78") for place in record["diverged"]["rows"])
    if packing == "false":
        assert len(record["diverged"]["rows"]) <= 2, "of the step, one micro-batch"
    step = record["diverged"]["step"]
    assert metrics(run)[-1]["step"] == step and metrics(run)[-1]["loss"] == "NaN", "the raw value is logged"
    assert record["steps"] == step - 1 and not (run / f"checkpoint-{step}").exists()
    diagnosis = workplace.sft("diagnose", run.name, "--json")
    assert diagnosis.returncode == 1 and json.loads(diagnosis.stdout)["findings"][0]["rule"] == "divergence"
