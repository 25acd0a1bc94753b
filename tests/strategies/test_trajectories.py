"""The same recipe, seed and data under every engine: the same training, step by step, and the same after a stop.

Slow: `make test-strategies`.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers.processes import launcher_of
from helpers.trajectories import SEVERAL, arguments, data, differences, follow, record, trained_weights
from helpers.workplace import HANG_SECONDS, manifest, metrics, needs_compiler
from safetensors.torch import load_file

from sft_recipes.runtime import heartbeat
from sft_recipes.runtime.run_dir import RunDir

__all__ = ["data", "follow"]  # fixtures
pytestmark = needs_compiler

# Relative, of a step's loss. In fp32 the order of sums explains what is left; in bf16 the engines round at other places
# (bf16 weights under ZeRO, bf16 autocast of fp32 weights else). Measured: benchmarks/results/engines-2-cores.json.
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}
# Absolute, of a final weight; the learning rate is 2e-3 and the weights are about 0.08.
WEIGHT_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}


def check(reference, run, engine, processes, packing, precision):
    plan = json.loads((run / "plan.json").read_text())
    assert (plan["parallelism"], plan["world_size"]) == (engine, processes)
    assert manifest(run)["dtypes"].items() >= plan["dtypes"].items()
    found = differences(reference, run)
    record(engine=engine, processes=processes, packing=packing, precision=precision, **found)
    assert found["loss"] <= TOLERANCE[precision] and found["eval_loss"] <= TOLERANCE[precision], found
    assert found["weight"] <= WEIGHT_TOLERANCE[precision], found


@pytest.mark.parametrize(("engine", "processes"), [*((engine, 2) for engine in SEVERAL), ("ddp", 4)])
def test_every_engine_follows_one_process_in_fp32(follow, engine, processes):
    """Of padded rows; packed ones are those in bf16, below."""
    check(follow("single", 1), follow(engine, processes), engine, processes, False, "fp32")


def test_adam_on_the_cpu_goes_on_behind_any_step_as_if_it_had_not_stopped():
    """Without counting its steps again, weights differ behind 25 of these 59 steps. Here, where the operator has just been
    compiled: another process would wait for that."""
    from types import SimpleNamespace

    from deepspeed.ops.adam import DeepSpeedCPUAdam

    from sft_recipes.training import strategy

    def weights(stopped_behind, counting=True):
        chance = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(1000, generator=chance))
        adam = DeepSpeedCPUAdam([weight], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
        for step in range(60):
            if step == stopped_behind:
                weight = torch.nn.Parameter(weight.detach().clone())
                state, adam = adam.state_dict(), DeepSpeedCPUAdam([weight], lr=1e-3, betas=(0.9, 0.95))
                adam.load_state_dict(state)
                wrapped = SimpleNamespace(optimizer=SimpleNamespace(optimizer=adam))
                if counting:
                    strategy.count_up_again(SimpleNamespace(is_deepspeed_enabled=True, model_wrapped=wrapped))
            weight.grad = torch.randn(1000, generator=chance)
            adam.step()
        return weight.detach()

    straight = weights(None)
    assert all(torch.equal(weights(step), straight) for step in range(1, 60))
    assert not all(torch.equal(weights(step, counting=False), straight) for step in range(1, 60)), "no reason any more"


@pytest.mark.parametrize("engine", SEVERAL)
def test_every_engine_follows_one_process_in_bf16(follow, engine):
    check(follow("single", 1, True, "bf16"), follow(engine, 2, True, "bf16"), engine, 2, True, "bf16")


def test_the_runs_are_what_they_are_meant_to_be(follow):
    for packing, precision, rows in ((False, "fp32", 83), (True, "bf16", 97)):
        run = follow("single", 1, packing, precision)
        plan = json.loads((run / "plan.json").read_text())
        assert plan["rows"] == rows, "prime, so that nothing divides it"
        assert plan["optimizer_steps"] == (24 if packing else 20) and plan["num_train_epochs"] == 2
        lines = [line for line in metrics(run) if "loss" in line]
        assert len({line["tokens_digest"] for line in lines}) == len(lines)
        assert lines[-1]["loss"] < lines[0]["loss"] - 1, "it learns, so that a wrong step would show"


def test_another_order_of_rows_is_found_out(follow):
    """The comparison can fail, and finds nothing between two runs of one plan."""
    again = follow("single", 1, False, "fp32", "trainer.data_seed=42")
    assert differences(follow("single", 1), again) == {"loss": 0.0, "eval_loss": 0.0, "weight": 0.0}
    other = follow("single", 1, False, "fp32", "trainer.data_seed=43")
    with pytest.raises(AssertionError):
        differences(follow("single", 1), other)
    digests = [{line["tokens_digest"] for line in metrics(run) if "loss" in line} for run in (again, other)]
    assert not digests[0] & digests[1]


def signalled(run, process):
    """Who may be asked to stop: the parent, the launcher below it, a rank."""
    ranks = {f"rank {rank}": beat.pid for rank, beat in heartbeat.read_heartbeats(RunDir(run).ranks).items()}
    return {"parent": process.pid, "launcher": launcher_of(RunDir(run).plan), **ranks}


@pytest.mark.parametrize(
    ("engine", "asked", "more"),
    [
        ("single", "parent", ()), ("ddp", "rank 1", ()), ("zero2", "rank 1", ()), ("zero3", "rank 0", ()),
        ("zero3_offload", "parent", ()), ("fsdp2", "launcher", ()),
        ("zero2", "launcher", ("lora.r=4",)), ("zero3", "rank 1", ("lora.r=4",)),
    ],
)  # fmt: skip
def test_stopped_at_half_time_and_resumed_it_ends_as_if_it_had_gone_straight(
    shared_workplace, follow, data, engine, asked, more
):
    """Stopped in the second epoch, so that the order of rows behind a resume is tried too; and saved every 10 steps."""
    count = 1 if engine == "single" else 2
    straight = follow(engine, count, False, "fp32", *more)
    name = f"stopped-{engine}{'-lora' if more else ''}"
    words = ["tiny", "--name", name, *arguments(data, engine, count, False, "fp32"), *more]
    run = shared_workplace.runs / name
    process = subprocess.Popen(
        [sys.executable, "-m", "sft_recipes", "train", *words], cwd=shared_workplace.path,
        env=shared_workplace.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    until = time.monotonic() + HANG_SECONDS
    while not ((run / "metrics.jsonl").is_file() and '"step": 12,' in (run / "metrics.jsonl").read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "hangs"
        time.sleep(0.01)
    os.kill(signalled(run, process)[asked], signal.SIGTERM)
    said = process.communicate(timeout=HANG_SECONDS)[0]
    assert process.returncode == 75, said
    stopped_at = manifest(run)["steps"]
    assert 12 <= stopped_at < 20
    done = shared_workplace.sft("train", *words)
    assert done.returncode == 0 and f"resuming from checkpoint-{stopped_at}" in done.stdout, done.stdout + done.stderr
    assert max(differences(straight, run).values()) == 0.0
    assert manifest(run)["best_step"] == manifest(straight)["best_step"]
    ours, theirs = (trained_weights(folder / "final") for folder in (straight, run))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("engine", SEVERAL)
def test_final_is_whole_and_holds_the_best_steps_weights(follow, engine):
    """In plain transformers: no tensor missing, none unexpected, each equal to what the engine had trained."""
    from transformers import AutoModelForCausalLM

    run = follow(engine, 2)
    model, loading = AutoModelForCausalLM.from_pretrained(run / "final", output_loading_info=True, dtype=torch.float32)
    assert not loading["missing_keys"] and not loading["mismatched_keys"]
    best = load_file(run / f"best-{manifest(run)['best_step']}" / "model.safetensors")
    loaded = model.state_dict()
    assert set(loaded) - {"lm_head.weight"} == set(best) - {"lm_head.weight"}
    assert all(torch.equal(loaded[key].float(), best[key].float()) for key in best)
    assert all(tensor.abs().sum() > 0 for name, tensor in best.items() if "weight" in name)


@pytest.mark.parametrize(
    ("engine", "quantize"),
    [*((engine, "") for engine in ("ddp", "zero2", "zero3", "fsdp2")), ("ddp", "nf4"), ("zero2", "nf4")],
)
def test_adapters_train_alike_under_every_engine(follow, engine, quantize):
    """At twice this learning rate bf16's rounding grows to 6e-3 of a loss within the twenty steps."""
    more = (
        "lora.r=4", "trainer.learning_rate=5e-3", f"lora.quantize={quantize}", "trainer.gradient_checkpointing=true",
        "model.architecture={model_type: llama, hidden_size: 128, intermediate_size: 256, num_hidden_layers: 2, "
        "num_attention_heads: 2, vocab_size: 1024, max_position_embeddings: 512, initializer_range: 0.08}",
    )  # fmt: skip
    one, several = follow("single", 1, False, "bf16", *more), follow(engine, 2, False, "bf16", *more)
    left, right = ([line for line in metrics(run) if "loss" in line] for run in (one, several))
    for mine, theirs in zip(left, right, strict=True):
        assert mine["tokens_digest"] == theirs["tokens_digest"]
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=TOLERANCE["bf16"])
    assert left[-1]["loss"] < left[0]["loss"] - 0.5, "adapters that learn nothing would agree too"
    adapters = load_file(several / "final" / "adapter_model.safetensors")
    assert len(adapters) == 2 * 7 * 2 and all(tensor.abs().sum() > 0 for tensor in adapters.values())
    assert manifest(several)["dtypes"]["frozen"] == (quantize or "bf16")
