"""From a plan to processes: topology, commands, watchdog, containers, Slurm. Starts training as subprocesses only."""
