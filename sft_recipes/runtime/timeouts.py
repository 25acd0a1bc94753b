"""Every timeout, in seconds.

Set by the user instead: `monitor.heartbeat_timeout_seconds` (a rank without a heartbeat).
"""

from __future__ import annotations

# Other programs.
NVIDIA_SMI = 60.0  # it waits indefinitely for a driver that hangs
SLURM_COMMAND = 30.0
CONTAINER_RUNTIME = 60.0
TORCH_PROBE = 180.0  # a process that imports torch and lists the GPUs
HUB_REQUEST = 5.0
POLL_SERVER = 0.2  # of `check-serving`, while it loads the model

# Ranks and their launcher.
MODEL_LOADING = 1800.0  # from the start of a rank to its first step, and to publish its model
OTHER_RANKS_EXIT = 5  # after one rank ended: most others fail at once, some wait for it indefinitely
LAUNCHER_EXIT = 5.0  # once all ranks were killed; with OTHER_RANKS_EXIT all are gone 15 s after a death
PROCESS_GROUP_EXIT = 15.0
STACK_TRACES = 2.0  # a rank writes its Python stack traces
MIN_SAVE_GRACE = 120  # from a stop request to SIGKILL, or longer if a save takes longer
CONTAINER_STOP = 3600  # from a stop request to SIGKILL; a save of a large model takes minutes, docker's default is 10 s
EARLIER_RANKS_EXIT = 15.0  # ranks of an earlier start of the same run
RUN_LOCK = 900.0  # a requeued job waits for launchers of its earlier start, whose ranks stall first
POLL_RANKS = 0.2

# Several nodes.
NODES_MEET = 600.0  # a node may have to unpack an image first, and another one runs a slower check
POLL_NODES = 0.2
NODE_ANSWERS = 5.0  # to a connection, or after it
EXIT_RECORD = 3.0  # the exit record of a node that has ended
NODE_REPORT = 30.0  # a node writes why its ranks failed
SAY_WAITING_AFTER = 15.0  # a line that says which nodes are missing
FILE_VISIBLE = 60.0  # a file that another node wrote to the shared disk
CHECKPOINT_VISIBLE = 90.0  # a checkpoint directory that another node renamed
SLURMD = 300.0  # Slurm's default SlurmdTimeout, if the controller does not tell its own
POLL_NODE_STATES = 2.0

# All-reduce test.
ALLREDUCE_RENDEZVOUS = 120
ALLREDUCE_TEST = 180.0

# Trackers.
TRACKER_INIT = 20
TRACKER_FINISH = 30

# Forecasts.
LAYER_TRACE = 900.0  # on a fake device, of a layer that loops over tokens in Python
