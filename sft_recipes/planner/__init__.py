"""Resolve a recipe for given hardware into a plan: batch, memory, cost, learning rates. Never imports torch."""
