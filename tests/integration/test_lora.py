"""Adapters: saved files, losses per source, merging, and loading for generation."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers.cli_errors import check_refused
from helpers.workplace import SHORT, manifest, metrics
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sft_recipes.data.toy import toy_dataset
from sft_recipes.planner import plan as plans
from sft_recipes.runtime import env
from sft_recipes.runtime.errors import UserError
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.runtime.units import GIB
from sft_recipes.tools import generate, merge_adapters
from sft_recipes.training import lora

ADAPTERS = ("lora.r=4", "trainer.learning_rate=5e-3", "trainer.max_steps=4", "trainer.packing=false")
# Multiples of 64: bitsandbytes' blocks.
SMALL = (
    "model.architecture={model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, "
    "num_attention_heads: 2, vocab_size: 512, max_position_embeddings: 512, initializer_range: 0.08}"
)


@pytest.fixture(scope="module")
def adapted(shared_workplace, few_rows, tmp_path_factory):
    """A LoRA run in fp32, on two sources, with a retention eval set."""
    others = tmp_path_factory.mktemp("rows") / "others.jsonl"
    others.write_text("".join(json.dumps(row) + "\n" for row in toy_dataset.rows(100, True)), encoding="utf-8")
    overrides = (*SHORT, SMALL, *ADAPTERS, f"data.train=[{few_rows}, {others}]", f"data.retention_eval={others}")
    return shared_workplace.trained("tiny", "--name", "lora", *overrides)


@pytest.fixture(scope="module")
def quantized(shared_workplace, few_rows):
    """A QLoRA run, evaluated after half its steps."""
    return shared_workplace.trained(
        "tiny",
        "--name",
        "qlora",
        *SHORT,
        SMALL,
        *ADAPTERS,
        f"data.train={few_rows}",
        "lora.quantize=nf4",
        "precision=bf16",
        "trainer.eval_steps=2",
    )


def test_final_has_adapters_tokenizer_and_generation_config(adapted):
    files = {path.name for path in (adapted / "final").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "generation_config.json", "tokenizer.json"} <= files
    assert not files & {"model.safetensors", "training_args.bin", "README.md"}
    saved = load_file(adapted / "final" / "adapter_model.safetensors")
    assert len(saved) == 2 * 7 * 2 and all(tensor.dtype == torch.float32 for tensor in saved.values())
    plan = json.loads((adapted / "plan.json").read_text())
    assert plan["trained_parameters"] == sum(tensor.numel() for tensor in saved.values())


def test_trained_and_frozen_parameters_are_logged_and_recorded(adapted):
    table, log = manifest(adapted)["parameters"], (adapted / "log.txt").read_text()
    trained = {kind: numbers["trained"] for kind, numbers in table.items() if numbers["trained"]}
    assert trained.keys() == {"attention", "mlp"}
    assert sum(trained.values()) == json.loads((adapted / "plan.json").read_text())["trained_parameters"]
    frozen = sum(numbers["frozen"] for numbers in table.values())
    assert f"trained parameters: {sum(trained.values()):,} (mlp " in log and f"frozen parameters: {frozen:,} (" in log


def test_each_source_has_a_validation_loss(adapted):
    prepared = json.loads((adapted / "prepared.json").read_text())
    counted = json.loads((Path(prepared["folder"]) / "details.json").read_text())["sources"]["validation"]
    tokens = {source["name"]: source["supervised_tokens"] for source in counted}
    assert tokens.keys() == {"few", "others"} and min(tokens.values()) > 0
    evaluated = [line for line in metrics(adapted) if "eval_loss" in line]
    assert evaluated
    for line in evaluated:
        weighted = sum(line[f"eval_{name}_loss"] * count for name, count in tokens.items()) / sum(tokens.values())
        assert line["eval_loss"] == pytest.approx(weighted, rel=1e-6)
        assert line["eval_few_loss"] != line["eval_others_loss"]


def test_retention_loss_is_measured_before_and_after(adapted):
    lines = [line for line in metrics(adapted) if "eval_retention_loss" in line]
    assert lines[0]["step"] == 0 and lines[-1]["step"] == manifest(adapted)["steps"] > 0
    assert len({line["eval_retention_loss"] for line in lines}) == len(lines)
    assert manifest(adapted)["best_step"] > 0 and not (adapted / "best-0").exists()
    assert "epoch 0.00  eval_loss " in (adapted / "log.txt").read_text()


def logits_of(folder):
    """Return the logits of a few tokens from a folder, in plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(40)[None]).logits


def test_merged_model_has_logits_of_adapted_model(in_process, adapted):
    done = in_process("merge", "lora", RUNS_DIR=str(adapted.parent))
    assert done.returncode == 0 and "merged" in done.stdout, done.stderr
    merged = load_file(adapted / "merged" / "model.safetensors")
    base = load_file(json.loads((adapted / "prepared.json").read_text())["model"] + "/model.safetensors")
    assert merged.keys() == base.keys()
    changed = [name for name in merged if not torch.equal(merged[name], base[name])]
    assert len(changed) == 2 * 7 and all("_proj" in name for name in changed)
    torch.testing.assert_close(logits_of(adapted / "merged"), logits_of(adapted / "final"), rtol=1e-4, atol=1e-4)
    base_folder = json.loads((adapted / "prepared.json").read_text())["model"]
    assert (logits_of(adapted / "final") - logits_of(base_folder)).abs().max() > 0.1, "the adapters have no effect"


def test_merged_qlora_run_is_a_bf16_model(quantized):
    assert manifest(quantized)["dtypes"]["frozen"] == "nf4" and manifest(quantized)["dtypes"]["weights"] == "fp32"
    merge_adapters.merge(RunDir(quantized))
    merged = load_file(quantized / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    config = json.loads((quantized / "merged" / "config.json").read_text())
    assert "quantization_config" not in config


def test_generate_uses_the_4_bit_base(quantized, capsys):
    from bitsandbytes.nn import Linear4bit

    model = generate.load_final_model(plans.read(quantized / "plan.json"), RunDir(quantized))
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 2 * 7 and model.get_input_embeddings().weight.dtype == torch.bfloat16
    ids = torch.arange(40)[None]
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
    assert (adapted - base).abs().max() > 0.1, "the adapters have no effect"
    assert generate.main(RunDir(quantized), ["Please add: 1 + 1"]) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_missing_from_scratch_base_is_named(adapted, tmp_path):
    shutil.copytree(adapted, tmp_path / "run")
    prepared = tmp_path / "run" / "prepared.json"
    prepared.write_text(json.dumps({**json.loads(prepared.read_text()), "model": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match=f"the base model of run is gone: found no {tmp_path / 'gone'}"):
        lora.find_base_folder(plans.read(adapted / "plan.json"), RunDir(tmp_path / "run"))


def test_merge_is_rejected_if_host_memory_is_too_small(adapted, tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    limit.write_text(str(GIB // 2))
    monkeypatch.setattr(env, "_MEMORY_LIMITS", (limit,))
    shutil.copytree(adapted, tmp_path / "run", ignore=shutil.ignore_patterns("merged"))
    with pytest.raises(UserError, match=r"found 0\.5 GiB of host memory, expected 1\.0 GiB or more"):
        merge_adapters.merge(RunDir(tmp_path / "run"))
    assert not (tmp_path / "run" / "merged").exists()


def test_adapters_are_not_evaluated_without_their_base(adapted, tmp_path, in_process):
    """A model that the recipe names by its folder."""
    run, gone = RunDir(tmp_path / "orphan"), str(tmp_path / "gone")
    shutil.copytree(adapted, run.path)
    run.prepared.write_text(json.dumps(json.loads(run.prepared.read_text()) | {"model": gone}))
    plan = json.loads(run.plan.read_text())
    plan["sections"]["model"] |= {"from_scratch": False, "name_or_path": gone}
    run.plan.write_text(json.dumps(plan))
    check_refused(in_process("eval", str(run.path), EVAL_VENV=sys.prefix), f"model.name_or_path: .*'{gone}'")


def test_full_fine_tuning_run_is_not_merged(short_run):
    with pytest.raises(UserError, match="short has no adapters: full fine-tuning"):
        merge_adapters.merge(RunDir(short_run))
