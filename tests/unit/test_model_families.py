"""Model families from their configurations: each is prepared, trained a step, saved, and loaded elsewhere."""

import dataclasses
import shutil

import pytest
import torch
from helpers.workplace import SMALL_LLAMA
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from sft_recipes.config import loader
from sft_recipes.data import prepare
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Topology
from sft_recipes.runtime.errors import UserError
from sft_recipes.runtime.run_dir import RunDir, read_json
from sft_recipes.training import main, parameter_table, sft_config

DENSE = {key: SMALL_LLAMA[key] for key in SMALL_LLAMA if key not in ("model_type", "tie_word_embeddings")}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.001}
HEADS = {"head_dim": 16}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2, "shared_intermediate_size": 64}
GRANITE = {**MAMBA, **EXPERTS, "initializer_range": 0.1}

# The numbers that differ from a small Llama's, by name and model type.
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": HEADS,
    "olmo2": {},
    "gemma2": {**HEADS, "sliding_window": 16},
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 512},
    "mixtral": EXPERTS,
    "qwen3_moe": {**EXPERTS, **HEADS, "moe_intermediate_size": 32, "mlp_only_layers": []},
    "gpt_oss": {**EXPERTS, **HEADS, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "granitemoehybrid": {**GRANITE, "layer_types": ["mamba", "attention"]},
    "granitemoehybrid without experts": {**GRANITE, "num_local_experts": 0, "num_experts_per_tok": 0,
                                         "layer_types": ["attention"] * 2, "position_embedding_type": "rope"},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
}  # fmt: skip
WITH_EXPERTS = {"mixtral", "qwen3_moe", "gpt_oss", "granitemoehybrid"}
WITH_STATE = {"granitemoehybrid", "lfm2"}
UNPACKED = {*WITH_STATE, "gpt_oss"}  # whose mask ignores position_ids


@pytest.fixture
def save_family(tmp_path, model_folder):
    """Save a model of a family with random weights and the small model's tokenizer."""

    def save(family, **more):
        folder = tmp_path / "base"
        shutil.copytree(model_folder, folder)
        numbers = {} if family == "gpt2" else DENSE
        values = {**numbers, "vocab_size": DENSE["vocab_size"], **FAMILIES[family], **more}
        config = AutoConfig.for_model(family.split()[0], bos_token_id=None, eos_token_id=2, pad_token_id=3, **values)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return folder

    return save


def prepare_family(tmp_path, folder, rows, *overrides):
    """Return the settled plan, its run directory and its prepared data, as `train` has them."""
    settings = (
        "model.from_scratch=false", "model.architecture={}", f"model.name_or_path={folder}", f"data.train={rows}",
        "batch.effective_batch_size=4", "batch.max_per_device_batch_size=2", "trainer.max_steps=1",
        "trainer.max_length=128", "trainer.warmup_ratio=0", "precision=fp32", *overrides,
    )  # fmt: skip
    plan = plans.resolve(loader.load("tiny", settings), Topology(gpus=0, processes=1))
    prepared = prepare.prepare(plan, tmp_path / "store")
    return plans.with_prepared_data(plan, prepared), RunDir(tmp_path / "run"), dataclasses.asdict(prepared)


def build(tmp_path, folder, rows, *overrides):
    plan, run_dir, prepared = prepare_family(tmp_path, folder, rows, *overrides)
    run_dir.path.mkdir(exist_ok=True)
    return main.build(plan, run_dir, sft_config.make_sft_config(plan, run_dir), prepared)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(5, 37)[None]).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_family_trains_saves_and_loads_elsewhere(tmp_path, save_family, few_rows, family):
    base = save_family(family)
    trainer = build(tmp_path, base, few_rows)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    unchanged = [name for name, value in trainer.model.named_parameters() if torch.equal(before[name], value)]
    assert not unchanged
    assert trainer.plan.packing is (family not in UNPACKED)
    table = parameter_table.count(trainer.model)
    assert sum(numbers["trained"] for numbers in table.values()) == trainer.model.num_parameters()
    assert not any(numbers["frozen"] for numbers in table.values()) and not table.get("other")
    assert {"experts", "router"} & table.keys() == ({"experts", "router"} if family in WITH_EXPERTS else set())
    assert ("recurrent" in table) is (family in WITH_STATE)
    assert ("aux_loss" in trainer.state.log_history[0]) is (family in WITH_EXPERTS)

    assert trainer.save_weights(tmp_path / "run" / "last") is None
    moved = shutil.move(tmp_path / "run" / "last", tmp_path / "elsewhere")
    assert read_json(moved / "config.json") == read_json(base / "config.json")
    loaded = AutoModelForCausalLM.from_pretrained(moved, dtype=torch.float32)
    torch.testing.assert_close(logits_of(loaded), logits_of(trainer.model))


def balance_loss(router_logits, chosen):
    """Equations 4 to 6 of Switch Transformer (arXiv:2101.03961) over the tokens of all layers."""
    probabilities = torch.cat(router_logits).float().softmax(-1)
    routed = torch.zeros_like(probabilities).scatter(1, probabilities.topk(chosen).indices, 1.0)
    return probabilities.shape[1] * (routed.mean(0) * probabilities.mean(0)).sum()


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_router_loss_equals_a_plain_loop_under_accumulation(tmp_path, save_family, few_rows, family, checkpointing):
    """Of two micro-batches: the mean of their router losses, once, plus the loss per token of both together."""
    base, coefficient = save_family(family), 0.5
    overrides = (f"trainer.router_aux_loss_coef={coefficient}", f"trainer.gradient_checkpointing={checkpointing}")
    trainer = build(tmp_path, base, few_rows, *overrides)
    batches = list(trainer.get_train_dataloader())[:2]
    trainer.train()
    logged = trainer.state.log_history[0]

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
        outputs = model(**inputs, output_router_logits=True, use_cache=False)
        scored = torch.nn.functional.cross_entropy(
            outputs.logits[0, :-1], batch["labels"][0, 1:], ignore_index=-100, reduction="sum"
        )
        balance = balance_loss(outputs.router_logits, EXPERTS["num_experts_per_tok"])
        loss = scored / tokens + coefficient * balance / len(batches)
        loss.backward()
        total += loss.item()
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in model.parameters()]).item()
    assert logged["loss"] == pytest.approx(total, rel=1e-5)
    assert logged["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert coefficient * 0.5 < total - scored.item() / tokens, "the router loss is a visible part"


@pytest.mark.parametrize("experts", [False, True], ids=["experts frozen", "experts adapted"])
def test_lora_trains_fused_experts_only_if_set(tmp_path, save_family, few_rows, experts):
    base = save_family("mixtral")
    trainer = build(tmp_path, base, few_rows, "lora.r=4", f"lora.experts={str(experts).lower()}")
    table = parameter_table.count(trainer.model)
    lines = parameter_table.lines(trainer.plan, table)
    assert table["attention"]["trained"] > 0 and table["experts"]["frozen"] == 2 * 4 * 3 * 32 * 64
    assert (table["experts"]["trained"] > 0) is experts
    frozen = "experts stay frozen: 49,152 parameters, 65% of the model. Set lora.experts=true to adapt them"
    assert (lines[-1] == frozen) is not experts and lines[0].startswith("trained parameters: ")
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(before[name], value)}
    assert changed and all(".lora_" in name for name in changed)
    assert any("experts" in name for name in changed) is experts

    assert trainer.save_weights(tmp_path / "run" / "last") is None
    moved = shutil.move(tmp_path / "run" / "last", tmp_path / "elsewhere")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), moved)
    torch.testing.assert_close(logits_of(loaded), logits_of(trainer.model))
    torch.testing.assert_close(logits_of(loaded.merge_and_unload()), logits_of(trainer.model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("mixtral", ("lora.r=4", "lora.quantize=nf4"), "^lora.quantize: fused experts .* Remove lora.quantize$"),
        ("llama", ("lora.r=4", "lora.experts=true"), "^lora.experts: .* has no fused experts. Remove lora.experts$"),
        (
            "gpt2",
            ("lora.r=4", "lora.target_modules=[q_proj]"),
            r"^lora.target_modules: found \['q_proj'\], and the linear layers of this model are c_attn, c_fc, c_proj. Set",
        ),
        ("llama", ("trainer.router_aux_loss_coef=0.01",), "^trainer.router_aux_loss_coef: .* has no experts"),
        ("llama", ("lora.r=4", "lora.experts=true", "lora.dropout=0.1"), "lora.dropout: found 0.1, expected 0 with"),
    ],
)
def test_settings_that_do_not_fit_the_experts_are_rejected(tmp_path, save_family, few_rows, family, overrides, message):
    with pytest.raises(UserError, match=message):
        build(tmp_path, save_family(family), few_rows, *overrides)


def test_optimizer_without_some_parameters_is_rejected(tmp_path, save_family, few_rows):
    trainer = build(tmp_path, save_family("llama"), few_rows)
    name, left_out = next(iter(trainer.model.named_parameters()))
    trainer.optimizer = torch.optim.AdamW([value for value in trainer.model.parameters() if value is not left_out])
    with pytest.raises(UserError, match=f"trainer.optim: the optimizer lacks trained parameters: .*{name}"):
        trainer.train()


def test_run_of_a_model_with_state_resumes_unpacked(tmp_path, save_family, few_rows):
    """The plan of a new attempt, before data preparation, asks for packing as the recipe does."""
    folder = save_family("lfm2")
    plan, _, prepared = prepare_family(tmp_path, folder, few_rows)
    again, _, prepared_again = prepare_family(tmp_path, folder, few_rows)
    assert plan.packing is again.packing is False and prepared == prepared_again
    fresh = plans.resolve(
        loader.load("tiny", [f"model.name_or_path={folder}", "model.from_scratch=false"]), Topology(0, 1)
    )
    assert fresh.packing and "packing" not in plans.find_differences(plan, fresh)
    (note,) = [note for note in plan.notes if note.startswith("packing is off: layers of type conv carry state ")]
    assert f"{plan.rows} padded rows per epoch instead of about" in note


def test_max_length_above_the_positions(tmp_path, save_family, few_rows):
    plan, *_ = prepare_family(tmp_path, save_family("llama"), few_rows, "trainer.max_length=2048")
    assert "trainer.max_length=2048 is 4 times the 512 positions of the model (RoPE)" in "".join(plan.notes)


def test_max_length_above_a_table_of_positions_is_rejected(tmp_path, save_family, few_rows):
    with pytest.raises(
        UserError, match=r"^trainer.max_length: .*found 1024, expected 512.*Set trainer.max_length=512$"
    ):
        prepare_family(tmp_path, save_family("gpt2"), few_rows, "trainer.max_length=1024")
