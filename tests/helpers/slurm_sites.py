"""A checkout on a real Slurm cluster, and what its user types there and sees."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers.slurm_cluster import Cluster, cluster
from helpers.workplace import REPOSITORY, SHORT, metrics
from safetensors.numpy import load_file

_SECONDS_AT_MOST = 400.0  # for what takes half a minute on an idle machine
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
# Two ranks, one on each node, and enough steps that something can happen in the middle.
LONGER = (*SHORT, "trainer.max_steps=60", "trainer.eval_steps=30", "trainer.save_steps=15")


@dataclass(frozen=True)
class Site:
    """A checkout on the disk that all nodes of a cluster share, and what a user types there."""

    cluster: Cluster
    checkout: Path

    @property
    def runs(self) -> Path:
        return self.checkout / "runs"

    def submit(self, script: str, *words: str, options: tuple[str, ...] = (), **variables: str) -> str:
        """The number of the job."""
        done = self.sbatch(script, *words, options=options, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def sbatch(
        self, script: str, *words: str, options: tuple[str, ...] = (), **variables: str
    ) -> subprocess.CompletedProcess[str]:
        given = {"SANITY": "skip", "REPORT_TO": "none", "OMP_NUM_THREADS": "1", "PROCESSES": "2", **variables}
        command = ["sbatch", "--parsable", *options, f"slurm/{script}.sh", *words]
        return self.cluster.ask(*command, environment=given, folder=self.checkout)

    def ended(self, job: str) -> dict[str, str]:
        """What Slurm says of a job once it has ended."""
        until(lambda: self.cluster.job(job).get("JobState") in ENDED, lambda: self.output(job))
        return self.cluster.job(job)

    def starts_again(self, job: str, without: Sequence[str] = ()) -> None:
        """Waits until the job is back in the queue and has let go of its nodes, and has Slurm not wait longer."""
        until(lambda: self.cluster.job(job).get("JobState") == "PENDING", lambda: self.output(job))
        self.cluster.await_idle(120, without)
        # Slurm would wait two minutes; nodes refuse what was signed in the second in which the job was ended.
        time.sleep(3)
        self.cluster.ask("scontrol", "update", f"jobid={job}", "StartTime=now")
        until(lambda: self.cluster.job(job).get("JobState") != "PENDING", lambda: self.output(job))

    def reaches(self, run: str, step: int, job: str) -> None:
        """Waits until a run has logged a step."""

        def has() -> bool:
            assert self.cluster.job(job)["JobState"] not in ENDED, self.output(job)
            return last_step(self.runs / run) >= step

        until(has, lambda: self.output(job))

    def output(self, job: str) -> str:
        """What the job has said."""
        found = [
            *self.checkout.glob(f"slurm/logs/*-{job}.out"),
            *self.checkout.glob(f"slurm/logs/*-{job}/start-*/*.txt"),
        ]
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in found)

    def words(self, job: str) -> str:
        """The names of the files that its launchers and its script leave for each other."""
        return " ".join(path.name for path in self.checkout.glob(f"slurm/logs/*-{job}/start-*/*"))


def until(happens: Callable[[], bool], said: Callable[[], str]) -> None:
    """Waits for something that must happen."""
    end = time.monotonic() + _SECONDS_AT_MOST
    while not happens():
        assert time.monotonic() < end, said()[-5000:]
        time.sleep(0.2)


def last_step(run: Path) -> int:
    return max((line["step"] for line in metrics(run)), default=0) if (run / "metrics.jsonl").exists() else 0


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run) if "loss" in line]


def same_weights(one: Path, other: Path) -> bool:
    left, right = load_file(one / "last" / "model.safetensors"), load_file(other / "last" / "model.safetensors")
    return left.keys() == right.keys() and all((left[name] == right[name]).all() for name in left)


_SHIPPED = ("slurm", "sft_recipes", "recipes", "accelerate_configs", "deepspeed_configs", "Makefile")


@contextlib.contextmanager
def site(place: Path, names: Sequence[str], gpus: int) -> Iterator[Site]:
    """A checkout beside a cluster, until the block is left."""
    checkout = place / "sft-recipes"
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        if name.split("/")[0] in _SHIPPED:
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, checkout / name)
    # By its own name, not by this checkout's: DeepSpeed compiles its operators anew where its own path is another one.
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    late = '[ "${LATE:-no node}" != "$SLURMD_NODENAME" ] || sleep 4'  # on the node that a test names so
    python.write_text(f'#!/bin/sh\n{late}\nexec {REPOSITORY}/.venv/bin/python "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    with cluster(place / "cluster", names, gpus) as one:
        yield Site(one, checkout)
