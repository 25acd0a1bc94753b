"""Every way to attend is held against the definition, on examples by themselves, forward and backward."""

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
from sft_recipes.training import attention, trainer

LENGTHS = ((9, 1, 14), (5, 7), (40,))
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 64,
}  # fmt: skip


def a_plan(*words, gpus=0):
    return plans.resolve(loader.load("tiny", words), Topology(gpus=gpus, processes=1))


def a_model(kind=LlamaConfig, **changed):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(**{**SMALL, **changed}), dtype=torch.float64)


def rows():
    drawn = torch.Generator().manual_seed(1)
    for number, lengths in enumerate(LENGTHS):
        ids = torch.randint(0, 97, (sum(lengths),), generator=drawn).tolist()
        yield {"input_ids": ids, "labels": ids, "seq_lengths": list(lengths), "row": number}


def loss(model, batch):
    """The sum over all predicted tokens."""
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


def each_example_by_itself():
    for row in rows():
        for ids in torch.tensor(row["input_ids"]).split(row["seq_lengths"]):
            yield {"input_ids": ids[None], "labels": ids[None]}


@pytest.mark.parametrize("way", ["eager", "sdpa", "varlen"])
def test_packed_rows_learn_what_their_examples_would_by_themselves(way):
    """In float64 but for what transformers itself computes in fp32 (rotations, eager's softmax), with grouped heads."""
    wanted, gradients = loss_and_gradients(a_model(attn_implementation="eager"), each_example_by_itself())
    model = a_model(attn_implementation=way)
    found, mine = loss_and_gradients(model, [trainer.collator(a_plan(), 0, way)(list(rows()))])
    assert found == pytest.approx(wanted, rel=1e-8)
    for name, gradient in gradients.items():
        assert attention.relative_error(mine[name], gradient) < 1e-6, name


def test_rows_that_are_not_packed_are_laid_end_to_end_without_padding():
    alone = [{key: row[key] for key in ("input_ids", "labels", "row")} for row in rows()]
    batch = trainer.collator(a_plan("trainer.packing=false"), 0, attention.VARLEN)(alone)
    assert batch["input_ids"].shape == (1, sum(map(sum, LENGTHS))) and "attention_mask" not in batch
    wanted, _ = loss_and_gradients(
        a_model(attn_implementation="eager"),
        [{key: torch.tensor([row[key]]) for key in ("input_ids", "labels")} for row in alone],
    )
    found, _ = loss_and_gradients(a_model(attn_implementation=attention.VARLEN), [batch])
    assert found == pytest.approx(wanted, rel=1e-8)


def test_padded_prompts_are_answered_alike():
    """Generation has no bounds: it goes through torch's masked attention."""
    prompts = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    said = [
        a_model(attn_implementation=way)
        .eval()
        .generate(prompts, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0)
        for way in (attention.SDPA, attention.VARLEN)
    ]
    assert torch.equal(*said)


def test_rows_without_bounds_are_attended_as_by_sdpa():
    """A row longer than the window, and a text that comes in two pieces, neither with a mask."""
    ids = torch.arange(48)[None] % 97
    window = {"kind": MistralConfig, "sliding_window": 16}
    whole = [a_model(attn_implementation=way, **window)(ids).logits for way in ("eager", attention.VARLEN)]
    assert attention.relative_error(whole[1], whole[0]) < 1e-6
    pieces = []
    for way in (attention.SDPA, attention.VARLEN):
        model = a_model(attn_implementation=way)
        begun = model(ids[:, :20], use_cache=True)
        pieces.append(model(ids[:, 20:], past_key_values=begun.past_key_values).logits)
    assert attention.relative_error(pieces[1], pieces[0]) < 1e-9


def test_dropout_that_was_not_seen_is_no_training_without_it():
    batch = trainer.collator(a_plan(), 0, attention.VARLEN)(list(rows()))
    model = a_model(GPT2Config, attn_pdrop=0.5, attn_implementation=attention.VARLEN).train()
    with pytest.raises(RuntimeError, match="varlen drops no scores out"):
        loss(model, batch)


def every_token(queries, keys, values, bounds, longest, scale):
    """Attends across examples."""
    parts = (one.transpose(0, 1)[None] for one in (queries, keys, values))
    return scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def another_scale(*arguments):
    return attention.varlen(*arguments[:-1], 0.1)


def no_number(*arguments):
    return attention.varlen(*arguments) * float("nan")


def one_gradient_too_few(queries, keys, *rest):
    return attention.varlen(queries, keys.detach() + 0 * keys, *rest)


def attention_of_cuda(queries, keys, values, bounds, longest, scale):
    return torch.ops.aten._flash_attention_forward(
        queries, keys, values, bounds, bounds, longest, longest, 0.0, True, return_debug_mask=False
    )[0]


def test_the_definition_is_attention():
    """PyTorch's own, causal, with grouped heads; another mask or scale is far outside the tolerance."""
    query, key, value = (torch.randn(37, heads, 16) for heads in (8, 2, 2))
    ours = attention.by_definition(query, key, value)

    def theirs(**options):
        parts = (one.transpose(0, 1) for one in (query, key, value))
        return scaled_dot_product_attention(*parts, enable_gqa=True, **options).transpose(0, 1)

    assert attention.relative_error(ours, theirs(is_causal=True)) < 1e-6
    for wrong in ({}, {"is_causal": True, "scale": 0.2}):
        assert attention.relative_error(ours, theirs(**wrong)) > 3 * attention.TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_way_that_is_right_passes_and_one_that_is_wrong_does_not(dtype):
    assert attention.wrong(attention.varlen, "cpu", dtype) is None
    for kernel in (every_token, another_scale, no_number, one_gradient_too_few):
        assert attention.wrong(kernel, "cpu", dtype).startswith("it is off by"), kernel


def test_a_kernel_that_is_not_there_is_passed_over_and_named():
    assert attention.wrong(attention.flash, "cpu", torch.bfloat16) == "flash_attn is not installed"
    assert "flash_attention" in attention.wrong(attention_of_cuda, "cpu", torch.float32)


@pytest.mark.parametrize(
    ("kind", "changed", "why"),
    [
        (LlamaConfig, {}, None),
        (MistralConfig, {"sliding_window": None}, None),
        (MistralConfig, {"sliding_window": 4096}, None),
        (MistralConfig, {"sliding_window": 32}, "it attends in a window of 32 tokens"),
        (LlamaConfig, {"attention_dropout": 0.1}, "it drops scores out"),
        (GPT2Config, {"attn_pdrop": 0.1}, "it drops scores out"),
        (Gemma2Config, {"head_dim": 8}, "transformers knows no other for it"),
    ],
)
def test_auto_takes_the_fastest_that_a_model_can_be_attended_with(kind, changed, why):
    model = a_model(kind, **changed)
    choice = attention.settle(a_plan(), model)
    masked = "eager" if kind is Gemma2Config else "sdpa"
    assert choice.name == model.config._attn_implementation == (masked if why else "varlen")
    assert why is None or choice.why == why
    if why:
        with pytest.raises(UserError, match=f"^model.attention: varlen cannot be had here: {why}; say model.atten"):
            attention.settle(a_plan("model.attention=varlen"), a_model(kind, **changed))


def test_what_the_recipe_names_is_taken():
    for way in ("eager", "sdpa"):
        model = a_model(attn_implementation=way)
        assert attention.settle(a_plan(f"model.attention={way}"), model).name == model.config._attn_implementation


def test_flash_attention_that_is_not_installed_is_refused_with_the_way_to_it():
    with pytest.raises(UserError, match="flash_attention_2 needs flash-attn, .* make flash-attn installs it"):
        attention.loaded_with(a_plan("model.attention=flash_attention_2", "precision=bf16", gpus=1))


def test_flash_attention_is_refused_by_the_plan_where_it_cannot_be():
    with pytest.raises(UserError, match="computes in 16 bits on a GPU, and this plan trains on the CPU; say model.at"):
        a_plan("model.attention=flash_attention_2")
    with pytest.raises(UserError, match="trains in fp32; say model.attention=auto, or precision=bf16"):
        a_plan("model.attention=flash_attention_2", "precision=fp32", gpus=1)


SCRIPT = REPOSITORY / "requirements" / "flash-attn.sh"


def test_flash_attention_is_not_built_where_torch_cannot_use_it(tmp_path):
    """With a Python whose torch says that it is a CPU build: the real one here may be a CUDA build."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    done = subprocess.run([SCRIPT, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "is not built for CUDA; " in done.stderr and "make setup installs it" in done.stderr


def test_what_flash_attention_is_installed_from_is_a_file_or_has_its_hash(tmp_path):
    """With a Python whose torch says that it is built for CUDA."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    command = [SCRIPT, tmp_path]
    for given, said in (
        ({"WHEEL": "https://example.org/flash_attn.whl"}, "WHEEL: https://example.org/flash_attn.whl has no #sha"),
        ({"WHEEL": "flash-attn"}, "WHEEL: flash-attn is no file and no https:// address"),
        ({"WHEEL": "git+https://example.org/flash"}, "is no file and no https:// address"),
        ({"WHEEL": "--index-url=https://example.org"}, "is no file and no https:// address"),
        ({"MAX_JOBS": "0"}, "MAX_JOBS: 0 is no number of compilations"),
        ({"MAX_JOBS": "abc"}, "MAX_JOBS: abc is no number of compilations"),
    ):
        done = subprocess.run(command, env={**os.environ, **given}, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr, done
    bare = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=bare, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "there is no nvcc to compile with; install the CUDA toolkit" in done.stderr


KERNEL = f"kernels-community/flash-attn2@{'0123456789' * 4}"


def test_a_kernel_of_the_hub_is_taken_by_its_commit_alone():
    """It is code from elsewhere."""
    for name in (KERNEL.partition("@")[0], KERNEL[:-1], f"{KERNEL}0"):
        with pytest.raises(UserError, match="a kernel from the Hub, which is code, and nothing says which; write own"):
            a_plan(f"model.attention={name}")
    plan = a_plan(f"model.attention={KERNEL}")
    assert "a kernel from the Hub runs, unseen and unchecked" in render.format_plan(plan)
    with pytest.raises(UserError, match="flash-attn2@0123456789.* needs the kernels package, which is not installed"):
        attention.loaded_with(plan)
    assert attention.takes_bounds(KERNEL)
