import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_recipes.planner import batch
from sft_recipes.runtime.errors import UserError


@pytest.mark.parametrize(
    ("per_device", "accumulation", "gpus"), [(2, 16, 1), (4, 8, 1), (4, 4, 4), (8, 2, 8)], ids=lambda value: str(value)
)
def test_the_documents_four_configurations_are_derived_from_their_effective_batch(per_device, accumulation, gpus):
    effective = per_device * accumulation * gpus
    assert effective == {1: 32, 4: 64, 8: 128}[gpus]
    assert batch.per_device_batch_size(effective, per_device, gpus) == per_device
    assert batch.gradient_accumulation_steps(effective, per_device, gpus) == accumulation


def test_a_gpu_count_that_cannot_keep_the_batch_is_refused_with_the_counts_that_can():
    with pytest.raises(UserError, match="these counts can: 1, 2, 4, 8, 16, 32"):
        batch.per_device_batch_size(32, 4, 3)


def test_a_micro_batch_that_divides_nothing_is_refused_with_the_counts_that_would_do():
    with pytest.raises(UserError, match="not a multiple of 4 per device x 3 GPUs = 12; 1, 2, 4, 8 GPUs would do"):
        batch.gradient_accumulation_steps(32, 4, 3)


@given(effective=st.integers(1, 512), at_most=st.integers(1, 64), world_size=st.integers(1, 64))
def test_the_effective_batch_is_kept_exactly_or_refused(effective, at_most, world_size):
    try:
        per_device = batch.per_device_batch_size(effective, at_most, world_size)
    except UserError:
        assert effective % world_size
        return
    accumulation = batch.gradient_accumulation_steps(effective, per_device, world_size)
    assert per_device * accumulation * world_size == effective
    assert 1 <= per_device <= at_most
    larger = range(per_device + 1, min(at_most, effective) + 1)
    assert not any(effective % (size * world_size) == 0 for size in larger)


@given(effective=st.integers(1, 256))
def test_every_count_that_is_offered_keeps_the_batch(effective):
    counts = batch.world_sizes_that_divide(effective)
    assert counts[0] == 1 and counts[-1] == effective
    assert all(batch.per_device_batch_size(effective, 8, count) for count in counts)


def test_grade_school_maths_at_batch_32_makes_19_steps_an_epoch_packed_and_233_not():
    rows = batch.packed_rows(7473, mean_tokens=168, max_length=2048)
    assert batch.steps_per_epoch(rows, 32) == 19
    assert batch.steps_per_epoch(7473, 32) == 233


def test_warm_up_is_rounded_up_as_transformers_rounds_a_ratio():
    assert batch.warmup_steps(100, 0.05) == 5
    assert batch.warmup_steps(101, 0.05) == 6
    assert batch.warmup_steps(100, 0.0) == 0


def test_max_steps_decides_alone_and_epochs_may_be_fractions():
    assert batch.optimizer_steps(10, 3.0) == 30
    assert batch.optimizer_steps(10, 2.5) == 25
    assert batch.optimizer_steps(10, 3.0, max_steps=7) == 7
