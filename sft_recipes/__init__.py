"""Supervised fine-tuning recipes: the planner resolves a recipe to `plan.json`, the ranks train it."""
