"""Suggestions and forecasts: the fewest GPUs, the cheapest change that fits, time and cost."""

import dataclasses
import json
import re

import pytest
from helpers.architectures import llama

from sft_recipes.config import loader, sizes
from sft_recipes.config.schema import Lora
from sft_recipes.planner import cost, memory, render, suggest
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Topology
from sft_recipes.runtime import env
from sft_recipes.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("no_gpu_mask")


def plan(name, gpus, gpu_type="h100-80g", *overrides):
    return plans.resolve(loader.load(name, overrides), suggest.topology_for(gpus, gpu_type))


@pytest.mark.parametrize(
    ("name", "gpu_type", "fewest"),
    [
        ("1b", "l40s-48g", 1),
        ("8b", "h100-80g", 2),
        ("70b", "h100-80g", 32),
        ("70b", "h200-141g", 16),
        ("70b", "24", None),
    ],
)
def test_fewest_gpus_is_the_smallest_that_fits(name, gpu_type, fewest):
    recipe = loader.load(name)
    assert suggest.smallest_gpu_count(recipe, gpu_type) == fewest
    if fewest:
        counts = (1, 2, 4, 8, 16, 32)  # all keep a batch of 32 or 64
        assert [gpus for gpus in counts if plan(name, gpus, gpu_type).fits] == [
            gpus for gpus in counts if gpus >= fewest
        ]


ZERO2 = ["parallelism=zero2", "batch.max_per_device_batch_size=4", "trainer.gradient_checkpointing=true"]


@pytest.mark.parametrize(
    ("name", "gpus", "gpu_type", "overrides", "change"),
    [
        ("8b", 8, "h100-80g", [*ZERO2, "trainer.gradient_checkpointing=false", "trainer.max_length=4096"], "trainer.gradient_checkpointing=true"),
        ("8b", 8, "a100-40g", [*ZERO2, "trainer.max_length=4096"], "batch.max_per_device_batch_size=1"),
        ("8b", 8, "rtx4090-24g", ZERO2, "parallelism=zero3"),
        ("70b", 8, "h100-80g", [], "GPUS=32"),
        ("8b", 1, "h100-80g", [], "GPUS=2"),
        ("8b-lora", 1, "12", [], "lora.quantize=nf4 parallelism=ddp"),
    ],
)  # fmt: skip
def test_cheapest_change_fits(name, gpus, gpu_type, overrides, change):
    recipe, topology = loader.load(name, overrides), suggest.topology_for(gpus, gpu_type)
    assert plans.resolve(recipe, topology).fits is False
    suggestion = suggest.cheapest_change(recipe, topology)
    assert suggestion.startswith(change)
    arguments = dict(word.split("=") for word in suggestion.split())
    more = int(arguments.pop("GPUS", gpus))
    assert plan(name, more, gpu_type, *overrides, *(f"{key}={value}" for key, value in arguments.items())).fits is True


def test_cheapest_change_is_none_if_nothing_helps():
    assert suggest.cheapest_change(loader.load("70b"), suggest.topology_for(8, "2")) is None


LLAMA_8B, QWEN3_1_7B = (loader.load(name).model.architecture for name in ("8b", "1b"))


def flops(architecture, mean_length, supervised_share=1.0, lora=None, checkpointing=False):
    load = memory.MemoryInputs(architecture, "single", "bf16", 1, 2048, checkpointing, lora=lora)
    return cost.flops_per_token(load, mean_length, supervised_share)


def test_flops_per_token_by_hand():
    """Llama 3.1 8B: 32 layers of 218,103,808 weights, 58,720,256 of them down_proj; an output layer of 525,336,576;
    4,096 query outputs; adapters of 41,943,040 weights at rank 16. Examples of 2,048 tokens."""
    layers, output, adapters = 32 * 218_103_808, 525_336_576, 41_943_040
    attention = 2 * 32 * 4096 * 2048
    full = flops(LLAMA_8B, 2048)
    assert full.forward == 2 * (layers + output) + attention
    assert full.model == 3 * full.forward
    assert full.hardware == full.model + 2 * output + attention / 2, "logits and attention scores are computed again"
    recomputed = flops(LLAMA_8B, 2048, checkpointing=True)
    assert recomputed.model == full.model
    assert recomputed.hardware == full.hardware + 2 * (layers - 32 * 58_720_256) + attention
    lora = flops(LLAMA_8B, 2048, lora=Lora(r=16))
    assert lora.forward == full.forward + 2 * adapters
    assert lora.model == 4 * (layers + output) + 6 * adapters + 3 * attention


def test_flops_of_output_layer_count_supervised_tokens_only():
    """Counting every token, a 1B with 60% supervised has 9% more model FLOPs than it computes."""
    whole, scored = flops(llama("1B"), 2048).model, flops(llama("1B"), 2048, 0.6).model
    assert whole - scored == pytest.approx(0.4 * 6 * 128_256 * 2048)
    assert whole / scored == pytest.approx(1.09, abs=0.01)


@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [None, Lora(r=8)])
def test_flops_equal_torch_flop_counter(monkeypatch, lora, checkpointing, share):
    """A real forward and backward pass with TRL's loss. torch also counts the masked half of causal attention."""
    import torch
    import trl.trainer.utils
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    monkeypatch.setattr(trl.trainer.utils, "_use_triton", lambda _device: True)  # score supervised positions only
    architecture = {
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8,
        "num_key_value_heads": 2, "num_hidden_layers": 3, "vocab_size": 2048,
    }  # fmt: skip
    model = body = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture)).train()
    if lora:
        model = get_peft_model(model, LoraConfig(r=lora.r, target_modules="all-linear"))
        model.enable_input_require_grads()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    trl.trainer.utils.add_fused_lm_head(body)
    tokens = torch.arange(512)[None]
    labels = torch.where(tokens % round(1 / share) == 0, tokens, -100)
    aten = torch.ops.aten
    counted = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, *_, **__: 4 * q[0] * q[1] * q[2] ** 2 * q[3] // 2,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda _, q, *__, **___: 10 * q[0] * q[1] * q[2] ** 2 * q[3] // 2
        ),
        aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1],
    }
    with FlopCounterMode(display=False, custom_mapping=counted) as forward:
        loss = model(input_ids=tokens, labels=labels, fused_lm_head=True).loss
    with FlopCounterMode(display=False, custom_mapping=counted) as backward:
        loss.backward()
    scored = int((labels[:, 1:] != -100).sum())
    planned = flops(architecture, 512, scored / 512, lora, checkpointing)
    assert forward.get_total_flops() == pytest.approx(512 * planned.forward, rel=1e-3)
    assert forward.get_total_flops() + backward.get_total_flops() == pytest.approx(512 * planned.hardware, rel=1e-3)


def test_forecast_follows_from_assumed_mfu(monkeypatch):
    """8b at 35% of 989 TFLOP/s: 41 billion model FLOPs per token, 52 executed with activation checkpointing."""
    monkeypatch.setenv("GPU_HOUR_PRICE", "2.50")
    pinned = ("parallelism=zero2", "batch.max_per_device_batch_size=4")
    forecast = plan("8b", 8, "h100-80g", *pinned, "trainer.gradient_checkpointing=true").forecast
    per_token = flops(LLAMA_8B, 1374, checkpointing=True)
    rank_tokens = 4 * 2048
    computation = rank_tokens * per_token.hardware / (0.35 * 989e12)
    # Once per step, 7/8 of: 8.03 billion fp32 gradients and 16-bit weights, at 80% of 450 GB/s, a quarter not hidden.
    communication = 7 / 8 * 6 * 8_030_261_248 / (0.8 * 450e9)
    step = computation + communication / 4 + 0.01
    assert forecast["hfu"] == pytest.approx(0.35 * computation / step, abs=1e-4)
    assert forecast["mfu"] == pytest.approx(forecast["hfu"] * per_token.model / per_token.hardware, abs=1e-4)
    assert forecast["tokens_per_second_per_gpu"] == pytest.approx(rank_tokens / step, rel=1e-3)
    assert forecast["training_seconds"] == pytest.approx(13_074 * step, rel=1e-3)
    assert forecast["money"] == pytest.approx(forecast["gpu_hours"] * 2.5, abs=0.02)
    parts = ("training_seconds", "evaluation_seconds", "saving_seconds")
    assert forecast["seconds"] == pytest.approx(sum(forecast[part] for part in parts), abs=0.2)
    slow = plan("8b", 8, "h100-80g", *pinned, "trainer.gradient_checkpointing=true", "hardware.mfu=0.175").forecast
    assert slow["training_seconds"] == pytest.approx(13_074 * (step + computation), rel=1e-3)
    kept = plan("8b", 8, "h100-80g", *pinned, "trainer.gradient_checkpointing=false").forecast
    less = flops(LLAMA_8B, 1374).hardware / per_token.hardware
    assert 0.75 < less < 0.85, "8b computes about a quarter more with activation checkpointing"
    saved = 13_074 * (1 - less) * computation
    assert kept["training_seconds"] == pytest.approx(forecast["training_seconds"] - saved, rel=1e-3)


def test_forecast_uses_supervised_share_of_prepared_data():
    unknown = plan("1b", 1, "l40s-48g")
    assert unknown.supervised_share is None
    prepared = plans.Prepared("f", "x", "m", QWEN3_1_7B, 207_865, 139_457, 150_000_000, 250_000_000, 1000)
    settled = plans.with_prepared_data(unknown, prepared)
    assert settled.supervised_share == 0.6
    # One GPU of 362 TFLOP/s: the difference is computation, 32 rows of 2,048 tokens per step.
    assert unknown.sections.trainer["gradient_checkpointing"] is False
    executed = [flops(QWEN3_1_7B, 1374, share).hardware for share in (1.0, 0.6)]
    seconds = [one.forecast["training_seconds"] / one.optimizer_steps for one in (unknown, settled)]
    less = 32 * 2048 * (executed[0] - executed[1]) / (0.35 * 362e12)
    assert seconds[0] - seconds[1] == pytest.approx(less, rel=1e-3)
    assert "all (an upper bound until the data is prepared) of the tokens supervised" in render.format_plan(unknown)
    assert "60% of the tokens supervised" in render.format_plan(settled)


def test_gpu_hour_price_refuses_non_prices(monkeypatch):
    monkeypatch.setenv("GPU_HOUR_PRICE", "cheap")
    with pytest.raises(UserError, match="GPU_HOUR_PRICE: found 'cheap', expected a price"):
        plan("8b", 8)


def test_unlisted_gpu_is_planned_by_memory_without_hours():
    unknown = plan("8b", 8, "48")
    assert unknown.forecast is None and unknown.fits is True
    shown = render.format_plan(unknown)
    assert "8 GPUs on 1 node(s), 48 GiB, GPU type not in the table" in shown
    assert (
        "no forecast: needs bf16 and a GPU type of docs/models.md, found bf16, 48 GiB, GPU type not in the table"
        in shown
    )
    assert plans.resolve(loader.load("tiny"), Topology(gpus=0, processes=1)).forecast is None


def test_forecast_is_none_in_fp32():
    single = plan("1b", 1, "h100-80g", "precision=fp32")
    assert single.forecast is None and "of docs/models.md, found fp32, h100-80g" in render.format_plan(single)


def test_comparison_keeps_batch_on_every_gpu_count(in_process):
    done = in_process("plan", "8b", "--gpus", "1,2,3,4,8,16", "--gpu-type", "h100-80g")
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in lines[1:6]] == ["1", "2", "4", "8", "16"]
    assert lines[6].startswith("3 GPUs: effective_batch_size: found 32, expected a multiple of 3")
    listed = json.loads(in_process("plan", "8b", "--gpus", "1,2,3,4,8,16", "--json").stdout)
    batches = [
        one["world_size"] * one["per_device_train_batch_size"] * one["gradient_accumulation_steps"]
        for one in listed
        if "rejected" not in one
    ]
    assert batches == [32] * 5


def test_plan_that_does_not_fit_names_what_would(in_process):
    done = in_process("plan", "70b", "--gpus", "8")
    assert done.returncode == 0
    found = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert found["fits"].strip() == "no (h100-80g)"
    assert "driver, CUDA context, NCCL and allocator fragmentation" in found["reserve per GPU"]
    assert found["fewest GPUs"].strip() == "32 x h100-80g" and found["cheapest change"].strip().startswith("GPUS=32")
    listed = json.loads(in_process("plan", "70b", "--gpus", "8", "--json").stdout)
    assert (listed["fits"], listed["fewest_gpus"], listed["cheapest_change"]) == (False, 32, "GPUS=32")


def machine_with(workplace, *gpus):
    """Return a PATH with an nvidia-smi that lists these GPUs; no test uses one."""
    smi = workplace.path / "bin" / "nvidia-smi"
    smi.parent.mkdir(exist_ok=True)
    listed = "\n".join(f"{number}, {mib}, {name}" for number, (mib, name, *_) in enumerate(gpus))
    capabilities = "\n".join(f"{number}, {' '.join(rest) or '9.0'}" for number, (_, _, *rest) in enumerate(gpus))
    smi.write_text(
        "#!/bin/sh\ncase \"$1\" in *compute_cap*) cat <<'CAPABILITIES'\n"
        f"{capabilities}\nCAPABILITIES\n;; *) cat <<'END'\n{listed}\nEND\n;; esac\n"
    )
    smi.chmod(0o755)
    return f"{smi.parent}:/usr/bin:/bin"


def test_train_refuses_plan_that_does_not_fit(workplace, in_process):
    path = machine_with(workplace, *[(81559, "NVIDIA H100 80GB HBM3")] * 8)
    done = in_process("train", "70b", "--gpus", "8", PATH=path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(
        r"needs about 161\.3 GiB per GPU and 10\.5 GiB of reserve, found 79\.6 GiB \(h100-80g\)\. Cheapest change "
        r"that fits:", done.stderr,
    )  # fmt: skip
    assert "GPUS=32" not in done.stderr, "more than are here"
    assert workplace.names() == []
    path = machine_with(workplace, (24564, "NVIDIA GeForce RTX 4090"))
    done = in_process("train", "3b", "--gpus", "1", PATH=path)
    assert done.returncode == 2 and "found 24.0 GiB (rtx4090-24g)" in done.stderr, "the recipe names a larger GPU"
    path = machine_with(workplace, (20475, "NVIDIA Graphics Device"))
    done = in_process("train", "8b-qlora", "--gpus", "1", "--dry-run", PATH=path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("gpus", "gpu_type"),
    [
        ([(81559, "NVIDIA H100 80GB HBM3")], "h100-80g"),
        ([(143771, "NVIDIA H200")], "h200-141g"),
        ([(40960, "NVIDIA A100-SXM4-40GB")], "a100-40g"),
        ([(81920, "NVIDIA A100-SXM4-80GB"), (40960, "NVIDIA A100-SXM4-40GB")], "a100-40g"),
        ([(46068, "NVIDIA L40S")], "l40s-48g"),
        ([(49140, "NVIDIA L40S")], "l40s-48g"),
        ([(46068, "NVIDIA L40")], "l40-48g"),
        ([(81559, "NVIDIA H100 PCIe")], "h100-pcie-80g"),
        ([(95830, "NVIDIA H100 NVL")], "h100-nvl-94g"),
        ([(143771, "NVIDIA H200 NVL")], "h200-nvl-141g"),
        ([(97871, "NVIDIA GH200 480GB")], "gh200-96g"),
        ([(183359, "NVIDIA B200")], "b200-180g"),
        ([(189471, "NVIDIA GB200")], "gb200-186g"),
        ([(81920, "NVIDIA A100 80GB PCIe")], "a100-80g"),
        ([(23028, "NVIDIA A10G")], "a10g-24g"),
        ([(23028, "NVIDIA A10")], "a10-24g"),
        ([(24564, "NVIDIA GeForce RTX 4090")], "rtx4090-24g"),
        ([(24576, "NVIDIA GeForce RTX 3090")], "rtx3090-24g"),
        ([(32607, "NVIDIA GeForce RTX 5090")], "rtx5090-32g"),
        ([(49140, "NVIDIA RTX 6000 Ada Generation")], "rtx-6000-ada-48g"),
        ([(24564, "NVIDIA GeForce RTX 4090 D")], "24.0"),
        ([(97871, "NVIDIA H100 96GB HBM3")], "95.6"),
        ([(40192, "NVIDIA A100-SXM4-80GB MIG 3g.40gb")], "39.2"),
        ([(32510, "Tesla V100-SXM2-32GB")], "31.7"),
        ([(16303, "NVIDIA Graphics, Device")], "15.9"),
    ],
)
def test_gpu_type_is_detected(workplace, monkeypatch, gpus, gpu_type):
    from sft_recipes.launch import topology

    monkeypatch.setenv("PATH", machine_with(workplace, *gpus))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    here = topology.visible_gpus()
    assert len(here) == len(gpus) and topology.gpu_type_of(here) == gpu_type
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert [gpu.id for gpu in topology.visible_gpus()] == ["0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert topology.visible_gpus() == [] and topology.gpu_type_of([]) is None


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), "no bf16. Set precision=fp32"),
        (("precision=fp32", "model.attention=flash_attention_2"), "no flash_attention_2. Set model.attention=sdpa"),
        (("model.attention=flash_attention_2",), "no bf16 and no flash_attention_2. Set precision=fp32 model.attention=sdpa"),
    ],
)  # fmt: skip
def test_gpu_before_ampere_is_refused_bf16(workplace, in_process, overrides, expected):
    path = machine_with(workplace, (32768, "Tesla V100-SXM2-32GB", "7.0"))
    done = in_process("train", "1b", "--gpus", "1", *overrides, PATH=path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"Tesla V100-SXM2-32GB (compute capability 7.0) is older than Ampere and has {expected}" in done.stderr
    assert workplace.names() == []


def test_gpu_before_ampere_trains_in_fp32(workplace, in_process):
    path = machine_with(workplace, (81559, "Tesla of much memory", "7.5"))
    done = in_process("train", "1b", "--gpus", "1", "precision=fp32", "--dry-run", PATH=path)
    assert done.returncode == 0, done.stderr


def test_offload_without_host_memory_is_refused(in_process):
    done = in_process("train", "70b", "--gpus", "0", "parallelism=zero3_offload")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "on the CPU 70b needs about" in done.stderr and "GiB of host memory, found" in done.stderr


def test_lighter_overrides_need_less_memory():
    found = suggest.lighter_overrides(loader.load("8b"), suggest.topology_for(8, "h100-80g"))
    assert len(found) == 2
    needs = [plan("8b", 8, "h100-80g", *change.split()).memory_bytes_per_gpu["total"] for change in ("", *found)]
    assert needs[1] <= 0.9 * needs[0] and needs[2] <= 0.9 * needs[0]
    unknown = loader.load("tiny", ["model.architecture={model_type: gpt2, vocab_size: 1024}"])
    assert "batch.max_per_device_batch_size=1" in suggest.lighter_overrides(unknown, Topology(0, 1))


def test_offload_must_fit_host_memory_of_each_node(workplace, in_process):
    path = machine_with(workplace, *[(81559, "NVIDIA H100 80GB HBM3")] * 8)
    done = in_process(
        "train", "70b", "--gpus", "8", "parallelism=zero3_offload", "batch.max_per_device_batch_size=1", PATH=path
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "zero3_offload needs about" in done.stderr and "GiB of host memory" in done.stderr


@pytest.mark.parametrize("strategy", ["zero3", "zero3_offload", "fsdp2"])
def test_plan_refuses_4_bit_weights_that_would_be_replicated(strategy):
    with pytest.raises(UserError, match=f"{strategy} does not shard 4-bit weights.*[Ss]et parallelism=ddp or zero2"):
        plan("8b-qlora", 8, "h100-80g", f"parallelism={strategy}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "0", "--gpu-type", "24"), "GPU_TYPE: found 24 without GPUs"),
        (("lora.target_modules=[foo]", "size=lora-7-13b", "lora.r=8"), "lora.target_modules: found 'foo', expected 'q_proj'"),
        (("lora.target_modules=qproj", "size=lora-7-13b"), "lora.target_modules: found 'qproj', expected 'all-linear'"),
        (("trainer.eval_steps=1.5",), "trainer.eval_steps: found 1.5, expected a valid integer"),
        (("trainer.num_train_epochs=-1",), "trainer.num_train_epochs: found -1"),
        (("trainer.warmup_ratio=5", "allow_out_of_range=[warmup_ratio]"), "trainer.warmup_ratio: found 5, expected less than or equal to 1"),
        (("trainer.gradient_accumulation_steps=3",), "is set by the plan. Set batch.effective_batch_size instead"),
        (("trainer.per_device_train_batch_size=3",), "is set by the plan. Set batch.max_per_device_batch_size instead"),
        (("--gpus", "3"), "found 32, expected a multiple of 3 GPUs .* to one of 1, 2, 4"),
        (("model.architecture={num_key_value_heads: x}",), "num_key_value_heads: found 'x', expected a valid integer"),
        (("model.architecture={head_dim: 1.5}",), "head_dim: found 1.5, expected a valid integer"),
        (("model.architecture={tie_word_embeddings: 'false'}",), "tie_word_embeddings: found 'false', expected a valid boolean"),
        (("model.architecture={hidden_size: 16, num_attention_heads: 32}",), "hidden_size: found 16, expected a multiple of"),
    ],
)  # fmt: skip
def test_plan_refuses_in_one_line(in_process, arguments, message):
    done = in_process("plan", "8b", *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert re.search(message, done.stderr), done.stderr


def test_more_than_eight_gpus_need_several_nodes():
    from sft_recipes.launch.topology import HardwareRequest, plan_topology

    nodes = {gpus: plan_topology(loader.load("70b"), HardwareRequest(gpus)).nodes for gpus in (8, 16, 32, 64)}
    assert nodes == {8: 1, 16: 2, 32: 4, 64: 8}


def test_memory_of_model_without_architecture_is_forecast_after_preparation():
    recipe = loader.load("8b", ["model.name_or_path=some/model", "data.train=rows.jsonl"])
    unknown = plans.resolve(recipe, suggest.topology_for(1, "h100-80g"))
    assert unknown.fits is None
    architecture = loader.load("8b").model.architecture
    found = plans.Prepared("f", "x", "m", architecture, 9000, 9000, 9000, 90000, 10)
    with pytest.raises(UserError, match=r"some/model needs about .* GiB per GPU and .* GiB of reserve, found 79.6 GiB"):
        plans.with_prepared_data(unknown, found)
    fitting = plans.with_prepared_data(plans.resolve(recipe, suggest.topology_for(8, "h100-80g")), found)
    assert fitting.fits is True and fitting.parameters == 8_030_261_248


def test_size_between_classes_takes_the_nearest(in_process):
    arguments = ("plan", "7b", "size=20b", "model.architecture={}", "--gpus", "8")
    done = in_process(*arguments, "--json")
    found = json.loads(done.stdout)
    assert (found["size"], found["requested_size"], found["learning_rate"]) == ("30-70b", "20b", 2e-5)
    assert found["effective_batch_size"] == 64
    assert "30-70b (nearest to 20b)" in in_process(*arguments).stdout
    assert plan("7b", 8, "h100-80g", "size=18b").size == "7-13b"


def test_size_class_must_match_architecture():
    recipe = loader.load("8b")
    for size, row in (("1-3b", "1-3b"), ("70b", "30-70b"), ("tiny", "tiny")):
        with pytest.raises(
            UserError,
            match=f"size: found {size} .size class {row}., expected 7-13b: model.architecture has 8.0 billion",
        ):
            sizes.size_class_of(dataclasses.replace(recipe, size=size))


def test_host_memory_is_limited_by_the_container(tmp_path, monkeypatch):
    """No file, as on bare machines; `max`, as in containers without a limit; a limit."""
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(env, "_MEMORY_LIMITS", (limit,))
    machine = env.host_memory_bytes()
    assert machine > 2**28
    limit.write_text("max\n")
    assert env.host_memory_bytes() == machine
    limit.write_text(f"{2**28}\n")
    assert env.host_memory_bytes() == 2**28
