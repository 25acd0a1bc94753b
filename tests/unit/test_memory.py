import gc
import json
import sys

import pytest
from helpers import architectures
from helpers.workplace import REPOSITORY

from sft_recipes.config import loader
from sft_recipes.config.architecture import adapter_count, linear_layers, parameter_count
from sft_recipes.config.schema import Lora
from sft_recipes.config.strategies import STRATEGIES
from sft_recipes.planner import cost, memory
from sft_recipes.planner import plan as plans

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
from machine import peak_allocated

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def llama(**changes):
    return {**LLAMA_8B, **changes}


@pytest.mark.parametrize(
    ("architecture", "published"),
    [
        (LLAMA_8B, 8_030_261_248),  # Llama 3.1 8B
        (
            llama(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
            70_553_706_496,
        ),
        (
            llama(
                hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, tie_word_embeddings=True, head_dim=64
            ),
            1_235_814_400,  # Llama 3.2 1B
        ),
    ],
)
def test_parameter_counts_equal_model_cards(architecture, published):
    assert parameter_count(architecture) == published


def load(architecture=None, strategy="ddp", world=1, **changes):
    facts = {"precision": "bf16", "tokens": 2048, "gradient_checkpointing": True, **changes}
    dimensions = {"num_hidden_layers": 1, "vocab_size": 64, **(LLAMA_8B if architecture is None else architecture)}
    return memory.MemoryInputs(dimensions, strategy, world_size=world, **facts)


def test_parameter_count_of_qwen_3_includes_qk_norms():
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture = {
        **llama(hidden_size=256, num_hidden_layers=2, vocab_size=100),
        "model_type": "qwen3",
        "head_dim": 32,
    }
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture))
    assert parameter_count(architecture) == model.num_parameters()


def test_memory_is_unknown_without_architecture():
    assert parameter_count({"model_type": "llama"}) is None
    plan = plans.resolve(loader.load("tiny", ["model.architecture={model_type: llama}"]), plans.Topology(0, 1))
    assert plan.memory_bytes_per_gpu is plan.host_bytes_per_node is plan.disk_bytes is plan.forecast is None


ENGINES = [strategy for strategy in STRATEGIES if strategy != "zero3_offload"]


@pytest.mark.parametrize("strategy", ENGINES)
def test_adamw_needs_16_to_18_bytes_per_parameter(strategy):
    parts = memory.bytes_per_gpu(load(strategy=strategy))
    held = parts["weights"] + parts["gradients"] + parts["optimizer"]
    assert held == (18 if strategy.startswith("zero") else 16) * 8_030_261_248


@pytest.mark.parametrize(
    ("strategy", "shared_out"),
    [
        ("zero1", ["optimizer"]),
        ("zero2", ["gradients", "optimizer"]),
        ("zero3", ["weights", "gradients", "optimizer"]),
        ("fsdp2", ["weights", "gradients", "optimizer"]),
    ],
)
def test_strategies_shard_what_they_name(strategy, shared_out):
    one, eight = (memory.bytes_per_gpu(load(strategy=strategy, world=world)) for world in (1, 8))
    for part in ("weights", "gradients", "optimizer"):
        assert eight[part] == (one[part] // 8 if part in shared_out else one[part]), part


def test_offload_moves_16_bytes_per_parameter_to_host():
    parts = memory.bytes_per_gpu(load(strategy="zero3_offload", world=8))
    assert parts["gradients"] == parts["optimizer"] == 0
    assert memory.host_bytes_per_node(load(strategy="zero3_offload", world=8))["offload"] == 16 * 8_030_261_248
    assert memory.host_bytes_per_node(load(strategy="zero3_offload", world=16, nodes=2))["offload"] == 8 * 8_030_261_248
    assert memory.host_bytes_per_node(load(strategy="zero3", world=8))["offload"] == 0


def test_host_memory_of_loading_fp32_weights_is_per_rank():
    """As benchmarks/loading.py measured."""
    loading = {
        strategy: memory.host_bytes_per_node(load(strategy=strategy, world=8))["loading or saving"]
        for strategy in STRATEGIES
    }
    assert loading["ddp"] == 8 * 4 * 8_030_261_248 == loading["fsdp2"]
    assert loading["zero1"] == loading["zero2"] == 8 * 2 * 8_030_261_248, "each rank copies its weights to save them"
    assert loading["zero3"] == 4 * 8_030_261_248, "fp32 master weights of last/"


def test_memory_equals_deepspeed_estimate_of_zero3():
    """Their estimate is 18 bytes per parameter over the GPUs plus four times the largest layer, without activations."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    parameters, largest, gpus = 8_030_261_248, 128256 * 4096, 8
    _, theirs, _ = estimate_zero3_model_states_mem_needs(
        parameters, largest, num_gpus_per_node=gpus, cpu_offload=False, cpu_offload_params=False, zero_init=True
    )
    ours = memory.bytes_per_gpu(load(strategy="zero3", world=gpus))
    held = ours["weights"] + ours["gradients"] + ours["optimizer"]
    assert held == pytest.approx(18 * parameters / gpus)
    assert held + ours["buffers"] == pytest.approx(theirs, rel=0.1)


def test_memory_equals_deepspeed_estimate_of_zero2():
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    parameters = 8_030_261_248
    _, theirs = estimate_zero2_model_states_mem_needs(parameters, num_gpus_per_node=8, cpu_offload=False)
    ours = memory.bytes_per_gpu(load(strategy="zero2", world=8))
    held = ours["weights"] + ours["gradients"] + ours["optimizer"]
    assert held == pytest.approx(theirs, rel=0.15), "theirs counts gradients in 16 bits and whole"


def test_adapter_count_equals_peft(tiny_config):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_config(tiny_config), LoraConfig(r=5, target_modules="all-linear"))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert adapter_count(tiny_config.to_dict(), Lora(r=5)) == trained
    two = Lora(r=5, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(
        AutoModelForCausalLM.from_config(tiny_config), LoraConfig(r=5, target_modules=two.target_modules)
    )
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert adapter_count(tiny_config.to_dict(), two) == trained


@pytest.fixture
def tiny_config():
    from conftest import SMALL_LLAMA
    from transformers import AutoConfig

    return AutoConfig.for_model(**SMALL_LLAMA)


def test_frozen_weights_need_two_bytes_or_half_a_byte():
    full, lora, qlora = (
        memory.bytes_per_gpu(load(lora=lora)) for lora in (None, Lora(), Lora(quantize="nf4"))
    )  # fmt: skip
    assert full["weights"] == 4 * 8_030_261_248
    adapters = adapter_count(LLAMA_8B, Lora())
    assert adapters == 41_943_040, "of r 16 over all linear layers of Llama 3.1 8B"
    assert lora["weights"] == 2 * 8_030_261_248 + 4 * adapters
    assert 5e9 < qlora["weights"] < 6.2e9
    assert lora["optimizer"] == qlora["optimizer"] == 8 * adapters


def test_8_bit_optimizer_needs_a_quarter_except_embeddings():
    full, eighth = (memory.bytes_per_gpu(load(optimizer=name)) for name in ("adamw_torch_fused", "adamw_8bit"))
    embeddings = 128_256 * 4096
    moments = 2 * 8_030_261_248 + 6 * embeddings
    assert full["optimizer"] == 8 * 8_030_261_248 and eighth["optimizer"] == moments
    assert full["total"] - eighth["total"] == 6 * (8_030_261_248 - embeddings)
    plan = plans.resolve(
        loader.load("8b", ("parallelism=single", "trainer.optim=adamw_8bit")),
        plans.Topology(1, 1, gpu_type="h200-141g"),
    )
    assert plan.memory_bytes_per_gpu["optimizer"] == moments and plan.fits
    assert memory.checkpoint_bytes(load(optimizer="adamw_8bit")) == 4 * 8_030_261_248 + moments


def test_trainer_keeps_fp32_moments_of_embeddings(tmp_path):
    """The real optimizer, on which the forecast of 8 bits depends."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

    architecture = {**llama(hidden_size=128, num_hidden_layers=1, vocab_size=512), "model_type": "llama"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture))
    arguments = TrainingArguments(str(tmp_path), optim="adamw_8bit", use_cpu=True, report_to=[])
    optimizer = Trainer(model, arguments).create_optimizer()
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    kinds = {name: optimizer.state[weight]["state1"].dtype for name, weight in model.named_parameters()}
    assert kinds["model.embed_tokens.weight"] == torch.float32
    assert kinds["lm_head.weight"] == kinds["model.layers.0.mlp.up_proj.weight"] == torch.uint8


def test_eager_attention_keeps_scores():
    pinned = ("batch.max_per_device_batch_size=4", "trainer.gradient_checkpointing=true", "model.fused_kernels=false")
    pinned += (f"model.architecture={json.dumps(architectures.llama('1B'))}",)
    plain, eager = (
        plans.resolve(
            loader.load("1b", (f"model.attention={implementation}", *pinned)),
            plans.Topology(1, 1, gpu_type="h200-141g"),
        )
        for implementation in ("auto", "eager")
    )
    rows, heads, length = eager.per_device_train_batch_size, 32, eager.max_length
    more = eager.memory_bytes_per_gpu["activations"] - plain.memory_bytes_per_gpu["activations"]
    assert more == rows * heads * length**2 * 6  # of one layer: the others are recomputed


def test_70b_checkpoint_is_about_a_terabyte():
    llama_70b = llama(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
    assert memory.checkpoint_bytes(load(llama_70b, strategy="zero3", world=32)) == pytest.approx(1.1e12, rel=0.05)


# Few, because a CPU without bf16 instructions takes a hundred times as long for a product in bf16 as in fp32.
TOKENS = 256
SHAPES = {
    "llama": {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8, "num_key_value_heads": 2},
    "llama, every head its own keys": {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 8},
    "qwen2": {"hidden_size": 512, "intermediate_size": 2700, "num_attention_heads": 8, "num_key_value_heads": 2},
    "olmo2": {"hidden_size": 512, "intermediate_size": 1400, "num_attention_heads": 8, "num_key_value_heads": 8},
    "qwen3": {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
    "qwen3, queries wider than the hidden states": {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64},
    "llama, queries wider than the hidden states": {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64},
    "smollm3": {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8, "num_key_value_heads": 2, "pad_token_id": 0},
    "granite": {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8, "num_key_value_heads": 2},
}  # fmt: skip


def kept_for_the_backward_pass(architecture, dtype, autocast, lora, implementation="sdpa", tokens=TOKENS):
    """Bytes per token and layer, from the storages that autograd saves: three layers minus one, over two."""
    import contextlib

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    kept = []
    for layers in (1, 3):
        config = AutoConfig.for_model(
            **architecture, num_hidden_layers=layers, vocab_size=64, attn_implementation=implementation
        )
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
        body = model.model
        if lora:
            model = get_peft_model(model, LoraConfig(r=lora.r, target_modules="all-linear"))
            model.enable_input_require_grads()
        storages, weights = {}, {weight.untyped_storage().data_ptr() for weight in model.parameters()}

        def pack(tensor, storages=storages, weights=weights):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = (storage.nbytes(), tensor.detach())

        # There is no backward pass, so the hook returns nothing: a node that saved its own output would never be freed.
        context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), context:
            body(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
        kept.append(sum(number for number, _ in storages.values()))
    return (kept[1] - kept[0]) / 2 / tokens


@pytest.mark.parametrize("strategy", ["zero2", "ddp", "fp32", "lora", "lora in fp32"])
@pytest.mark.parametrize("name", SHAPES)
def test_activations_equal_saved_tensors(name, strategy):
    import torch

    architecture = {"model_type": name.split(",")[0], **SHAPES[name]}
    lora = Lora() if "lora" in strategy else None
    precision = "fp32" if "fp32" in strategy else "bf16"
    planned = load(architecture, "zero2" if strategy == "zero2" else "ddp", precision=precision, lora=lora)
    dtype = torch.bfloat16 if strategy in ("zero2", "lora") else torch.float32
    counted = kept_for_the_backward_pass(architecture, dtype, strategy in ("ddp", "lora"), lora)
    # Autocast's copies of the weights, which autograd also keeps, count as buffers.
    casts = 2 * sum(a * b for a, b in linear_layers(architecture).values()) / TOKENS if strategy == "ddp" else 0
    assert memory.activation_bytes(planned) == pytest.approx(counted - casts, rel=0.08)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("inner", [1408, 2816])
def test_peak_of_adapter_backward_pass_equals_plan(inner, precision):
    """Of one layer: what it keeps, its temporaries, and fp32 gradients of the hidden states (`logits`)."""
    import contextlib

    import torch
    from peft import LoraConfig, get_peft_model
    from torch.profiler import ProfilerActivity, profile
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture = {**SHAPES["llama"], "model_type": "llama", "intermediate_size": inner}
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    config = AutoConfig.for_model(**architecture, num_hidden_layers=1, vocab_size=64)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    body, model = model.model, get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    model.enable_input_require_grads()
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
            weight.grad = torch.zeros_like(weight)
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as tracker:
        with autocast:
            states = body(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), use_cache=False).last_hidden_state
        states.float().sum().backward()
    planned = load(architecture, precision=precision, lora=Lora())
    bytes_per_token = (
        memory.activation_bytes(planned) + memory._backward_temporaries(planned) + 4 * architecture["hidden_size"]
    )
    assert peak_allocated(tracker) / TOKENS == pytest.approx(bytes_per_token, rel=0.1)


@pytest.mark.parametrize(
    ("tied", "precision", "recomputes", "accumulates"),
    [
        (True, "fp32", False, False),
        (True, "fp32", True, True),
        (True, "bf16", False, True),
        (False, "bf16", True, False),
        (False, "bf16", True, True),
        (False, "fp32", False, True),
    ],
)
def test_peak_of_step_equals_plan(monkeypatch, tied, precision, recomputes, accumulates):
    """Of the model with TRL's scoring and the fused AdamW, by tracked allocations; benchmarks/memory.py has whole runs,
    under every strategy."""
    import torch
    import trl.trainer.utils
    from torch.profiler import ProfilerActivity, profile
    from transformers import AutoConfig, AutoModelForCausalLM

    monkeypatch.setattr(trl.trainer.utils, "_use_triton", lambda _device: True)
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 1024)
    architecture = llama(
        model_type="llama", hidden_size=256, intermediate_size=704, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1, vocab_size=1024, tie_word_embeddings=tied,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture)).train()
    if recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trl.trainer.utils.add_fused_lm_head(model)
    model.forward = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")(model.forward)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.arange(TOKENS)[None]
    labels = torch.where(tokens % 16 == 0, tokens, -100)
    gc.collect()  # free what other tests left before the tracker starts
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as tracker:
        for _ in range(2):
            for _ in range(1 + accumulates):
                model(input_ids=tokens, labels=labels, fused_lm_head=True).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    planned = load(
        architecture, "single", precision=precision, tokens=TOKENS, gradient_checkpointing=recomputes,
        accumulation=1 + accumulates, on_cpu=True,
    )  # fmt: skip
    parts = memory.bytes_per_gpu(planned)
    assert peak_allocated(tracker) == pytest.approx(parts["total"] - parts["weights"], rel=0.08)


@pytest.mark.parametrize("strategy", ["zero2", "ddp", "fp32"])
def test_attention_scores_equal_saved_tensors(strategy):
    import torch

    architecture = {"model_type": "llama", **SHAPES["llama"], "hidden_size": 128, "intermediate_size": 64}
    many = 512  # so that scores are most of what eager attention keeps
    precision, dtype = (
        ("fp32" if strategy == "fp32" else "bf16"),
        (torch.bfloat16 if strategy == "zero2" else torch.float32),
    )
    counted = [
        kept_for_the_backward_pass(architecture, dtype, strategy == "ddp", None, implementation, many)
        for implementation in ("eager", "sdpa")
    ]
    planned = [
        memory.activation_bytes(
            load(architecture, "zero2" if strategy == "zero2" else "ddp", precision=precision, **scores)
        )
        for scores in ({"scores_of": many}, {})
    ]
    # Eager attention also keeps keys and values once for each head that shares them.
    assert planned[0] - planned[1] == pytest.approx(counted[0] - counted[1], rel=0.1)


def test_buckets_equal_deepspeed_configs():
    for name in ("zero1", "zero2", "zero3", "zero3_offload"):
        zero = json.loads((REPOSITORY / "deepspeed_configs" / f"{name}.json").read_text())["zero_optimization"]
        assert zero["reduce_bucket_size"] == memory.REDUCE_BUCKET
        assert zero.get("allgather_bucket_size", memory.ALLGATHER_BUCKET) == memory.ALLGATHER_BUCKET
        assert zero.get("stage3_prefetch_bucket_size", memory.PREFETCH_BUCKET) == memory.PREFETCH_BUCKET


def test_zero3_sizes_follow_the_model():
    full, lora = (memory.zero3_sizes(load(strategy="zero3", world=8, lora=lora)) for lora in (None, Lora(r=16)))
    assert full == {"stage3_param_persistence_threshold": 40_960}
    adapters_of_the_mlp = 16 * 14336
    assert lora["stage3_param_persistence_threshold"] > adapters_of_the_mlp, "each rank keeps the adapters"
    assert memory.zero3_sizes(load(strategy="zero2", world=8)) == {}
    plan = plans.resolve(loader.load("tiny", ("parallelism=zero3",)), plans.Topology(0, 2))
    hidden = loader.load("tiny").model.architecture["hidden_size"]
    assert plan.zero3_sizes["stage3_param_persistence_threshold"] == 10 * hidden


def test_nodes_hold_a_copy_of_the_weights_only_where_it_fits_and_is_faster():
    """Of 70b on eight nodes: 16.4 GiB more per GPU, and the weights of backward passes do not cross the network."""
    pinned = ("parallelism=zero3", "batch.max_per_device_batch_size=1", "trainer.gradient_checkpointing=true")
    fast = plans.resolve(loader.load("70b", pinned), plans.Topology(64, 64, 8, gpu_type="h100-80g"))
    assert fast.fits and "zero_hpz_partition_size" not in fast.zero3_sizes, "eight 400 Gbit/s cards: 3% or less"
    pinned += ("hardware.network_gbs=50",)
    on_48, on_80 = (
        plans.resolve(loader.load("70b", pinned), plans.Topology(64, 64, 8, gpu_type=gpu_type))
        for gpu_type in ("l40s-48g", "h100-80g")
    )
    assert on_48.fits and "zero_hpz_partition_size" not in on_48.zero3_sizes
    assert on_80.fits and on_80.zero3_sizes["zero_hpz_partition_size"] == 8
    more = on_80.memory_bytes_per_gpu["weights"] - on_48.memory_bytes_per_gpu["weights"]
    assert more == 2 * on_80.parameters // 8
    across, within = cost.communicated_bytes(plans.memory_inputs(on_80, on_80.sections.model.architecture))
    everywhere, none = cost.communicated_bytes(plans.memory_inputs(on_48, on_48.sections.model.architecture))
    assert none == 0 and within > 0 and across < everywhere


def test_memory_total_is_the_sum_of_parts():
    for strategy in STRATEGIES:
        parts = memory.bytes_per_gpu(load(strategy=strategy, world=2, gradient_checkpointing=False))
        assert parts["total"] == sum(parts[name] for name in memory.PARTS)
        assert set(parts) == {*memory.PARTS, "total", "reserve"}


def test_reserve_is_driver_context_nccl_and_fragmentation():
    one, two, cpu = (memory.bytes_per_gpu(load(world=world, on_cpu=cpu)) for world, cpu in ((1, 0), (2, 0), (2, 1)))
    assert one["reserve"] == pytest.approx((0.8 + 0.6) * 2**30 + 0.05 * one["total"], abs=3)
    assert two["reserve"] == pytest.approx((0.8 + 0.6 + 1.0) * 2**30 + 0.05 * two["total"], abs=3)
    assert cpu["reserve"] == 0


def test_plan_fits_only_with_its_reserve():
    """3b on one GPU needs 54.9 GiB, and 4.1 must stay free."""
    needs = plans.resolve(loader.load("3b"), plans.Topology(1, 1, gpu_type="80")).memory_bytes_per_gpu
    both = (needs["total"] + needs["reserve"]) / 2**30
    for gpu_type, fits in ((both + 0.01, True), (both - 0.01, False), (needs["total"] / 2**30 + 0.01, False)):
        assert plans.resolve(loader.load("3b"), plans.Topology(1, 1, gpu_type=f"{gpu_type:.4f}")).fits is fits
