"""The plan chooses the fastest configuration that fits, keeps the effective batch, and resumes with the same strategy."""

import dataclasses
import json

import pytest
from helpers.architectures import llama

from sft_recipes.config import loader
from sft_recipes.launch import run_selection
from sft_recipes.launch.run_selection import RunRequest
from sft_recipes.planner import choose, cost, memory, render, suggest
from sft_recipes.planner import plan as plans
from sft_recipes.planner.choose import Configuration
from sft_recipes.runtime.errors import UserError
from sft_recipes.runtime.run_dir import RunDir

GIB = 2**30
LLAMA_1B, LLAMA_3B = (f"model.architecture={json.dumps(llama(name))}" for name in ("1B", "3B"))


def plan(name, gpus, gpu_type, *overrides):
    return plans.resolve(loader.load(name, overrides), suggest.topology_for(gpus, gpu_type))


@pytest.mark.parametrize(
    ("name", "gpus", "gpu_type", "pinned", "gib"),
    [
        ("8b", 8, "h100-80g", ("parallelism=zero2", "batch.max_per_device_batch_size=2"), 58.8),
        ("1b", 1, "l40s-48g", (LLAMA_1B, "batch.max_per_device_batch_size=4"), 37.5),
        ("3b", 1, "h100-80g", (LLAMA_3B, "batch.max_per_device_batch_size=1"), 63.6),
        ("8b-qlora", 1, "rtx4090-24g", ("batch.max_per_device_batch_size=1",), 19.8),
    ],
)
def test_recipes_fit_without_recomputation_as_computed_by_hand(name, gpus, gpu_type, pinned, gib):
    """Without fused kernels, which need less."""
    kept = plan(name, gpus, gpu_type, *pinned, "trainer.gradient_checkpointing=false", "model.fused_kernels=false")
    assert kept.fits and kept.memory_bytes_per_gpu["total"] / GIB == pytest.approx(gib, rel=0.01)
    architecture = [override for override in pinned if override.startswith("model.architecture")]
    chosen = Configuration.of(plan(name, gpus, gpu_type, *architecture))
    assert chosen.gradient_checkpointing is False, "so no layer is recomputed"


HARDWARE = [(1, "l40s-48g"), (1, "h100-80g"), (1, "rtx4090-24g"), (8, "h100-80g"), (8, "l40s-48g"), (16, "a100-40g")]


@pytest.mark.parametrize(("gpus", "gpu_type"), HARDWARE)
@pytest.mark.parametrize("name", ["1b", "3b", "8b", "32b", "8b-lora", "8b-qlora", "70b-lora"])
def test_chosen_configuration_is_the_fastest_that_fits(name, gpus, gpu_type):
    """Compared with every configuration, each pinned by overrides and resolved by itself."""
    chosen = plan(name, gpus, gpu_type)
    rows = chosen.effective_batch_size // gpus
    all_plans = []
    for strategy in ["ddp"] if gpus == 1 or "qlora" in name else ["ddp", "zero2", "zero3"]:
        for size in (size for size in range(1, rows + 1) if rows % size == 0):
            for interval in ("false", "2", "true"):
                pinned = (f"parallelism={strategy}", f"batch.max_per_device_batch_size={size}")
                all_plans.append(plan(name, gpus, gpu_type, *pinned, f"trainer.gradient_checkpointing={interval}"))
    fitting = [each for each in all_plans if each.fits]
    if not fitting and chosen.fits:
        assert chosen.parallelism == "fsdp2", "where no other strategy fits"
        return
    assert chosen.fits is bool(fitting)
    assert chosen.effective_batch_size == {each.effective_batch_size for each in all_plans}.pop()
    if not fitting:
        assert chosen.memory_bytes_per_gpu["total"] == min(each.memory_bytes_per_gpu["total"] for each in all_plans)
        return
    fastest = min(each.step_seconds for each in fitting)
    assert chosen.step_seconds <= choose.SIMILAR * fastest
    similar = [each for each in fitting if each.step_seconds <= choose.SIMILAR * fastest]
    least = min(("ddp", "zero2", "zero3").index(each.parallelism.replace("single", "ddp")) for each in similar)
    sharding = [each for each in similar if each.strategy.zero_stage == (0, 2, 3)[least]]
    assert chosen.memory_bytes_per_gpu["total"] == min(each.memory_bytes_per_gpu["total"] for each in sharding)


def test_overrides_pin_each_choice():
    assert plan("8b", 8, "h100-80g", "parallelism=fsdp2").parallelism == "fsdp2"
    assert plan("8b", 8, "h100-80g", "batch.max_per_device_batch_size=1").per_device_train_batch_size == 1
    every_layer = plan("8b", 8, "h100-80g", "trainer.gradient_checkpointing=true")
    assert every_layer.sections.trainer["gradient_checkpointing"] is True
    third = plan("8b", 8, "h100-80g", "trainer.gradient_checkpointing=3")
    assert "activation checkpointing     1 of 3 layers" in render.format_plan(third)
    with pytest.raises(
        UserError,
        match=r"gradient_checkpointing: found 0, expected 'auto' or a valid boolean or greater than or equal to 1",
    ):
        plan("8b", 8, "h100-80g", "trainer.gradient_checkpointing=0")


def test_plan_shows_three_alternatives_and_why():
    chosen = plan("8b", 8, "h100-80g")
    kinds = [(each["parallelism"], each["gradient_checkpointing"]) for each in chosen.alternatives]
    assert len(kinds) == len(set(kinds)) == 3
    assert all(each["memory_bytes"] <= 79.6 * GIB for each in chosen.alternatives)
    shown = render.format_plan(chosen, explain=True)
    assert shown.count("\nalternative ") == 3 and shown.count("of the time per step") == 3
    assert "chosen: fastest that fits, 1.19 s per step (computation 1.12, communication 0.20" in shown
    pinned = render.format_plan(plan("8b", 8, "h100-80g", "parallelism=zero3"), explain=True)
    assert "command line" in next(line for line in pinned.splitlines() if line.startswith("parallelism"))


def test_choice_without_forecast_needs_the_least_memory():
    """A model whose dimensions are not known, a GPU whose memory is not, and the CPU."""
    unknown = plan("8b", 8, "h100-80g", "model.name_or_path=some/model")
    assert Configuration.of(unknown) == Configuration("zero3", 1, True)
    assert Configuration.of(plan("8b", 8, None)) == Configuration("zero3", 1, True)
    assert plan("8b", 8, "80").parallelism in ("zero2", "zero3"), "GiB of memory are enough to choose"
    small = plans.resolve(loader.load("1b"), plans.Topology(0, 2))
    assert Configuration.of(small) == Configuration("ddp", 1, True), "1B needs more than 4 GiB"
    tiny = loader.load("tiny", ["trainer.gradient_checkpointing=auto"])
    assert Configuration.of(plans.resolve(tiny, plans.Topology(0, 1))) == Configuration("single", 2, False)


def resume(stored, name, gpus, gpu_type, tmp_path, monkeypatch):
    """Select a run with a checkpoint that `stored` has trained, on other hardware."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    folder = RunDir(tmp_path / "one")
    folder.checkpoint(4).mkdir(parents=True)
    plans.write(dataclasses.replace(stored, run_id="one"), folder.plan)
    request = RunRequest("one", replan=lambda strategy: plan(name, gpus, gpu_type, f"parallelism={strategy}"))
    return run_selection.select(plan(name, gpus, gpu_type), request, {})


def test_resume_on_another_gpu_type_keeps_the_strategy(tmp_path, monkeypatch, console):
    stored = plan("8b", 8, "h100-80g")
    fresh = plan("8b", 8, "a100-40g")
    assert (stored.parallelism, fresh.parallelism) == ("zero2", "zero3")
    start = resume(stored, "8b", 8, "a100-40g", tmp_path, monkeypatch)
    assert start.resumes and start.plan.fits and start.plan.parallelism == "zero2"
    assert start.plan.effective_batch_size == stored.effective_batch_size
    assert start.plan.memory_bytes_per_gpu["total"] < 40 * GIB < stored.memory_bytes_per_gpu["total"]
    (line,) = [line for line in console.readouterr().out.splitlines() if "same effective batch" in line]
    assert "gradient_checkpointing False -> True" in line


def test_run_of_one_gpu_resumes_on_several(tmp_path, monkeypatch):
    """`single` cannot run several processes, and DDP reads its checkpoints; the plan alone would choose ZeRO-2."""
    stored, fresh = plan("1b", 1, "l40s-48g"), plan("1b", 8, "l40s-48g")
    assert (stored.parallelism, fresh.parallelism) == ("single", "zero2")
    start = resume(stored, "1b", 8, "l40s-48g", tmp_path, monkeypatch)
    assert start.resumes and start.plan.fits and (start.plan.parallelism, start.plan.world_size) == ("ddp", 8)


def test_resume_where_the_strategy_cannot_fit_says_so(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"run one cannot resume here: its zero2 needs about .* found 24.0 GiB"):
        resume(plan("8b", 8, "h100-80g"), "8b", 8, "rtx4090-24g", tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("strategy", "accumulation", "per_weight"),
    [("ddp", 4, 8), ("zero1", 4, 4 + 2), ("zero2", 4, 4 * 4 + 2), ("zero3", 4, 4 * (4 + 2 + 2)), ("fsdp2", 2, 16)],
)
def test_communicated_bytes_by_hand(strategy, accumulation, per_weight):
    """Per weight: fp32 gradients once or per micro-batch, an all-reduce twice; 16-bit weights once, or per pass."""
    architecture = loader.load("1b").model.architecture
    load = memory.MemoryInputs(architecture, strategy, "bf16", 8, 2048, False, accumulation=accumulation)
    assert cost.communicated_bytes(load)[0] == pytest.approx(7 / 8 * per_weight * load.parameters)


def test_slow_network_favors_strategies_that_communicate_less():
    fast, slow = (plan("8b", 16, "h100-80g", f"hardware.network_gbs={speed}") for speed in (400, 5))
    assert slow.step_seconds > 2 * fast.step_seconds
    assert slow.gradient_accumulation_steps <= fast.gradient_accumulation_steps


def test_half_of_the_layers_are_recomputed_in_between():
    needs = [
        plan("8b", 8, "h100-80g", "parallelism=zero2", "batch.max_per_device_batch_size=2", f"trainer.gradient_checkpointing={interval}")
        for interval in ("true", "2", "false")
    ]  # fmt: skip
    memories = [each.memory_bytes_per_gpu["total"] for each in needs]
    seconds = [each.step_seconds for each in needs]
    assert memories == sorted(memories) and seconds == sorted(seconds, reverse=True)
    assert seconds[1] == pytest.approx((seconds[0] + seconds[2]) / 2, rel=0.01)
