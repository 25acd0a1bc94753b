import pytest

from sft_recipes.planning import memory
from sft_recipes.planning.schema import RecipeError

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
def test_parameters_are_those_that_the_models_cards_state(architecture, published):
    assert memory.parameter_count(architecture) == published


def test_an_architecture_without_its_numbers_has_no_forecast():
    assert memory.parameter_count({"model_type": "llama"}) is None
    assert memory.bytes_per_gpu({}, "ddp", "bf16", 8, 2048, True) is None


@pytest.mark.parametrize(("engine", "a_parameter"), [("single", 16), ("zero1", 18), ("zero2", 18), ("zero3", 18)])
def test_mixed_precision_adamw_holds_16_to_18_bytes_a_parameter_over_all_gpus(engine, a_parameter):
    parts = memory.bytes_per_gpu(LLAMA_8B, engine, "bf16", 1, 2048, True)
    held = parts["weights"] + parts["gradients"] + parts["optimizer"]
    assert held == a_parameter * 8_030_261_248


def test_each_zero_stage_shards_what_it_names():
    one, eight = (memory.bytes_per_gpu(LLAMA_8B, "zero2", "bf16", world, 2048, True) for world in (1, 8))
    assert eight["weights"] == one["weights"]
    assert eight["gradients"] == one["gradients"] // 8
    assert eight["optimizer"] == one["optimizer"] // 8
    assert memory.bytes_per_gpu(LLAMA_8B, "zero3", "bf16", 8, 2048, True)["weights"] == one["weights"] // 8


def test_the_total_is_the_sum_of_its_parts():
    parts = memory.bytes_per_gpu(LLAMA_8B, "ddp", "bf16", 2, 2048, False)
    assert parts.pop("total") == sum(parts.values())


def test_a_card_is_a_name_or_a_number_of_gib():
    assert memory.card_bytes("h100-80g") == memory.card_bytes("80") == 80 * 2**30
    assert memory.card_bytes(None) is None
    with pytest.raises(RecipeError, match="did you mean h100-80g"):
        memory.card_bytes("h100-80gb")
