"""Metrics of a run, and the trackers' files, read by the trackers' own readers."""

import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.workplace import PLANTED_KEY, manifest, metrics

from sft_recipes.config import loader
from sft_recipes.planner import cost, memory
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Topology
from sft_recipes.training import throughput
from sft_recipes.training.callbacks.metrics import append

ON_A_TRAINING_LINE = {
    "step", "epoch", "loss", "grad_norm", "learning_rate", "mean_token_accuracy", "entropy", "step_seconds",
    "data_wait_fraction", "padded_tokens_per_second", "tokens_per_second", "supervised_tokens_per_second", "host_memory_bytes",
    "supervised_tokens_seen", "rows_hash", "num_input_tokens_seen",
}  # fmt: skip
GAP = {"train_eval_gap", "overfitting_signal"}


def training_lines(run):
    return [line for line in metrics(run) if "loss" in line]


def evaluations(run):
    return [line for line in metrics(run) if "eval_loss" in line]


def test_training_lines_have_throughput_and_tokens(tracked_run):
    lines = training_lines(tracked_run)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert all(line.keys() >= ON_A_TRAINING_LINE for line in lines)
    for line in lines:
        assert line["padded_tokens_per_second"] >= line["tokens_per_second"] > line["supervised_tokens_per_second"] > 0
        assert 0 <= line["data_wait_fraction"] < 1 and line["step_seconds"] > 0
    supervised = [line["supervised_tokens_seen"] for line in lines]
    for before, line in zip([0, *supervised], lines, strict=False):
        counted = line["supervised_tokens_per_second"] * line["step_seconds"]
        assert counted == pytest.approx(line["supervised_tokens_seen"] - before)
    for before, line in itertools.pairwise(lines):
        counted = line["tokens_per_second"] * line["step_seconds"]
        assert counted == pytest.approx(line["num_input_tokens_seen"] - before["num_input_tokens_seen"])


def test_train_eval_gap_uses_the_last_training_loss(tracked_run):
    trained = {line["step"]: line["loss"] for line in training_lines(tracked_run)}
    for line in evaluations(tracked_run):
        assert line.keys() >= {*GAP, "eval_mean_token_accuracy"}
        assert line["train_eval_gap"] == pytest.approx(line["eval_loss"] - trained[line["step"]])
        assert line["overfitting_signal"] == float(line["train_eval_gap"] > 0.1)
    assert [line["step"] for line in evaluations(tracked_run)] == [4, 8]


def test_last_line_is_the_summary(tracked_run):
    last = metrics(tracked_run)[-1]
    assert last["final/total_steps"] == 8
    assert last["final/best_eval_loss"] == min(line["eval_loss"] for line in evaluations(tracked_run))
    assert last["final/epochs_completed"] == pytest.approx(training_lines(tracked_run)[-1]["epoch"])


def test_samples_have_the_same_prompts_at_every_evaluation(tracked_run):
    samples = [json.loads(line) for line in (tracked_run / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [4, 4, 8, 8]
    assert [sample["prompt"] for sample in samples[:2]] == [sample["prompt"] for sample in samples[2:]]
    assert all(sample.keys() == {"step", "prompt", "reference", "completion"} for sample in samples)


def test_tensorboard_files(tracked_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(tracked_run / "tensorboard"), size_guidance={"tensors": 0})
    read.Reload()
    names = set(read.Tags()["scalars"])
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "eval/loss", "train/tokens_per_second"} <= names
    assert {f"train/{name}" for name in GAP} <= names
    assert {"final/total_steps", "final/best_eval_loss", "final/epochs_completed"} <= names
    losses = {event.step: event.value for event in read.Scalars("train/loss")}
    assert losses == pytest.approx({line["step"]: line["loss"] for line in training_lines(tracked_run)}, rel=1e-6)
    text = read.Tensors("samples/0/text_summary")
    assert [event.step for event in text] == [4, 8] and b"reference" in text[0].tensor_proto.string_val[0]
    assert b'"recipe": "tiny"' in read.Tensors("plan/text_summary")[0].tensor_proto.string_val[0]


def wandb_records(run, kind):
    """The records of one kind in a run's latest W&B file, by W&B's own reader."""
    newest = max((run / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    reader = Path(sys.executable).with_name("wandb")
    read = subprocess.run([reader, "leet", "inspect", newest, "--json"], capture_output=True, text=True, check=True)
    return [record[kind] for record in map(json.loads, read.stdout.splitlines()) if record["type"] == kind]


def test_wandb_file(tracked_run):
    rows = [record["item"] for record in wandb_records(tracked_run, "history")]
    losses = {row["train/global_step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert losses == pytest.approx({line["step"]: line["loss"] for line in training_lines(tracked_run)})
    assert {row["train/global_step"] for row in rows if "eval/loss" in row} == {4, 8}
    assert any("train/train_eval_gap" in row for row in rows) and any(
        key.startswith("samples") for row in rows for key in row
    )
    summary = {
        key: value for record in wandb_records(tracked_run, "summary") for key, value in record["update"].items()
    }
    assert summary["final/total_steps"] == 8
    assert {"final/best_eval_loss", "final/epochs_completed"} <= summary.keys()
    started = wandb_records(tracked_run, "run")[0]
    assert (started["display_name"], started["project"]) == ("tracked", "sft-recipes")
    assert started["run_id"].startswith("tracked-")
    config = started["config"]["update"]
    assert (config["recipe"], config["effective_batch_size"]) == ("tiny", 8)


def test_finished_run_leaks_no_key(tracked_run):
    files = 0
    for path in tracked_run.rglob("*"):
        if path.is_file():
            files += 1
            assert PLANTED_KEY.encode() not in path.read_bytes(), path
    assert files > 30


def test_wandb_logs_offline_if_unreachable(tracked_run):
    """Nothing listens on that port; the file for a later upload is in the run directory (test_wandb_file)."""
    log = (tracked_run / "log.txt").read_text()
    assert "warning: wandb: " in log and "; logging offline. Upload it later: wandb sync" in log
    (attempt,) = (tracked_run / "wandb").glob("run-*/logs/debug.log")
    assert "communicating run to backend with 2.0 second timeout" in attempt.read_text(), "WANDB_INIT_TIMEOUT"
    assert manifest(tracked_run)["state"] == "finished"


@pytest.mark.parametrize("names", ["tensorbord", "tensorboard,wanb", "none,wandb", ","])
def test_unknown_tracker_is_rejected_before_the_run(workplace, in_process, names):
    done = in_process("train", "tiny", REPORT_TO=names)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: REPORT_TO: ")
    assert workplace.names() == []


def test_unknown_wandb_mode_is_rejected_before_the_run(in_process):
    done = in_process("train", "tiny", REPORT_TO="wandb", WANDB_MODE="sometimes")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: WANDB_MODE: found 'sometimes', expected online, offline or disabled")


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf"])
def test_invalid_wandb_timeout_is_rejected_before_the_run(in_process, value):
    done = in_process("train", "tiny", REPORT_TO="wandb", WANDB_INIT_TIMEOUT=value)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: WANDB_INIT_TIMEOUT: found {value!r}, expected a number of seconds. Set one")


def test_nan_and_inf_are_written_as_strings(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append(path, {"step": 3, "loss": math.nan, "grad_norm": math.inf, "other": -math.inf, "fine": 1.5})

    def refuse(name):
        raise AssertionError(name)

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert line == {"step": 3, "loss": "NaN", "grad_norm": "Infinity", "other": "-Infinity", "fine": 1.5}


@pytest.mark.parametrize("lengths", [[[5, 3], [8]], [[1, 1, 1], [2]]])
def test_attended_counts_by_example_length(lengths):
    positions = torch.tensor(
        [[p for length in row for p in range(length)] for row in lengths if sum(row) == sum(lengths[0])]
    )
    expected = sum(length * (length + 1) // 2 for row in lengths if sum(row) == sum(lengths[0]) for length in row)
    assert int(throughput.count_attended_pairs({"position_ids": positions})) == expected
    alone = [length for row in lengths for length in row]
    mask = torch.tensor([[1] * length + [0] * (max(alone) - length) for length in alone])
    assert int(throughput.count_attended_pairs({"attention_mask": mask})) == sum(
        length * (length + 1) // 2 for length in alone
    )


class OneRank:
    """accelerate's `gather` on one rank."""

    def gather(self, tensor):
        return tensor


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_mfu_and_hfu(checkpointing):
    """One row of 2,048 tokens, 1,024 of them supervised, in a quarter of a second or a little more."""
    recipe = loader.load("8b", [f"trainer.gradient_checkpointing={checkpointing}"])
    plan = plans.resolve(recipe, Topology(gpus=1, processes=1, gpu_type="h100-80g"))
    architecture = recipe.model.architecture
    meter = throughput.ThroughputMeter(plan, architecture, 989e12, torch.device("cpu"))
    meter.begin_step(0)
    meter.add_batches([{"input_ids": torch.zeros(1, 2048), "position_ids": torch.arange(2048)[None]}], 1024)
    meter._step_start -= 0.25
    meter.end_step()
    values = meter.read(OneRank(), 2048)
    seconds = values["step_seconds"]
    layers, output, attention = 32 * 218_103_808, 525_336_576, 2 * 32 * 4096 * 2049
    model = 6 * (layers + output / 2) + 3 * attention
    assert values["mfu"] == pytest.approx(model * 2048 / seconds / 989e12)
    again = output + attention / 2  # logits of half the tokens, attention scores
    if checkpointing == "true":
        again += 2 * (layers - 32 * 58_720_256) + attention
    assert values["hfu"] == pytest.approx((model + again) * 2048 / seconds / 989e12)
    assert meter.read(OneRank(), 0) == {}, "a second line without a step in between"


def test_flops_agree_with_trl():
    """TRL counts attention over the complete row, ours below the causal mask; the rest must be equal."""
    from transformers import LlamaConfig
    from trl.trainer.utils import adjusted_mfu, compute_flops_per_token

    architecture = loader.load("8b").model.architecture
    config = LlamaConfig(**{key: value for key, value in architecture.items() if key != "model_type"})
    theirs = compute_flops_per_token(config, 2048) * adjusted_mfu(1.0, config, 2048)
    load = memory.MemoryInputs(architecture, "single", "bf16", 1, 2048, gradient_checkpointing=True)
    assert cost.flops_per_token(load, 2048).model == pytest.approx(theirs, rel=1e-3)


def test_data_wait_fraction():
    def slow():
        for number in range(3):
            time.sleep(0.05)
            yield number

    plan = plans.resolve(loader.load("tiny"), Topology(gpus=0, processes=1))
    meter = throughput.ThroughputMeter(plan, {}, None, torch.device("cpu"))
    meter.begin_step(0)
    assert list(meter.time_batches(slow())) == [0, 1, 2]
    time.sleep(0.15)
    meter.end_step()
    assert 0.3 < meter.read(OneRank(), 10)["data_wait_fraction"] < 0.7


def test_host_memory_is_of_this_process():
    plan = plans.resolve(loader.load("tiny"), Topology(gpus=0, processes=1))
    meter = throughput.ThroughputMeter(plan, {}, None, torch.device("cpu"))
    meter.begin_step(0)
    meter.end_step()
    pages = int(Path(f"/proc/{os.getpid()}/statm").read_text().split()[1])
    resident = pages * os.sysconf("SC_PAGE_SIZE")
    assert meter.read(OneRank(), 1)["host_memory_bytes"] == pytest.approx(resident, rel=0.1)
