import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_recipes.planner import batch
from sft_recipes.runtime.errors import UserError


@pytest.mark.parametrize(
    ("per_device", "accumulation", "gpus"), [(2, 16, 1), (4, 8, 1), (4, 4, 4), (8, 2, 8)], ids=lambda value: str(value)
)
def test_batch_of_the_four_configurations_of_the_sft_guide(per_device, accumulation, gpus):
    effective = per_device * accumulation * gpus
    assert effective == {1: 32, 4: 64, 8: 128}[gpus]
    assert batch.per_device_batch_size(effective, per_device, gpus) == per_device


def test_batch_refuses_gpu_count_and_names_those_that_fit():
    with pytest.raises(
        UserError, match="found 32, expected a multiple of 3 .* Set GPUS .* to one of 1, 2, 4, 8, 16, 32"
    ):
        batch.per_device_batch_size(32, 4, 3)


@given(effective=st.integers(1, 512), at_most=st.integers(1, 64), world_size=st.integers(1, 64))
def test_batch_is_kept_exactly_or_refused(effective, at_most, world_size):
    try:
        per_device = batch.per_device_batch_size(effective, at_most, world_size)
    except UserError:
        assert effective % world_size
        return
    assert effective % (per_device * world_size) == 0
    assert 1 <= per_device <= at_most
    larger = range(per_device + 1, min(at_most, effective) + 1)
    assert not any(effective % (size * world_size) == 0 for size in larger)


@given(effective=st.integers(1, 256))
def test_suggested_world_sizes_keep_the_batch(effective):
    counts = batch.world_sizes_that_divide(effective)
    assert counts[0] == 1 and counts[-1] == effective
    assert all(batch.per_device_batch_size(effective, 8, count) for count in counts)


def test_packed_rows_are_full():
    assert batch.packed_rows(7473, mean_tokens=168, max_length=2048) == 614
    assert batch.packed_rows(10, mean_tokens=5000, max_length=2048) == 10


def test_warmup_steps_round_up_like_transformers():
    assert batch.warmup_steps(100, 0.05) == 5
    assert batch.warmup_steps(101, 0.05) == 6
    assert batch.warmup_steps(100, 0.0) == 0


def test_max_steps_overrides_epochs():
    assert batch.optimizer_steps(10, 3.0) == 30
    assert batch.optimizer_steps(10, 2.5) == 25
    assert batch.optimizer_steps(10, 3.0, max_steps=7) == 7
