"""Attention implementations against the definition, on unpacked examples, forward and backward."""

import os
import subprocess

import pytest
import torch
from helpers.workplace import REPOSITORY
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, MistralConfig

from sft_recipes.config import loader
from sft_recipes.data.tokenize import IGNORED
from sft_recipes.planner import plan as plans
from sft_recipes.planner import render
from sft_recipes.planner.plan import Topology
from sft_recipes.runtime.errors import UserError
from sft_recipes.training import attention, dataset

LENGTHS = ((9, 1, 14), (5, 7), (40,))
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 64,
}  # fmt: skip


def make_plan(*overrides, gpus=0):
    return plans.resolve(loader.load("tiny", overrides), Topology(gpus=gpus, processes=1))


def make_model(kind=LlamaConfig, **changed):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(**{**SMALL, **changed}), dtype=torch.float64)


def rows():
    generator = torch.Generator().manual_seed(1)
    for number, lengths in enumerate(LENGTHS):
        ids = torch.randint(0, 97, (sum(lengths),), generator=generator).tolist()
        yield {"input_ids": ids, "labels": ids, "seq_lengths": list(lengths), "row": number}


def loss(model, batch):
    """Return the sum over all predicted tokens."""
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "row")}
    logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(
        logits, batch["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def loss_and_gradients(model, batches):
    model.zero_grad()
    total = sum(loss(model, batch) for batch in batches)
    total.backward()
    return total.item(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


def unpacked_examples():
    for row in rows():
        for ids in torch.tensor(row["input_ids"]).split(row["seq_lengths"]):
            yield {"input_ids": ids[None], "labels": ids[None]}


@pytest.mark.parametrize("name", ["eager", "sdpa", "varlen"])
def test_packed_rows_have_loss_and_gradients_of_unpacked_examples(name):
    """In float64, except what transformers computes in fp32 (rotations, eager's softmax); with grouped heads."""
    expected, gradients = loss_and_gradients(make_model(attn_implementation="eager"), unpacked_examples())
    model = make_model(attn_implementation=name)
    total, packed_gradients = loss_and_gradients(model, [dataset.make_collator(make_plan(), 0, name)(list(rows()))])
    assert total == pytest.approx(expected, rel=1e-8)
    for weight, gradient in gradients.items():
        assert attention.relative_error(packed_gradients[weight], gradient) < 1e-6, weight


def test_unpacked_rows_are_concatenated_without_padding():
    unpacked = [{key: row[key] for key in ("input_ids", "labels", "row")} for row in rows()]
    batch = dataset.make_collator(make_plan("trainer.packing=false"), 0, attention.VARLEN)(unpacked)
    assert batch["input_ids"].shape == (1, sum(map(sum, LENGTHS))) and "attention_mask" not in batch
    expected, _ = loss_and_gradients(
        make_model(attn_implementation="eager"),
        [{key: torch.tensor([row[key]]) for key in ("input_ids", "labels")} for row in unpacked],
    )
    total, _ = loss_and_gradients(make_model(attn_implementation=attention.VARLEN), [batch])
    assert total == pytest.approx(expected, rel=1e-8)


def test_generation_equals_sdpa():
    """Generation has no sequence boundaries: it uses torch's masked attention."""
    prompts = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    outputs = [
        make_model(attn_implementation=name)
        .eval()
        .generate(prompts, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0)
        for name in (attention.SDPA, attention.VARLEN)
    ]
    assert torch.equal(*outputs)


def test_text_in_two_pieces_with_a_cache_equals_sdpa():
    """Without a mask."""
    ids = torch.arange(48)[None] % 97
    pieces = []
    for name in (attention.SDPA, attention.VARLEN):
        model = make_model(attn_implementation=name)
        first = model(ids[:, :20], use_cache=True)
        pieces.append(model(ids[:, 20:], past_key_values=first.past_key_values).logits)
    assert attention.relative_error(pieces[1], pieces[0]) < 1e-9


def test_varlen_rejects_attention_dropout():
    batch = dataset.make_collator(make_plan(), 0, attention.VARLEN)(list(rows()))
    model = make_model(GPT2Config, attn_pdrop=0.5, attn_implementation=attention.VARLEN).train()
    with pytest.raises(RuntimeError, match="varlen has no attention dropout"):
        loss(model, batch)


def cross_example(queries, keys, values, boundaries, longest, scale):
    """Attend across examples."""
    parts = (tensor.transpose(0, 1)[None] for tensor in (queries, keys, values))
    return scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def wrong_scale(*arguments):
    return attention.varlen(*arguments[:-1], 0.1)


def non_finite(*arguments):
    return attention.varlen(*arguments) * float("nan")


def missing_gradient(queries, keys, *rest):
    return attention.varlen(queries, keys.detach() + 0 * keys, *rest)


def cuda_only(queries, keys, values, boundaries, longest, scale):
    return torch.ops.aten._flash_attention_forward(
        queries, keys, values, boundaries, boundaries, longest, longest, 0.0, True, return_debug_mask=False
    )[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_find_problem_rejects_wrong_kernels(dtype):
    assert attention.find_problem(attention.varlen, "cpu", dtype) is None
    for kernel in (cross_example, wrong_scale, non_finite, missing_gradient):
        assert attention.find_problem(kernel, "cpu", dtype).startswith("relative error "), kernel


def test_find_problem_names_unavailable_kernels():
    assert attention.find_problem(attention.flash, "cpu", torch.bfloat16) == "flash_attn is not installed"
    assert "flash_attention" in attention.find_problem(cuda_only, "cpu", torch.float32)


@pytest.mark.parametrize(
    ("kind", "changed", "reason"),
    [
        (LlamaConfig, {}, None),
        (MistralConfig, {"sliding_window": None}, None),
        (MistralConfig, {"sliding_window": 4096}, None),
        (MistralConfig, {"sliding_window": 32}, "sliding window of 32 tokens"),
        (LlamaConfig, {"attention_dropout": 0.1}, "attention dropout"),
        (GPT2Config, {"attn_pdrop": 0.1}, "attention dropout"),
        (Gemma2Config, {"head_dim": 8}, "transformers supports no other for this model"),
    ],
)
def test_auto_selects_the_fastest_supported(kind, changed, reason):
    model = make_model(kind, **changed)
    choice = attention.select(make_plan(), model)
    masked = "eager" if kind is Gemma2Config else "sdpa"
    assert choice.name == model.config._attn_implementation == (masked if reason else "varlen")
    assert reason is None or choice.reason == reason
    if reason:
        with pytest.raises(
            UserError, match=f"^model.attention: varlen is unavailable: {reason}. Set model.attention=auto"
        ):
            attention.select(make_plan("model.attention=varlen"), make_model(kind, **changed))


def test_recipe_sets_attention():
    for name in ("eager", "sdpa"):
        model = make_model(attn_implementation=name)
        assert attention.select(make_plan(f"model.attention={name}"), model).name == model.config._attn_implementation


def test_missing_flash_attention_is_rejected_with_the_fix():
    with pytest.raises(UserError, match="flash_attention_2 needs the package flash_attn, .*`make flash-attn`"):
        attention.implementation_to_load(make_plan("model.attention=flash_attention_2", "precision=bf16", gpus=1))


def test_plan_rejects_flash_attention_on_cpu_and_in_fp32():
    with pytest.raises(UserError, match="found CPU, expected bf16 on a GPU. Set model.attention=auto"):
        make_plan("model.attention=flash_attention_2")
    with pytest.raises(UserError, match="found fp32, expected bf16 on a GPU. Set model.attention=auto"):
        make_plan("model.attention=flash_attention_2", "precision=fp32", gpus=1)


SCRIPT = REPOSITORY / "requirements" / "flash-attn.sh"


def test_flash_attention_is_not_built_for_cpu_torch(tmp_path):
    """With a fake Python for a CPU build: the real torch may be a CUDA build."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    done = subprocess.run([SCRIPT, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "has a CPU build of torch, expected a CUDA build" in done.stderr and "make setup" in done.stderr


def test_flash_attention_wheel_must_be_a_file_or_have_a_hash(tmp_path):
    """With a fake Python for a CUDA build."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    command = [SCRIPT, tmp_path]
    for variables, message in (
        ({"WHEEL": "https://example.org/flash_attn.whl"}, "WHEEL: https://example.org/flash_attn.whl has no hash"),
        ({"WHEEL": "flash-attn"}, "WHEEL: flash-attn is not a file or an https:// URL"),
        ({"WHEEL": "git+https://example.org/flash"}, "is not a file or an https:// URL"),
        ({"WHEEL": "--index-url=https://example.org"}, "is not a file or an https:// URL"),
        ({"MAX_JOBS": "0"}, "MAX_JOBS: found 0, expected an integer of at least 1"),
        ({"MAX_JOBS": "abc"}, "MAX_JOBS: found abc, expected an integer of at least 1"),
    ):
        done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and message in done.stderr, done
    bare = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=bare, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "nvcc not found. Install the CUDA toolkit" in done.stderr


KERNEL = f"kernels-community/flash-attn2@{'0123456789' * 4}"


def test_hub_kernel_needs_a_commit():
    """A kernel is code."""
    for name in (KERNEL.partition("@")[0], KERNEL[:-1], f"{KERNEL}0"):
        with pytest.raises(UserError, match=r"attention: found .* or text of the pattern '.*@\[0-9a-f\]\{40\}"):
            make_plan(f"model.attention={name}")
    plan = make_plan(f"model.attention={KERNEL}")
    assert "runs a kernel from the Hub as this user, unchecked" in render.format_plan(plan)
    with pytest.raises(UserError, match="flash-attn2@0123456789.* needs the package kernels, which is not installed"):
        attention.implementation_to_load(plan)
    assert attention.takes_boundaries(KERNEL)
