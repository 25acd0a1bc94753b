"""Checkpoints: format, atomic writes, resume, retention, resharding."""
