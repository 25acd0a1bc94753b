"""The office: turns a recipe and the hardware into a plan. Standard library and PyYAML only, never torch."""
