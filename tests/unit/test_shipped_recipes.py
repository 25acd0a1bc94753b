"""Shipped recipes are short, pinned, within their size class and hardware, and resolve to the committed plans.

Run as a program, this file regenerates `tests/helpers/golden/` and the tables of README.md. The diff then shows what a
change of `sizes.yaml` affects.
"""

import json
import re

import pytest
import torch
import yaml
from helpers.recipes import GOLDEN, SHIPPED
from helpers.workplace import REPOSITORY, Workplace

from sft_recipes.config import loader
from sft_recipes.config.architecture import parameter_count
from sft_recipes.config.strategies import STRATEGIES
from sft_recipes.launch.topology import plan_topology
from sft_recipes.planner import cost, render
from sft_recipes.planner import plan as plans

NAMES = SHIPPED
LARGE = [name for name in NAMES if name != "tiny"]
UNSTABLE_KEYS = {"created", "origins", "allowed_changes"}


def plan_of(name):
    recipe = loader.load(name)
    return plans.resolve(recipe, plan_topology(recipe))


def resolved(name):
    content = json.loads(plans.to_json(plan_of(name)))
    return {key: value for key, value in content.items() if key not in UNSTABLE_KEYS}


@pytest.mark.parametrize("name", NAMES)
def test_plans_equal_golden_files(name, monkeypatch):
    """`python tests/unit/test_shipped_recipes.py` regenerates them."""
    monkeypatch.delenv("GPU_HOUR_PRICE", raising=False)
    assert resolved(name) == json.loads((GOLDEN / f"{name}.json").read_text())


def test_golden_files_belong_to_recipes():
    assert sorted(path.stem for path in GOLDEN.glob("*.json")) == sorted(NAMES)


@pytest.mark.parametrize("name", LARGE)
def test_recipes_are_short(name):
    lines = (REPOSITORY / "recipes" / f"{name}.yaml").read_text().splitlines()
    assert 20 <= len(lines) <= 40
    assert re.search(r"#     make (train|plan) RECIPE=" + name, lines[1]), "the first lines state the command"


@pytest.mark.parametrize("name", LARGE)
def test_recipe_comment_states_its_size_class(name):
    plan = plan_of(name)
    match = re.search(
        r"size: \S+ +# learning rate (\S+), batch (\d+), (\d+) epoch",
        (REPOSITORY / "recipes" / f"{name}.yaml").read_text(),
    )
    stated = (float(match[1]), int(match[2]), float(match[3]))
    assert stated == (plan.learning_rate, plan.effective_batch_size, plan.num_train_epochs)


@pytest.mark.parametrize("name", LARGE)
def test_recipes_pin_revisions_and_name_licenses(name):
    recipe = loader.load(name)
    assert re.fullmatch("[0-9a-f]{40}", recipe.model.revision) and re.fullmatch("[0-9a-f]{40}", recipe.data.revision)
    assert recipe.model.license
    assert bool(recipe.model.open_alternative) == recipe.model.name_or_path.startswith("meta-llama/"), (
        "Llama alone is gated"
    )


@pytest.mark.parametrize("name", LARGE)
def test_open_alternative_works_by_one_override(name):
    recipe = loader.load(name)
    if recipe.model.open_alternative:
        other = loader.load(name, [f"model.name_or_path={recipe.model.open_alternative}"])
        plan = plans.resolve(other, plan_topology(other))
        assert plan.learning_rate == plan_of(name).learning_rate
        assert plan.memory_bytes_per_gpu is None, "forecast of the replaced model"


@pytest.mark.parametrize("name", LARGE)
def test_recipes_fit_with_under_5_percent_overhead(name):
    plan = plan_of(name)
    # A mixture of experts has the steps of its active weights, and the saves of all of them.
    assert plan.fits and plan.forecast["overhead_share"] < (0.15 if name == "30b-a3b" else 0.05)
    assert (plan.parallelism == "fsdp2") is (name == "30b-a3b"), "fsdp2 has not run on a GPU yet"
    assert plan.optimizer_steps >= plan.sections.batch.min_optimizer_steps


@pytest.mark.parametrize("name", LARGE)
def test_parameter_counts_equal_real_models(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture = loader.load(name).model.architecture
    config = AutoConfig.for_model(**architecture)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert parameter_count(architecture) == model.num_parameters()


PUBLISHED = {
    "1b": 1.72,
    "3b": 4.02,
    "7b": 7.61,
    "8b": 8.03,
    "13b": 14.8,
    "30b-a3b": 30.5,
    "32b": 32.8,
    "70b": 70.6,
}  # model cards


@pytest.mark.parametrize(("name", "billions"), PUBLISHED.items())
def test_recipe_parameters_equal_model_cards(name, billions):
    assert plan_of(name).parameters / 1e9 == pytest.approx(billions, rel=0.005)


def test_flops_count_active_experts_only():
    """The model card of Qwen3-30B-A3B: 3.3 billion of its 30.5 billion parameters are active."""
    plan = plan_of("30b-a3b")
    load = plans.memory_inputs(plan, plan.sections.model.architecture)
    active = sum(layer.active for layer in load.decoder) + 2 * load.ends
    assert active == pytest.approx(3.3e9, rel=0.02) and load.parameters == pytest.approx(30.5e9, rel=0.005)
    forward = cost.flops_per_token(load, mean_length=1).forward
    assert forward == pytest.approx(2 * (active - load.ends), rel=0.01), "embeddings are looked up"


def test_plan_names_what_its_forecast_assumes():
    shown = render.format_plan(plan_of("30b-a3b"))
    assert "from a trace of the layers on fake tensors, assuming varlen attention, grouped experts" in shown
    assert "trace" not in render.format_plan(plan_of("8b")), "closed form"


def printed(*arguments):
    done = Workplace(REPOSITORY).sft(*arguments)
    return "".join(f"    {line.rstrip()}\n" for line in done.stdout.splitlines())


TABLES = {  # page: command whose output is between the markers
    "README.md": ("recipes",),
    "docs/recipes.md": ("plan", "8b", "--gpus", "1,2,4,8,16", "--gpu-type", "a100-80g"),
}
BEGIN, END = "tests/unit/test_shipped_recipes.py writes this -->\n", "\n<!-- end of the"


@pytest.mark.skipif(loader.names() != SHIPPED, reason="recipes/ has a recipe without a golden plan")
@pytest.mark.parametrize(("page", "arguments"), TABLES.items(), ids=["recipes", "comparison"])
def test_tables_of_pages_equal_output(page, arguments):
    assert f"{BEGIN}\n{printed(*arguments)}{END}" in (REPOSITORY / page).read_text(), f"run python {__file__}"


def test_docs_list_the_models_of_recipes():
    text = (REPOSITORY / "docs" / "models.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    for name in LARGE:
        model = loader.load(name).model
        (row,) = [row for row in rows if name in row.split("|")[1].replace(" ", "").split(",")]
        assert model.name_or_path in row and model.revision[:8] in row
        assert (model.open_alternative or "it is") in row


def test_strategy_table_equals_measurements():
    import sys

    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    from engines import table

    results = json.loads((REPOSITORY / "benchmarks" / "results" / "engines-2-cores.json").read_text())
    assert len(results["rows"]) == 20
    assert table(results["rows"]) in (REPOSITORY / "docs" / "strategies.md").read_text()


def test_loading_table_equals_measurements():
    results = json.loads((REPOSITORY / "benchmarks" / "results" / "loading-2-cores.json").read_text())
    text = (REPOSITORY / "docs" / "strategies.md").read_text()
    for row in results["rows"]:
        peaks = ", ".join(f"{rank['peak_anonymous_bytes'] / results['model_bytes']:.2f}" for rank in row["ranks"])
        assert f"| `{row['engine']}` | {len(row['ranks'])} | {peaks} |" in text
        if row["engine"] == "zero3":
            assert max(rank["peak_anonymous_bytes"] for rank in row["ranks"]) < results["model_bytes"]


def test_strategy_files_support_several_nodes_and_full_models():
    for stage in ("zero1", "zero2", "zero3", "zero3_offload"):
        launch = yaml.safe_load((REPOSITORY / "accelerate_configs" / f"{stage}.yaml").read_text())["deepspeed_config"]
        assert launch["deepspeed_multinode_launcher"] == "standard"
        zero = json.loads((REPOSITORY / "deepspeed_configs" / f"{stage}.json").read_text())["zero_optimization"]
        assert zero.get("stage3_gather_16bit_weights_on_model_save", stage in ("zero1", "zero2"))
        assert launch["zero3_init_flag"] is stage.startswith("zero3")


def test_strategies_have_their_files():
    from sft_recipes.launch.command import accelerate_config_name

    expected = {*STRATEGIES, "cpu"}
    assert {path.stem for path in (REPOSITORY / "accelerate_configs").glob("*.yaml")} == expected
    plan = plans.resolve(loader.load("tiny"), plans.Topology(gpus=0, processes=2))
    assert accelerate_config_name(plan) == "cpu"


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, command in TABLES.items():
        page = REPOSITORY / name
        head, _, rest = page.read_text().partition(BEGIN)
        page.write_text(f"{head}{BEGIN}\n{printed(*command)}{END}{rest.partition(END)[2]}")
    for recipe_name in loader.names():  # a new recipe becomes a shipped one
        (GOLDEN / f"{recipe_name}.json").write_text(json.dumps(resolved(recipe_name), indent=2) + "\n")
