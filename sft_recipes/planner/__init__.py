"""From a recipe and the hardware to a plan: batch, memory, cost, learning rates. Pure; never imports torch."""
