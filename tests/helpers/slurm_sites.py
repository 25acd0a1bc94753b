"""A checkout on a real Slurm cluster: submit jobs, wait for their states, read their output."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers.slurm_cluster import Cluster, cluster
from helpers.workplace import FEW_STEPS, REPOSITORY, metrics
from safetensors.numpy import load_file

_TIMEOUT_SECONDS = 900.0  # a wait takes half a minute on an idle machine; the first ZeRO start compiles an operator
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
# Two ranks, one per node, and enough steps to interrupt a run in the middle.
LONGER = (*FEW_STEPS, "trainer.max_steps=60", "trainer.eval_steps=30", "trainer.save_steps=15")


@dataclass(frozen=True)
class Site:
    """A checkout on the disk that all nodes of a cluster share."""

    cluster: Cluster
    checkout: Path

    @property
    def runs(self) -> Path:
        return self.checkout / "runs"

    def submit(self, script: str, *overrides: str, options: tuple[str, ...] = (), **variables: str) -> str:
        """Submit a job; return its id."""
        done = self.sbatch(script, *overrides, options=options, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def sbatch(
        self, script: str, *overrides: str, options: tuple[str, ...] = (), **variables: str
    ) -> subprocess.CompletedProcess[str]:
        environment = {"SANITY": "skip", "REPORT_TO": "none", "OMP_NUM_THREADS": "1", "PROCESSES": "2", **variables}
        command = ["sbatch", "--parsable", *options, f"slurm/{script}.sh", *overrides]
        return self.cluster.run(*command, environment=environment, folder=self.checkout)

    def wait(self, job: str) -> dict[str, str]:
        """Wait until a job has ended; return its fields in the controller."""
        until(lambda: self.cluster.job(job).get("JobState") in ENDED, lambda: self.output(job))
        return self.cluster.job(job)

    def wait_for_restart(self, job: str, without: Sequence[str] = ()) -> None:
        """Wait until the job is requeued and has released its nodes, then start it without Slurm's delay."""
        until(lambda: self.cluster.job(job).get("JobState") == "PENDING", lambda: self.output(job))
        self.cluster.await_idle(120, without)
        # Slurm would wait two minutes; nodes reject credentials signed in the second in which the job ended.
        time.sleep(3)
        self.cluster.run("scontrol", "update", f"jobid={job}", "StartTime=now")
        until(lambda: self.cluster.job(job).get("JobState") != "PENDING", lambda: self.output(job))

    def wait_for_step(self, run: str, step: int, job: str) -> None:
        """Wait until a run has logged a step."""

        def reached() -> bool:
            assert self.cluster.job(job)["JobState"] not in ENDED, self.output(job)
            return last_step(self.runs / run) >= step

        until(reached, lambda: self.output(job))

    def output(self, job: str) -> str:
        """Return the job's output and the logs of its launchers and ranks."""
        files = [
            *self.checkout.glob(f"slurm/logs/*-{job}.out"),
            *self.checkout.glob(f"slurm/logs/*-{job}/start-*/*.txt"),
        ]
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in files)


def until(condition: Callable[[], bool], output: Callable[[], str]) -> None:
    """Wait for a condition; fail with the output after a timeout."""
    end = time.monotonic() + _TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < end, output()[-5000:]
        time.sleep(0.2)


def last_step(run: Path) -> int:
    return max((line["step"] for line in metrics(run)), default=0) if (run / "metrics.jsonl").exists() else 0


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run) if "loss" in line]


def same_weights(first: Path, second: Path) -> bool:
    left, right = load_file(first / "last" / "model.safetensors"), load_file(second / "last" / "model.safetensors")
    return left.keys() == right.keys() and all((left[name] == right[name]).all() for name in left)


_SHIPPED = ("slurm", "sft_recipes", "recipes", "accelerate_configs", "deepspeed_configs", "Makefile")


@contextlib.contextmanager
def site(place: Path, names: Sequence[str], gpus: int) -> Iterator[Site]:
    """Run a cluster with a checkout on its shared disk within the block."""
    checkout = place / "sft-recipes"
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        if name.split("/")[0] in _SHIPPED:
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, checkout / name)
    # A wrapper instead of a link to this checkout: DeepSpeed recompiles its operators if its own path differs.
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    late = '[ "${LATE:-no node}" != "$SLURMD_NODENAME" ] || sleep 4'  # on the node that a test selects
    python.write_text(f'#!/bin/sh\n{late}\nexec {REPOSITORY}/.venv/bin/python "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    with cluster(place / "cluster", names, gpus) as running:
        yield Site(running, checkout)
