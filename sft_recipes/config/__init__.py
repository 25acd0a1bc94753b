"""What a user may write: the recipe schema, its loader, size classes, strategies, GPU types. Never imports torch."""
