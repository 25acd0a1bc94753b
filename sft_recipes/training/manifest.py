"""Writes `manifest.json`: code, versions, host, data, tokens, losses and outcome of a run."""

from __future__ import annotations

import datetime
import os
import platform
import socket
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.env import library_version
from sft_recipes.runtime.paths import REPOSITORY
from sft_recipes.runtime.run_dir import RunDir, read_json, write_json

_LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "deepspeed",
    "peft",
    "bitsandbytes",
    "tokenizers",
    "wandb",
    "tensorboard",
)


def begin(folder: RunDir, plan: Plan) -> None:
    """Record the start of an attempt; the records of earlier attempts are kept."""
    earlier, sanity = read_json(folder.manifest), read_json(folder.sanity)
    details = read_json(Path(read_json(folder.prepared).get("folder", "")) / "details.json")
    for key in ("diverged", "error", "takes_less", "exit_code"):
        earlier.pop(key, None)  # outcome of an earlier attempt
    content = {
        **earlier,
        "run": folder.name,
        "recipe": plan.recipe,
        "state": "running",
        "began": earlier.get("began", _now()),
        "starts": [
            *earlier.get("starts", []),
            {
                "at": _now(),
                "host": _host(),
                "versions": _versions(),
                "code": read_code_version(),
                "sanity": sanity,
                **_image(),
                **_job(),
            },
        ],
        **({"init_from": plan.init_from} if plan.init_from else {}),
        "data": {
            "fingerprint": plan.data_fingerprint,
            **asdict(plan.sections.data),
            "reading": details.get("reading"),
        },
        "tokenizer": details.get("tokenizer"),
        "rows": plan.rows,
        "dropped_rows_per_epoch": plan.dropped_rows_per_epoch,
        "optimizer_steps": plan.optimizer_steps,
        "warmup_steps": plan.warmup_steps,
        "allowed_changes": plan.allowed_changes,
    }
    write_json(folder.manifest, content)


def end(
    folder: RunDir, state: str, exit_code: int, seconds: float = 0.0, training_seconds: float = 0.0, **results: Any
) -> dict[str, Any]:
    """Record the end of an attempt and its results; its times are added to those of earlier attempts."""
    earlier = read_json(folder.manifest)
    results["wall_seconds"] = round(earlier.get("wall_seconds", 0.0) + seconds, 1)
    results["training_seconds"] = round(earlier.get("training_seconds", 0.0) + training_seconds, 1)
    content = {**earlier, **results, "state": state, "exit_code": exit_code, "ended": _now()}
    write_json(folder.manifest, content)
    return content


def update(folder: RunDir, **values: Any) -> None:
    """Record values of a running attempt."""
    write_json(folder.manifest, {**read_json(folder.manifest), **values})


def peak_memory() -> dict[str, int]:
    """Return the peak memory that PyTorch reserved on this rank's GPU, in bytes; nothing on a CPU."""
    import torch

    return {"peak_memory_bytes": torch.cuda.max_memory_reserved()} if torch.cuda.is_available() else {}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _host() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "name": socket.gethostname(),
        "system": platform.platform(),
        "gpus": gpus,
        "threads": torch.get_num_threads(),
    }


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: library_version(name) for name in _LIBRARIES}}


def _job() -> dict[str, Any]:
    """Return the Slurm job of this attempt, its nodes and its number of restarts."""
    names = {"id": "SLURM_JOB_ID", "name": "SLURM_JOB_NAME", "nodes": "SLURM_JOB_NODELIST"}
    job = {key: os.environ[name] for key, name in names.items() if os.environ.get(name)}
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    return {"job": {**job, "restarts": restarts}} if "id" in job else {}


def _image() -> dict[str, str]:
    """Return the container image of this attempt, if it runs in one."""
    image = os.environ.get("SFT_RECIPES_IMAGE")
    return {"image": image} if image else {}


def _revision_of_image() -> str:
    file = REPOSITORY / "REVISION"
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""


def read_code_version() -> dict[str, Any]:
    """Return the commit, and whether the working tree differs from it; None if unknown."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    if commit is None and (revision := os.environ.get("SFT_RECIPES_REVISION") or _revision_of_image()):
        commit, _, changed = revision.partition("-")  # launch/container.py and docker/Dockerfile write it
        return {"commit": commit, "dirty": bool(changed)}
    return {"commit": commit, "dirty": None if status is None else bool(status)}
