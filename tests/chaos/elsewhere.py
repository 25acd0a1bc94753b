"""Faults that other tests of this repository hold, by their number, and what does not apply or is not done."""

HELD: dict[str, tuple[str, str]] = {
    "5": ("an exception in a data worker", "tests/test_processes.py"),
    "6": ("`sys.exit(0)` on one rank", "tests/test_processes.py"),
    "14": ("USR1 through sbatch and srun", "tests/slurm/test_jobs.py"),
    "16, 17": ("a kill at every file operation, each in the recovery from the one before", "kill points, below"),
    "22": ("a rename that another rank sees late", "tests/test_checkpoint.py"),
    "24": ("a crash in a save, keeping few", "kill points, below: something loadable is there at each"),
    "25": ("the best is the oldest", "tests/test_run.py"),
    "28, 29": ("each harm to each file of a checkpoint", "tests/test_checkpoint.py"),
    "32": ("all checkpoints invalid", "tests/test_checkpoint.py"),
    "33": ("a higher-numbered checkpoint of another run", "tests/test_checkpoint.py"),
    "35": ("another number of ranks, another engine", "tests/test_resharding.py, tests/engines/test_world_sizes.py"),
    "38": ("resumed at an epoch's end, in its middle, in an accumulation, at the last step, after the end",
           "tests/engines/test_trajectories.py, tests/test_run.py; the random kills (three steps make an epoch here)"),
    "40, 41": ("bad lines and roles", "tests/test_bad_input.py"),
    "42, 43": ("rows without a supervised token, fewer rows than a batch", "tests/test_cli.py, tests/test_spans.py"),
    "44": ("control tokens in texts", "tests/test_chat.py, tests/test_spans.py"),
    "45": ("NaN on one rank", "tests/test_divergence.py, tests/engines/test_divergence_everywhere.py"),
    "46": ("a bit flipped in one rank's weights", "tests/test_digests.py"),
    "47 to 53": ("what is loaded, kept and listened on", "tests/test_security.py, tests/engines/test_security_everywhere.py"),
}  # fmt: skip

NOT_DONE: dict[str, str] = {
    "7": "a memory limit (cgroup) cannot be set everywhere that these tests run; SIGKILL of a rank, which is what comes "
    "of one, is faults 1 and 2, and is said to be the out-of-memory killer's usual sign",
    "34": "records are not signed: a forged one is outside the promise (SECURITY.md)",
}
