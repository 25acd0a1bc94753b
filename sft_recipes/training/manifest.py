"""Writes `manifest.json`: code, versions, host, data, tokens, losses and outcome of a run."""

import datetime
import os
import platform
import socket
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sft_recipes.data import licenses
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.env import STACK, library_version
from sft_recipes.runtime.paths import REPOSITORY
from sft_recipes.runtime.run_dir import RunDir, read_json, write_json

_FROM_PLAN = ("recipe", "init_from", "rows", "dropped_rows_per_epoch", "optimizer_steps", "allowed_changes")
_JOB = {"id": "SLURM_JOB_ID", "name": "SLURM_JOB_NAME", "nodes": "SLURM_JOB_NODELIST"}


def begin(folder: RunDir, plan: Plan) -> None:
    """Record the start of an attempt; the records of earlier attempts are kept."""
    import torch

    earlier, prepared = read_json(folder.manifest), read_json(folder.prepared)
    details = read_json(Path(prepared.get("folder", "")) / "details.json")
    for key in ("diverged", "error", "out_of_memory", "takes_less", "exit_code"):
        earlier.pop(key, None)  # outcome of an earlier attempt
    versions = {"python": platform.python_version(), **{name: library_version(name) for name in (*STACK, "tokenizers")}}
    host = {"name": socket.gethostname(), "system": platform.platform(), "threads": torch.get_num_threads()}
    host["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    start = {"at": _now(), "host": host, "versions": versions, "code": read_code_version()}
    start |= {"sanity": read_json(folder.sanity), "image": os.environ.get("SFT_RECIPES_IMAGE")}
    if job := {key: os.environ[name] for key, name in _JOB.items() if os.environ.get(name)}:
        start["job"] = {**job, "restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0)}
    data = {"fingerprint": plan.data_fingerprint, **asdict(plan.sections.data), "reading": details.get("reading")}
    content = {**earlier, "run": folder.name, "state": "running", "began": earlier.get("began", start["at"])}
    content |= {"starts": [*earlier.get("starts", []), start], "data": data, "tokenizer": details.get("tokenizer")}
    content["model"] = licenses.describe_base(plan, Path(prepared.get("model", "")))
    write_json(folder.manifest, content | {key: getattr(plan, key) for key in _FROM_PLAN})


def end(
    folder: RunDir, state: str, exit_code: int, seconds: float = 0.0, training_seconds: float = 0.0, **results: Any
) -> dict[str, Any]:
    """Record the end of an attempt and its results; its times are added to those of earlier attempts. The launcher
    gets exit code and error from `outcome.json`."""
    earlier, reported = read_json(folder.manifest), ("error", "out_of_memory")
    write_json(folder.outcome, {"exit_code": exit_code, **{key: results[key] for key in reported if key in results}})
    results["wall_seconds"] = round(earlier.get("wall_seconds", 0.0) + seconds, 1)
    results["training_seconds"] = round(earlier.get("training_seconds", 0.0) + training_seconds, 1)
    content = {**earlier, **results, "state": state, "exit_code": exit_code, "ended": _now()}
    write_json(folder.manifest, content)
    return content


def update(folder: RunDir, **values: Any) -> None:
    """Record values of a running attempt."""
    write_json(folder.manifest, {**read_json(folder.manifest), **values})


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def read_code_version() -> dict[str, Any]:
    """Return the commit, and whether the working tree differs from it; None if unknown."""
    file = REPOSITORY / "REVISION"  # launch/container.py and docker/Dockerfile write the commit of an image
    recorded = os.environ.get("SFT_RECIPES_REVISION") or (file.read_text(encoding="utf-8") if file.is_file() else "")
    revision = _describe_working_tree() or recorded
    commit, _, changed = revision.strip().partition("-")
    return {"commit": commit or None, "dirty": bool(changed) if commit else None}


def _describe_working_tree() -> str:
    """Return the commit, with `-dirty` if a tracked file differs; empty outside of a git repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return ""
