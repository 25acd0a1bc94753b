"""`final/` has the base model's dtype, and the trained weights."""

import json

import pytest
import torch
from datasets import load_from_disk
from helpers.workplace import SHORT, manifest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from sft_recipes.data.tokenize import IGNORED
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.tools import generate
from sft_recipes.training.checkpoint import checkpoint_format
from sft_recipes.training.weight_files import PublishedCopy


def write_model(path, tensors, dtype="float32", **more):
    """Write a model folder with one file per dictionary of tensors, and an index."""
    path.mkdir()
    files = {f"model-{number}.safetensors": of for number, of in enumerate(tensors)}
    for name, of in files.items():
        save_file(of, path / name, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(t.nbytes for of in tensors for t in of.values()), "total_parameters": 1},
        "weight_map": {tensor: name for name, of in files.items() for tensor in of},
    }
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps({"dtype": dtype, **more}))
    return path


def publish(base, source, target):
    target.mkdir()
    checkpoint_format.copy_model(source, target, PublishedCopy(base))
    return {name: tensor for file in target.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_fp32_weights_get_the_dtype_of_the_base(tmp_path):
    """`scale` is fp32 in the base too, `new` is not in it; `half` and `ids` are not fp32 before."""
    torch.manual_seed(0)
    trained = [
        {"layer": torch.randn(3, 5), "scale": torch.randn(7), "one": torch.tensor(2.5)},
        {"new": torch.randn(4), "half": torch.randn(3).bfloat16(), "ids": torch.arange(3)},
    ]
    base = {"layer": torch.zeros(3, 5), "one": torch.tensor(0.0), "half": torch.zeros(3)}
    base = {**{name: tensor.bfloat16() for name, tensor in base.items()}, "scale": torch.zeros(7)}
    source = write_model(tmp_path / "source", trained, text_config={"dtype": "float32", "vocab_size": 4})
    config = {"torch_dtype": "bfloat16", "use_cache": True, "text_config": {"torch_dtype": "bfloat16", "vocab_size": 3}}
    base_folder = write_model(tmp_path / "base", [base])
    (base_folder / "config.json").write_text(json.dumps(config))
    result = publish(base_folder, source, tmp_path / "final")
    everything = {**trained[0], **trained[1]}
    dtypes = dict.fromkeys(("layer", "one", "new", "half"), torch.bfloat16)
    dtypes |= {"scale": torch.float32, "ids": torch.int64}
    assert {name: tensor.dtype for name, tensor in result.items()} == dtypes
    assert all(torch.equal(result[name], everything[name].to(dtype)) for name, dtype in dtypes.items())
    config["text_config"]["vocab_size"] = 4
    assert json.loads((tmp_path / "final" / "config.json").read_text()) == config
    index = json.loads((tmp_path / "final" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in result.values()), "total_parameters": 1}
    assert index["weight_map"] == json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]


@pytest.mark.parametrize(
    ("base", "trained"), [("float32", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16"), ("bfloat16",) * 2]
)
def test_nothing_is_widened_and_unchanged_files_are_copied(tmp_path, base, trained):
    """ZeRO saves bf16 for any base."""
    base_folder = write_model(tmp_path / "base", [{"layer": torch.zeros(3, 5, dtype=getattr(torch, base))}], base)
    source = write_model(tmp_path / "source", [{"layer": torch.ones(3, 5, dtype=getattr(torch, trained))}])
    (source / "config.json").write_text(json.dumps({"dtype": trained}))
    publish(base_folder, source, tmp_path / "final")
    for name in ("model-0.safetensors", "config.json"):
        content = [(folder / name).read_bytes() for folder in (source, tmp_path / "final")]
        assert json.loads(content[0]) == json.loads(content[1]) if name == "config.json" else content[0] == content[1]


@pytest.fixture(scope="module")
def fine_tuned(shared_workplace, bf16_model_folder, few_rows):
    """That model, fully fine-tuned on one process: fp32 weights under bf16 autocast."""
    overrides = (
        "model.from_scratch=false",
        "model.architecture={}",
        f"model.name_or_path={bf16_model_folder}",
        "precision=bf16",
    )
    return shared_workplace.trained_once("fine-tuned", *SHORT, *overrides, f"data.train={few_rows}")


def held_out_loss(model, run):
    """Mean loss of the supervised tokens of the run's validation rows, in fp32 arithmetic."""
    rows = load_from_disk(json.loads((run / "prepared.json").read_text())["folder"] + "/validation")
    total = tokens = 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        positions = torch.cat([torch.arange(length) for length in row.get("seq_lengths", [ids.shape[1]])])[None]
        with torch.no_grad():
            logits = model(input_ids=ids, position_ids=positions).logits.float()
        total += float(
            torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=IGNORED, reduction="sum")
        )
        tokens += int((labels[0, 1:] != IGNORED).sum())
    return total / tokens


def test_final_has_dtype_of_base_and_checkpoints_stay_fp32(fine_tuned):
    best = f"best-{manifest(fine_tuned)['best_step']}"
    final = load_file(fine_tuned / "final" / "model.safetensors")
    trained = load_file(fine_tuned / best / "model.safetensors")
    assert final.keys() == trained.keys()
    assert all(torch.equal(final[name], trained[name].bfloat16()) for name in final)
    for kept in (best, "last", "checkpoint-8"):
        dtypes = {tensor.dtype for tensor in load_file(fine_tuned / kept / "model.safetensors").values()}
        assert dtypes == {torch.float32}, kept
    configs = {name: json.loads((fine_tuned / name / "config.json").read_text()) for name in ("final", best)}
    assert (configs["final"]["dtype"], configs[best]["dtype"]) == ("bfloat16", "float32")
    assert (
        checkpoint_format.verify_checksums(
            fine_tuned / "final", checkpoint_format.read_commit_marker(fine_tuned / "final")
        )
        is None
    )


def test_final_has_held_out_loss_of_the_fp32_model(fine_tuned):
    def loss(name):
        return held_out_loss(AutoModelForCausalLM.from_pretrained(fine_tuned / name, dtype=torch.float32), fine_tuned)

    trained = loss(f"best-{manifest(fine_tuned)['best_step']}")
    assert loss("final") == pytest.approx(trained, rel=1e-3)
    assert trained == pytest.approx(manifest(fine_tuned)["best_eval_loss"], rel=0.02), "measured on the same rows"


def test_generate_loads_final_in_its_dtype(fine_tuned, capsys):
    plan_dtype = generate.load_final_model(*plan_of(fine_tuned)).dtype
    assert plan_dtype == torch.bfloat16
    assert generate.main(RunDir(fine_tuned), ["How much is 1 and 1?"]) == 0
    assert capsys.readouterr().out.endswith("\n")


def plan_of(run):
    from sft_recipes.planner import plan as plans

    return plans.read(run / "plan.json"), RunDir(run)


SMALL_MODEL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
    "num_key_value_heads": 1, "vocab_size": 128, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": None,
}  # fmt: skip
EXPERTS = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
FAMILIES = {
    "llama": {}, "mistral": {}, "qwen2": {}, "qwen3": {}, "olmo2": {}, "phi3": {}, "smollm3": {}, "granite": {},
    "gemma2": {"query_pre_attn_scalar": 16}, "gemma3_text": {}, "cohere": {}, "glm4": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2}, "mixtral": EXPERTS, "qwen3_moe": EXPERTS, "gpt_oss": EXPERTS,
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changed", [set(), {"vocab_size"}], ids=["same vocabulary", "new tokens"])
def test_config_of_final_is_the_bases_but_for_what_training_changed(tmp_path, family, changed):
    """The base is as Transformers 4 wrote it, in bf16; the trained model is as this version saves it, in fp32."""
    config = AutoConfig.for_model(family, **SMALL_MODEL, **FAMILIES[family])
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    own = json.loads((tmp_path / "base" / "config.json").read_text())
    own = {**own, "torch_dtype": own.pop("dtype"), "transformers_version": "4.51.0", "a_key_of_the_base": [1]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(own))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model.config.use_cache, model.config.pad_token_id = False, 3  # as TRL and the Trainer set them
    if "num_experts_per_tok" in FAMILIES[family]:
        model.config.output_router_logits = True
    if changed:
        model.resize_token_embeddings(192)
    model.save_pretrained(tmp_path / "trained")
    publish(tmp_path / "base", tmp_path / "trained", tmp_path / "final")
    final = json.loads((tmp_path / "final" / "config.json").read_text())
    assert {key for key in own.keys() | final.keys() if own.get(key, "none") != final.get(key, "none")} == changed
    loaded, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not loading["missing_keys"] and loaded.dtype == torch.bfloat16
    assert loaded.get_input_embeddings().num_embeddings == (192 if changed else 128)
