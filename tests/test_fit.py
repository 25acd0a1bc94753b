"""What a size needs: the fewest GPUs, the cheapest change that fits, time and money."""

import dataclasses
import json
import re

import pytest
from conftest import REPOSITORY

from sft_recipes.planning import cost, environment, fit, recipes
from sft_recipes.planning import plan as plans
from sft_recipes.planning.plan import Topology
from sft_recipes.planning.schema import RecipeError

pytestmark = pytest.mark.usefixtures("no_gpu_mask")


def plan(name, gpus, card="h100-80g", *overrides):
    return plans.make(recipes.load(name, overrides), fit.on(gpus, card))


@pytest.mark.parametrize(
    ("name", "card", "fewest"),
    [
        ("1b", "l40s-48g", 1),
        ("8b", "h100-80g", 4),
        ("70b", "h100-80g", 32),
        ("70b", "h200-141g", 16),
        ("70b", "24", None),
    ],
)
def test_the_fewest_gpus_are_those_below_which_nothing_fits(name, card, fewest):
    recipe = recipes.load(name)
    assert fit.smallest_gpu_count(recipe, card) == fewest
    if fewest:
        counts = (1, 2, 4, 8, 16, 32)  # all of which keep a batch of 32 or 64
        assert [gpus for gpus in counts if plan(name, gpus, card).fits] == [gpus for gpus in counts if gpus >= fewest]


@pytest.mark.parametrize(
    ("name", "gpus", "card", "overrides", "change"),
    [
        ("8b", 8, "h100-80g", ["trainer.gradient_checkpointing=false", "trainer.max_length=4096"], "trainer.gradient_checkpointing=true"),
        ("8b", 8, "a100-40g", ["trainer.max_length=4096"], "batch.per_device_at_most=2"),
        ("8b", 8, "rtx4090-24g", [], "parallelism=zero3"),
        ("70b", 8, "h100-80g", [], "GPUS=32"),
        ("8b", 1, "h100-80g", [], "GPUS=4"),
        ("8b-lora", 1, "12", [], "lora.quantize=nf4 parallelism=ddp"),
    ],
)  # fmt: skip
def test_the_cheapest_change_is_named_and_does_fit(name, gpus, card, overrides, change):
    recipe, topology = recipes.load(name, overrides), fit.on(gpus, card)
    assert plans.make(recipe, topology).fits is False
    said = fit.cheapest_change(recipe, topology)
    assert said.startswith(change)
    words = dict(word.split("=") for word in said.split())
    more = int(words.pop("GPUS", gpus))
    assert plan(name, more, card, *overrides, *(f"{key}={value}" for key, value in words.items())).fits is True


def test_where_nothing_helps_nothing_is_named():
    assert fit.cheapest_change(recipes.load("70b"), fit.on(8, "2")) is None


def test_flops_are_six_a_weight_and_half_of_the_attention():
    llama = recipes.load("8b").model.architecture
    multiplied = 8_030_261_248 - 128256 * 4096  # the embedding is looked up
    assert cost.flops_per_token(llama, 2048, frozen=False) == 6 * multiplied + 6 * 32 * 4096 * 2048
    assert cost.flops_per_token(llama, 2048, frozen=True) == 4 * multiplied + 6 * 32 * 4096 * 2048
    assert cost.flops_per_token({}, 2048, frozen=False) is None


def test_time_and_money_follow_from_the_stated_mfu(monkeypatch):
    monkeypatch.setenv("GPU_HOUR_PRICE", "2.50")
    forecast = plan("8b", 8).forecast
    per_second = 0.35 * 989e12 / cost.flops_per_token(recipes.load("8b").model.architecture, 1374, False)
    assert forecast["tokens_per_second_per_gpu"] == pytest.approx(per_second, rel=1e-3)
    tokens = 13_074 * 32 * 2048
    assert forecast["training_seconds"] == pytest.approx(tokens / per_second / 8, rel=1e-3)
    assert forecast["money"] == pytest.approx(forecast["gpu_hours"] * 2.5, abs=0.02)
    parts = ("training_seconds", "evaluation_seconds", "saving_seconds")
    assert forecast["seconds"] == pytest.approx(sum(forecast[part] for part in parts), abs=0.2)
    half = plans.make(recipes.load("8b", ["hardware.mfu=0.175"]), fit.on(8, "h100-80g")).forecast
    assert half["training_seconds"] == pytest.approx(2 * forecast["training_seconds"], rel=1e-3)


def test_a_price_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("GPU_HOUR_PRICE", "cheap")
    with pytest.raises(RecipeError, match="GPU_HOUR_PRICE: 'cheap' is not a price"):
        plan("8b", 8)


def test_without_a_card_that_is_known_there_is_no_forecast():
    assert plan("8b", 8, "48").forecast is None and plan("8b", 8, "48").fits is True
    assert plans.make(recipes.load("tiny"), Topology(gpus=0, processes=1)).forecast is None


def test_the_comparison_keeps_the_batch_on_every_count(workplace):
    done = workplace.sft("plan", "8b", "--gpus", "1,2,3,4,8,16", "--card", "h100-80g")
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in lines[1:6]] == ["1", "2", "4", "8", "16"]
    assert lines[6].startswith("3 GPUs: effective_batch_size 32 cannot be shared evenly by 3")
    listed = json.loads(workplace.sft("plan", "8b", "--gpus", "1,2,3,4,8,16", "--json").stdout)
    batches = [
        one["world_size"] * one["per_device_train_batch_size"] * one["gradient_accumulation_steps"]
        for one in listed
        if "refused" not in one
    ]
    assert batches == [32] * 5


def test_a_plan_that_does_not_fit_says_so_and_what_would(workplace):
    done = workplace.sft("plan", "70b", "--gpus", "8")
    assert done.returncode == 0
    found = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert found["fits"].strip() == "no (h100-80g)"
    assert found["fewest GPUs"].strip() == "32 x h100-80g" and found["cheapest change"].strip().startswith("GPUS=32")
    listed = json.loads(workplace.sft("plan", "70b", "--gpus", "8", "--json").stdout)
    assert (listed["fits"], listed["fewest_gpus"], listed["cheapest_change"]) == (False, 32, "GPUS=32")


def machine_with(workplace, *gpus):
    """The PATH of a machine with these GPUs, played by an nvidia-smi that lists them; nothing gets so far as to use one."""
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


def test_train_refuses_what_does_not_fit_the_gpus_that_are_here(workplace):
    path = machine_with(workplace, *[(81559, "NVIDIA H100 80GB HBM3")] * 8)
    done = workplace.sft("train", "70b", "--gpus", "8", PATH=path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "needs about 164 GiB a GPU and h100-80g holds less; the cheapest change that fits:" in done.stderr
    assert "GPUS=32" not in done.stderr, "more than are here"
    assert not workplace.runs.exists()
    path = machine_with(workplace, (24564, "NVIDIA GeForce RTX 4090"))
    done = workplace.sft("train", "3b", "--gpus", "1", PATH=path)
    assert done.returncode == 2 and "rtx4090-24g holds less" in done.stderr, "the recipe's own card is a larger one"


@pytest.mark.parametrize(
    ("gpus", "card"),
    [
        ([(81559, "NVIDIA H100 80GB HBM3")], "h100-80g"),
        ([(143771, "NVIDIA H200")], "h200-141g"),
        ([(40960, "NVIDIA A100-SXM4-40GB")], "a100-40g"),
        ([(81920, "NVIDIA A100-SXM4-80GB"), (40960, "NVIDIA A100-SXM4-40GB")], "a100-40g"),
        ([(46068, "NVIDIA L40S")], "l40s-48g"),
        ([(24564, "NVIDIA GeForce RTX 4090")], "rtx4090-24g"),
        ([(24576, "NVIDIA GeForce RTX 3090")], "24.0"),
        ([(16303, "NVIDIA Graphics, Device")], "15.9"),
    ],
)
def test_the_card_is_what_the_machine_has(workplace, monkeypatch, gpus, card):
    from sft_recipes.launching import topology

    monkeypatch.setenv("PATH", machine_with(workplace, *gpus))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    here = topology.visible_gpus()
    assert len(here) == len(gpus) and topology.card_of(here) == card
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert [gpu.id for gpu in topology.visible_gpus()] == ["0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert topology.visible_gpus() == [] and topology.card_of([]) is None


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ((), "no bf16; say precision=fp32"),
        (("precision=fp32", "model.attention=flash_attention_2"), "no flash_attention_2; say model.attention=sdpa"),
        (("model.attention=flash_attention_2",), "no bf16 and no flash_attention_2; say precision=fp32 model.attention=sdpa"),
    ],
)  # fmt: skip
def test_a_gpu_older_than_ampere_is_refused_what_it_does_not_have(workplace, said, wanted):
    path = machine_with(workplace, (32768, "Tesla V100-SXM2-32GB", "7.0"))
    done = workplace.sft("train", "1b", "--gpus", "1", *said, PATH=path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"Tesla V100-SXM2-32GB (compute capability 7.0) is older than Ampere and has {wanted}" in done.stderr
    assert not workplace.runs.exists()


def test_a_gpu_as_old_as_that_may_train_in_fp32(workplace):
    path = machine_with(workplace, (81559, "Tesla of much memory", "7.5"))
    done = workplace.sft("train", "1b", "--gpus", "1", "precision=fp32", "--dry-run", PATH=path)
    assert done.returncode == 0, done.stderr


def test_offloading_without_the_memory_for_it_is_refused(workplace):
    done = workplace.sft("train", "70b", "--gpus", "0", "parallelism=zero3_offload")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "on the CPU 70b needs about" in done.stderr and "of memory and this machine has" in done.stderr


def test_the_two_cheapest_changes_that_take_less_are_named():
    found = fit.lighter(recipes.load("8b"), fit.on(8, "h100-80g"))
    assert len(found) == 2
    needs = [plan("8b", 8, "h100-80g", *change.split()).memory_bytes_per_gpu["total"] for change in ("", *found)]
    assert needs[1] <= 0.9 * needs[0] and needs[2] <= 0.9 * needs[0]
    unknown = recipes.load("tiny", ["model.architecture={model_type: gpt2, vocab_size: 1024}"])
    always = ["batch.per_device_at_most=1", "trainer.gradient_checkpointing=true"]
    assert fit.lighter(unknown, Topology(0, 1)) == always, "nothing is forecast"


def test_what_is_offloaded_must_fit_the_nodes_own_memory(workplace):
    path = machine_with(workplace, *[(81559, "NVIDIA H100 80GB HBM3")] * 8)
    done = workplace.sft(
        "train", "70b", "--gpus", "8", "parallelism=zero3_offload", "batch.per_device_at_most=1", PATH=path
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "zero3_offload needs about" in done.stderr and "of this node's own memory" in done.stderr


@pytest.mark.parametrize("engine", ["zero3", "zero3_offload", "fsdp2"])
def test_4_bit_weights_are_refused_where_they_would_not_be_shared_out(engine):
    with pytest.raises(RecipeError, match=f"{engine} does not shard 4-bit weights .*say parallelism=ddp or zero2"):
        plan("8b-qlora", 8, "h100-80g", f"parallelism={engine}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpus", "1,2", "--nodes", "2"), "NODES: says nothing where GPUS=1,2 compares several"),
        (("--gpus", "0", "--card", "24"), "CARD: 24 was asked for without GPUs"),
        (("lora.target_modules=[foo]", "size=lora-7-13b", "lora.r=8"), r"lora.target_modules is \['foo'\]; wanted all-linear"),
        (("lora.target_modules=qproj", "size=lora-7-13b"), "lora.target_modules is 'qproj'; wanted all-linear"),
        (("trainer.eval_steps=1.5",), "trainer.eval_steps is 1.5; wanted a whole number of steps"),
        (("trainer.num_train_epochs=-1",), "trainer.num_train_epochs is -1"),
        (("trainer.warmup_ratio=5", "outside_range=[warmup_ratio]"), "trainer.warmup_ratio is 5.0; wanted 0 to 1"),
        (("trainer.gradient_accumulation_steps=3",), r"is the plan's to set \(derived from batch.effective_batch_size"),
        (("trainer.per_device_train_batch_size=3",), "is the plan's to set; say batch.per_device_at_most instead"),
        (("--gpus", "3"), "effective_batch_size 32 cannot be shared evenly by 3 GPUs .*these counts can: 1, 2, 4"),
        (("model.architecture={num_key_value_heads: x}",), "num_key_value_heads is 'x'; wanted a whole number"),
        (("model.architecture={head_dim: 1.5}",), "head_dim is 1.5; wanted a whole number"),
        (("model.architecture={tie_word_embeddings: 'false'}",), "tie_word_embeddings is 'false'; wanted true or false"),
        (("model.architecture={hidden_size: 16, num_attention_heads: 32}",), "hidden_size 16 is no multiple of"),
    ],
)  # fmt: skip
def test_what_makes_no_plan_is_refused_in_one_line(workplace, words, message):
    done = workplace.sft("plan", "8b", *words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert re.search(message, done.stderr), done.stderr


def test_more_than_eight_gpus_are_several_nodes():
    from sft_recipes.launching.topology import planned

    nodes = {gpus: planned(recipes.load("70b"), gpus, None, None, None).nodes for gpus in (8, 16, 32, 64)}
    assert nodes == {8: 1, 16: 2, 32: 4, 64: 8}


def test_a_model_whose_size_the_recipe_does_not_say_is_weighed_once_it_is_here():
    recipe = recipes.load("8b", ["model.name_or_path=some/model", "data.train=rows.jsonl"])
    unknown = plans.make(recipe, fit.on(1, "h100-80g"))
    assert unknown.fits is None
    architecture = recipes.load("8b").model.architecture
    found = plans.Prepared("f", "x", "m", architecture, 9000, 9000, 9000, 90000, 10)
    with pytest.raises(RecipeError, match="some/model needs about .* GiB a GPU and h100-80g holds less"):
        plans.settle(unknown, found)
    fitting = plans.settle(plans.make(recipe, fit.on(8, "h100-80g")), found)
    assert fitting.fits is True and fitting.parameters == 8_030_261_248


def test_a_size_between_two_rows_takes_the_nearest_and_the_plan_says_so(workplace):
    words = ("plan", "7b", "size=20b", "model.architecture={}", "--gpus", "8")
    done = workplace.sft(*words, "--json")
    found = json.loads(done.stdout)
    assert (found["size"], found["size_asked"], found["learning_rate"]) == ("30-70b", "20b", 2e-5)
    assert found["effective_batch_size"] == 64
    assert "7b (row 30-70b, the nearest to 20b)" in workplace.sft(*words).stdout
    assert plan("7b", 8, "h100-80g", "size=18b").size == "7-13b"


def test_a_recipe_whose_architecture_belongs_to_another_row_is_refused():
    recipe = recipes.load("8b")
    for size, row in (("1-3b", "1-3b"), ("70b", "30-70b"), ("tiny", "tiny")):
        with pytest.raises(RecipeError, match=f"size is {size}, row {row}, but model.architecture has 8.0 billion"):
            recipes.row_of(dataclasses.replace(recipe, size=size))


@pytest.mark.parametrize("content", ['{"zero_optimization": {"stage": 2}}', "{", "{}"])
def test_an_engine_whose_files_disagree_is_refused(tmp_path, monkeypatch, content):
    from sft_recipes.launching import command

    (tmp_path / "accelerate_configs").mkdir()
    (tmp_path / "deepspeed_configs").mkdir()
    zero3 = plan("70b", 32)
    monkeypatch.setattr(command, "REPOSITORY", tmp_path)
    with pytest.raises(RecipeError, match="needs accelerate_configs/zero3.yaml, which is not there"):
        command.engine(zero3)
    text = (REPOSITORY / "accelerate_configs" / "zero3.yaml").read_text()
    (tmp_path / "accelerate_configs" / "zero3.yaml").write_text(text)
    with pytest.raises(RecipeError, match="zero3 needs deepspeed_configs/zero3.json, which is not there"):
        command.engine(zero3)
    (tmp_path / "deepspeed_configs" / "zero3.json").write_text(content)
    wanted = (
        "says stage 2, but the plan has parallelism zero3" if "stage" in content else "not a DeepSpeed configuration"
    )
    with pytest.raises(RecipeError, match=wanted):
        command.engine(zero3)


def test_the_memory_is_the_machines_unless_its_container_may_take_less(tmp_path, monkeypatch):
    """No file, as on bare machines; `max`, as in containers without a limit; a limit."""
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(environment, "_MEMORY_LIMITS", (limit,))
    machine = environment.host_memory_bytes()
    assert machine > 2**28
    limit.write_text("max\n")
    assert environment.host_memory_bytes() == machine
    limit.write_text(f"{2**28}\n")
    assert environment.host_memory_bytes() == 2**28
