"""A NaN loss under each strategy; tests/integration has DDP."""

import pytest
from helpers.poisoned_model import check_nan_stops_run, poisoned_model
from helpers.workplace import needs_compiler

__all__ = ["poisoned_model"]  # a fixture


@needs_compiler
@pytest.mark.parametrize(
    ("strategy", "processes", "packing"),
    [
        ("zero3", 2, "false"),
        ("fsdp2", 2, "true"),
    ],
)
def test_nan_loss_stops_run_under_strategy(workplace, poisoned_model, write_rows, strategy, processes, packing):
    check_nan_stops_run(workplace, poisoned_model, write_rows, strategy, processes, packing)
