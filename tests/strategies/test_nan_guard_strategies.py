"""A loss that is no number, under each engine; `make test` has DDP."""

import pytest
from helpers.poisoned_model import check_that_it_stops, poisoned_model
from helpers.workplace import needs_compiler

__all__ = ["poisoned_model"]  # a fixture


@needs_compiler
@pytest.mark.parametrize(
    ("engine", "processes", "packing"),
    [
        ("single", 1, "true"),
        ("zero2", 2, "false"),
        ("zero3", 2, "true"),
        ("fsdp2", 2, "true"),
    ],
)
def test_a_loss_that_is_no_number_stops_the_run_under_every_engine(
    workplace, poisoned_model, write_rows, engine, processes, packing
):
    check_that_it_stops(workplace, poisoned_model, write_rows, engine, processes, packing)
