"""A NaN loss stops every rank before the optimizer step and names its row."""

from helpers.poisoned_model import check_nan_stops_run, poisoned_model

__all__ = ["poisoned_model"]  # a fixture


def test_nan_loss_stops_every_rank_and_names_row(workplace, poisoned_model, write_rows):
    check_nan_stops_run(workplace, poisoned_model, write_rows, "ddp", 2, "false")
