"""What the launcher and the ranks share: run directory, heartbeat, files, environment, errors. Standard library."""
