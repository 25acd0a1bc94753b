"""Faults by number that other tests cover, and those that nothing covers, with the reason."""

COVERED: dict[str, tuple[str, str]] = {
    "5": ("an exception in a data worker", "tests/integration/test_watchdog.py"),
    "6": ("`sys.exit(0)` on one rank", "tests/integration/test_watchdog.py"),
    "14": ("USR1 through sbatch and srun", "tests/slurm/test_jobs.py"),
    "16, 17": ("a kill at every file operation, each during the recovery from the one before", "kill points, below"),
    "22": ("a rename that another rank sees late", "tests/integration/test_checkpoint.py"),
    "24": ("a crash in a save, keeping few", "kill points, below: a loadable checkpoint exists at each"),
    "25": ("the best is the oldest", "tests/integration/test_train.py"),
    "28, 29": ("each kind of corruption of each file of a checkpoint", "tests/integration/test_checkpoint.py"),
    "32": ("all checkpoints invalid", "tests/integration/test_checkpoint.py"),
    "33": ("a higher-numbered checkpoint of another run", "tests/integration/test_checkpoint.py"),
    "35": ("another number of ranks, another strategy", "tests/unit/test_rank_change.py, tests/strategies/test_world_sizes.py"),
    "38": ("resumed at the end of an epoch, inside one, inside an accumulation, at the last step, after the end",
           "tests/strategies/test_trajectories.py, tests/integration/test_train.py; the random kills (three steps make an epoch here)"),
    "40, 41": ("bad lines and roles", "tests/unit/test_bad_input.py"),
    "42, 43": ("rows without a supervised token, fewer rows than a batch", "tests/integration/test_prepare_process.py, tests/unit/test_assistant_spans.py"),
    "44": ("special tokens in texts", "tests/unit/test_tokenize.py, tests/unit/test_assistant_spans.py"),
    "45": ("NaN on one rank", "tests/integration/test_nan_guard.py, tests/strategies/test_nan_guard_strategies.py"),
    "46": ("a bit flipped in one rank's weights", "tests/strategies/test_integrity_strategies.py"),
    "47 to 53": ("what is loaded, stored and listened on", "tests/integration/test_security.py, tests/strategies/test_security_strategies.py"),
}  # fmt: skip

NOT_COVERED: dict[str, str] = {
    "7": "a memory limit (cgroup) cannot be set everywhere that these tests run; its effect, SIGKILL of a rank, is faults 1 "
    "and 2, whose message names the out-of-memory killer",
    "34": "checkpoint records are not signed: a forged one is outside the guarantee (SECURITY.md)",
}
