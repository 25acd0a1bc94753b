"""From a plan to processes: which hardware is here, which command starts the ranks, what became of them."""
