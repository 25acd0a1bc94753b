"""A run whose loss is no number: stopped on all ranks before the step, with the row that it came from."""

from helpers.poisoned_model import check_that_it_stops


def test_a_loss_that_is_no_number_stops_all_ranks_before_the_step_and_names_the_row(
    workplace, poisoned_model, write_rows
):
    check_that_it_stops(workplace, poisoned_model, write_rows, "ddp", 2, "false")
