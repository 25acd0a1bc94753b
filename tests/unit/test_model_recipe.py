"""MODEL: the files of a model give size class, precision and length, the plan the rest; `recipe` writes them to edit."""

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sft_recipes import cli
from sft_recipes.config import loader, model_recipe
from sft_recipes.config.architecture import DENSE_KINDS, parameter_count
from sft_recipes.config.sizes import RECIPES
from sft_recipes.data import model_files
from sft_recipes.runtime.errors import UserError

QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 151936, "tie_word_embeddings": False, "max_position_embeddings": 40960, "dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    """Function that writes a model's folder: its configuration, and the header of weights that are not there."""

    def write(name="qwen", parameters=8_190_735_360, **config):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(QWEN3_8B | config))
        header = json.dumps({"w": {"dtype": "BF16", "shape": [parameters], "data_offsets": [0, 2 * parameters]}})
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode())
        return str(folder)

    return write


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "my.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' * 50)
    return f"data.train={path}"


def plan_of(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_model_alone_is_planned_in_one_command(in_process, model, rows):
    plan = plan_of(in_process("plan", "--model", model(), rows, "--gpus", "8", "--gpu-type", "h100-80g", "--json"))
    assert (plan["recipe"], plan["size"], plan["method"], plan["precision"]) == ("qwen", "7-13b", "full", "bf16")
    assert (plan["learning_rate"], plan["effective_batch_size"], plan["max_length"]) == (2e-5, 32, 2048)
    assert plan["parameters"] == 8_190_735_360 and plan["fits"] is True
    assert (plan["parallelism"], plan["sections"]["trainer"]["gradient_checkpointing"]) == ("zero2", False)


@pytest.mark.parametrize(
    ("billions", "method", "size"),
    [
        (0.05, "full", "1-3b"),
        (1.7, "full", "1-3b"),
        (8, "full", "7-13b"),
        (14, "full", "7-13b"),
        (32, "full", "30-70b"),
        (235, "full", "30-70b"),
        (4, "lora", "lora-1-3b"),
        (8, "qlora", "lora-7-13b"),
    ],
)
def test_parameters_give_the_size_class(billions, method, size):
    settings = model_recipe.settings("m", int(billions * 1e9), 8192, {}, method, 1)
    assert (settings["size"], settings.get("lora.quantize")) == (size, "nf4" if method == "qlora" else None)


def test_context_shorter_than_the_default_limits_rows(in_process, model, rows):
    short = model(max_position_embeddings=512, parameters=1000, model_type="phi3")
    plan = plan_of(in_process("plan", "--model", short, rows, "--gpus", "0", "--json"))
    assert (plan["max_length"], plan["precision"], plan["packing"]) == (512, "fp32", False)


@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "qwen3",
        "smollm3",
        "granite",
        "gemma3_text",
        "phi3",
        "gpt2",
        "mixtral",
        "olmo2",
        "gpt_neox",
    ],
)
def test_parameters_are_counted_from_headers(tmp_path, kind):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 128, "pad_token_id": 0}
    sizes |= {"intermediate_size": 96, "num_key_value_heads": 2} if kind not in ("gpt2", "gpt_neox") else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    facts = model_files.describe_model(str(tmp_path))
    assert facts.parameters == model.num_parameters()
    assert facts.architecture["model_type"] == kind
    assert parameter_count(facts.architecture) == (facts.parameters if kind in DENSE_KINDS else None), "not traced"


def test_recipe_keeps_its_settings_for_another_model(in_process, model, rows):
    command = ("plan", "8b", "--model", model(), rows, "--json")
    plan = plan_of(in_process(*command))
    assert (plan["recipe"], plan["gpus"], plan["sections"]["trainer"]["save_steps"]) == ("8b", 8, 2000)
    assert plan["parameters"] == 8_190_735_360 and plan["model"].endswith("qwen")
    tiny = plan_of(in_process("plan", "tiny", "--model", model("small", 1000, model_type="phi3"), rows, "--json"))
    assert tiny["sections"]["model"]["from_scratch"] is False


def test_written_recipe_gives_the_same_plan(in_process, model, rows, monkeypatch, tmp_path):
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "sizes.yaml").write_text((RECIPES / "sizes.yaml").read_text())
    monkeypatch.setattr(cli, "RECIPES", recipes)
    monkeypatch.setattr(loader, "RECIPES", recipes)
    hardware = ("--gpus", "8", "--gpu-type", "h100-80g")
    command = ("recipe", "--model", model(), *hardware, rows, "--name", "mine")
    done = in_process(*command)
    assert done.returncode == 0, done.stderr
    assert "wrote recipes/mine.yaml: zero2, micro-batch 2, activation checkpointing off" in done.stdout
    again = in_process(*command)
    assert again.returncode == 2 and "nothing is overwritten" in again.stderr
    written = plan_of(in_process("plan", "mine", "--json"))
    direct = plan_of(in_process("plan", "--model", str(tmp_path / "qwen"), rows, *hardware, "--json"))
    same = {key for key in direct if key not in ("recipe", "origins", "created")}
    assert {key: written[key] for key in same} == {key: direct[key] for key in same}
    text = (recipes / "mine.yaml").read_text()
    assert "# parallelism: zero2 " in text and "# max_per_device_batch_size: 2 " in text
    (recipes / "mine.yaml").write_text(text.replace("# batch:", "batch:").replace("  # max_per", "  max_per"))
    pinned = plan_of(in_process("plan", "mine", "--gpus", "4", "--json"))
    assert pinned["sections"]["batch"]["max_per_device_batch_size"] == 2, "uncommenting a line pins it"


def test_commands_without_hardware_and_several_gpu_counts(in_process, model, rows):
    done = in_process("download", "--model", (folder := model()), rows)
    assert done.returncode == 0 and folder in done.stdout, done.stderr
    several = in_process("plan", "--model", folder, rows, "--gpus", "4,8", "--gpu-type", "h100-80g")
    assert [line.split()[:2] for line in several.stdout.splitlines()[1:]] == [["4", "zero2"], ["8", "zero2"]]


def test_recipe_without_data_names_the_default_dataset(in_process, model, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "RECIPES", tmp_path)
    done = in_process(
        "recipe", "--model", model(), "--gpus", "1", "--gpu-type", "24", "--name", "q", "--method", "qlora"
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "q.yaml").read_text()
    assert "train: HuggingFaceH4/ultrachat_200k:train_sft" in text and "quantize: nf4" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "MODEL"], "DATA: not set. Name the rows that"),
        (["--model", "DATA", "data.train=MODEL"], r"MODEL: found the file .*, expected a model folder or a Hub name\. Set DATA="),
        (["--model", "my.jsonl", "DATA"], r"MODEL: found the file my.jsonl, expected a model folder or a Hub name\. Set DATA="),
        (["--model", "MODEL", "DATA", "--method", "dora"], "argument --method: invalid choice: 'dora'"),
        (["8b", "--model", "MODEL", "DATA", "--method", "lora"], "METHOD: found lora, but RECIPE=8b has a method"),
        (["8b", "--method", "lora"], "METHOD: found lora, but RECIPE=8b has a method"),
        (["DATA"], "RECIPE: not set. Set RECIPE or MODEL"),
        (["--model", "MODEL", "DATA", "--gpus", "1", "--gpu-type", "h900"], "GPU_TYPE: unknown GPU type: found 'h900'"),
    ],
)  # fmt: skip
def test_wrong_model_is_one_line(in_process, model, rows, arguments, message):
    names = {"MODEL": (folder := model()), "DATA": rows, "data.train=MODEL": f"data.train={folder}"}
    done = in_process("plan", *(names.get(argument, argument) for argument in arguments))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.search(message, done.stderr), done.stderr


@pytest.mark.parametrize(
    ("config", "method", "message"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "full", "is not a decoder .causal language model.: found BertForMaskedLM"),
        ({"architectures": ["T5Model"], "is_encoder_decoder": True}, "full", "is not a decoder"),
        ({"quantization_config": {"quant_method": "gptq"}}, "full", r"has quantized weights \(gptq\), which METHOD=full"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_trained_are_rejected(in_process, model, rows, config, method, message):
    done = in_process("plan", "--model", model(**config), rows, "--method", method)
    assert done.returncode == 2 and re.search(message, done.stderr), done.stderr


def test_model_that_fits_nowhere_names_the_smallest_hardware(in_process, model, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "RECIPES", tmp_path)
    done = in_process("recipe", "--model", model(), "--gpus", "1", "--gpu-type", "24", "--name", "q")
    assert done.returncode == 2 and "Cheapest change that fits: GPUS=8" in done.stderr
    assert not (tmp_path / "q.yaml").exists()


def test_damaged_header_is_one_line(model):
    folder = model()
    (Path(folder) / "model.safetensors").write_bytes(b"\x20\x00\x00\x00\x00\x00\x00\x00{not json")
    with pytest.raises(UserError, match="header of its weights cannot be read"):
        model_files.describe_model(folder)


@pytest.mark.parametrize(
    ("model_name", "method", "name"),
    [
        ("Qwen/Qwen3-8B", "full", "qwen3-8b"),
        ("Qwen/Qwen3-8B", "qlora", "qwen3-8b-qlora"),
        ("runs/tiny-1/final", "full", "tiny-1"),
        ("/data/models/My Model/", "lora", "my-model-lora"),
        ("runs/tiny-1/best-150", "full", "tiny-1"),
    ],
)
def test_recipe_is_named_after_the_model(model_name, method, name):
    assert model_recipe.name_of(model_name, method) == name
