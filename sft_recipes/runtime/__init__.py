"""Shared by launcher and ranks: run directory, heartbeat, files, environment, errors. Standard library only."""
