"""The same recipe, seed and data under each strategy: the same training, step by step, and the same after a resume.

Slow: `make test-strategies`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.processes import launcher_of
from helpers.trajectories import ADAPTERS, SEVERAL, arguments, data, differences, follow, record, trained_weights
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


@pytest.mark.parametrize("engine", SEVERAL)
def test_strategies_follow_one_process_in_fp32(follow, engine):
    """Of padded rows; packed ones are those in bf16, below. Four ranks: test_world_sizes.py."""
    check(follow("single", 1), follow(engine, 2), engine, 2, False, "fp32")


def test_cpu_adam_resumes_exactly_after_any_step(monkeypatch):
    """Without counting its steps again, weights differ behind 25 of these 59 steps. Here, where the operator has just been
    compiled: another process would wait for that."""
    import functools
    from types import SimpleNamespace

    # The ninja of the runs: one of another version starts its log again, and compiles again.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

    import cpuinfo
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    from sft_recipes.training import strategy

    # Each optimizer asks for the vendor of the CPU, which takes a process and seconds.
    monkeypatch.setattr(cpuinfo, "get_cpu_info", functools.cache(cpuinfo.get_cpu_info))

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
                    strategy.restore_cpu_adam_steps(SimpleNamespace(is_deepspeed_enabled=True, model_wrapped=wrapped))
            weight.grad = torch.randn(1000, generator=chance)
            adam.step()
        return weight.detach()

    straight = weights(None)
    assert all(torch.equal(weights(step), straight) for step in range(1, 60))
    assert not all(torch.equal(weights(step, counting=False), straight) for step in range(1, 60)), "no reason any more"


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_strategies_follow_one_process_in_bf16(follow, engine):
    """ZeRO-1 has the optimizer of ZeRO-2, and offload the dtypes of ZeRO-3."""
    check(follow("single", 1, True, "bf16"), follow(engine, 2, True, "bf16"), engine, 2, True, "bf16")


EXPERTS = (
    "model.architecture={model_type: qwen3_moe, hidden_size: 64, intermediate_size: 128, moe_intermediate_size: 32, "
    "num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 2, head_dim: 32, vocab_size: 512, "
    "num_experts: 8, num_experts_per_tok: 2, norm_topk_prob: true, max_position_embeddings: 512, "
    "tie_word_embeddings: true, initializer_range: 0.08}",
    "trainer.router_aux_loss_coef=0.01",
)


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_experts_train_alike_under_each_strategy(follow, engine):
    """The router loss is of each micro-batch, and the strategies have the same ones."""
    one, several = follow("single", 1, False, "fp32", *EXPERTS), follow(engine, 2, False, "fp32", *EXPERTS)
    check(one, several, engine, 2, False, "fp32")
    left, right = ([line["aux_loss"] for line in metrics(run) if "aux_loss" in line] for run in (one, several))
    assert len(left) == 20 and left == pytest.approx(right, rel=1e-4)
    losses = [line["loss"] for line in metrics(one) if "loss" in line]
    assert losses[-1] < losses[0] - 1, "the loss falls, so that a wrong step would show"


def test_compared_runs_have_distinct_rows_and_learn(follow):
    for packing, precision, rows in ((False, "fp32", 83), (True, "bf16", 97)):
        run = follow("single", 1, packing, precision)
        plan = json.loads((run / "plan.json").read_text())
        assert plan["rows"] == rows, "prime, so that nothing divides it"
        assert plan["optimizer_steps"] == (24 if packing else 20) and plan["num_train_epochs"] == 2
        lines = [line for line in metrics(run) if "loss" in line]
        assert len({line["rows_hash"] for line in lines}) == len(lines)
        assert lines[-1]["loss"] < lines[0]["loss"] - 1, "the loss falls, so that a wrong step would show"


def test_other_order_of_rows_is_detected(follow):
    """The comparison can fail; test_resume_points.py finds no difference between two runs of one plan."""
    run, other = follow("single", 1), follow("single", 1, False, "fp32", "trainer.data_seed=43")
    with pytest.raises(AssertionError):
        differences(run, other)
    digests = [{line["rows_hash"] for line in metrics(each) if "loss" in line} for each in (run, other)]
    assert not digests[0] & digests[1]


def find_pids(run, process):
    """Processes that may get a stop signal: the command, the launcher of the ranks, a rank."""
    ranks = {f"rank {rank}": beat.pid for rank, beat in heartbeat.read_heartbeats(RunDir(run).ranks).items()}
    return {"command": process.pid, "launcher": launcher_of(RunDir(run).plan), **ranks}


@pytest.mark.parametrize(
    ("engine", "target"),
    [("zero2", "rank 1"), ("zero3", "command"), ("fsdp2", "launcher")],
)
def test_stopped_run_resumes_to_the_same_end(shared_workplace, follow, data, engine, target):
    """Stopped in the second epoch, which also checks the order of rows after a resume; saved every 10 steps. One process
    and DDP: tests/integration/test_train.py and test_watchdog.py. Adapters: test_world_sizes.py; offload:
    test_integrity_strategies.py."""
    straight = follow(engine, 2)
    name = f"stopped-{engine}"
    options = ["tiny", "--name", name, *arguments(data, engine, 2, False, "fp32")]
    run = shared_workplace.runs / name
    process = subprocess.Popen(
        [sys.executable, "-m", "sft_recipes", "train", *options], cwd=shared_workplace.path,
        env=shared_workplace.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    until = time.monotonic() + HANG_SECONDS
    while not ((run / "metrics.jsonl").is_file() and '"step": 12,' in (run / "metrics.jsonl").read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "timeout"
        time.sleep(0.01)
    os.kill(find_pids(run, process)[target], signal.SIGTERM)
    output = process.communicate(timeout=HANG_SECONDS)[0]
    assert process.returncode == 75, output
    stopped_at = manifest(run)["steps"]
    assert 12 <= stopped_at < 20
    done = shared_workplace.sft("train", *options)
    assert done.returncode == 0 and f"resuming from checkpoint-{stopped_at}" in done.stdout, done.stdout + done.stderr
    assert max(differences(straight, run).values()) == 0.0
    assert manifest(run)["best_step"] == manifest(straight)["best_step"]
    ours, theirs = (trained_weights(folder / "final") for folder in (straight, run))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("engine", SEVERAL)
def test_final_is_complete_and_has_the_best_weights(follow, engine):
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
def test_adapters_train_alike_under_each_strategy(follow, engine, quantize):
    more = (*ADAPTERS, f"lora.quantize={quantize}") if quantize else ADAPTERS
    one, several = follow("single", 1, False, "bf16", *more), follow(engine, 2, False, "bf16", *more)
    left, right = ([line for line in metrics(run) if "loss" in line] for run in (one, several))
    for mine, theirs in zip(left, right, strict=True):
        assert mine["rows_hash"] == theirs["rows_hash"]
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=TOLERANCE["bf16"])
    assert left[-1]["loss"] < left[0]["loss"] - 0.5, "adapters that do not learn would agree too"
    adapters = load_file(several / "final" / "adapter_model.safetensors")
    assert len(adapters) == 2 * 7 * 2 and all(tensor.abs().sum() > 0 for tensor in adapters.values())
    assert manifest(several)["dtypes"]["frozen"] == (quantize or "bf16")
