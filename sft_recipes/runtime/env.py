"""Environment variables, host memory and library versions.

Make, sbatch and containers pass the same variables; an empty variable counts as unset.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib import metadata, util
from pathlib import Path

from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.paths import REPOSITORY

# Those of transformers' integrations (integrations/integration_utils.py, 5.23) that are named as their module.
_TRACKERS = (
    "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "mlflow", "neptune", "swanlab", "tensorboard", "trackio",
    "wandb",
)  # fmt: skip
_WANDB_MODES = ("", "online", "offline", "disabled", "shared", "dryrun", "run")
WANDB_TIMEOUTS = ("WANDB_INIT_TIMEOUT", "WANDB_FINISH_TIMEOUT")
_NUMBER = re.compile(r"\d{1,6}(\.\d*)?")
# Memory limits of cgroups v2 and v1; `max` or a huge number means no limit.
_MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_TELEMETRY_OFF = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # TRL reports every trainer by huggingface_hub (trl/trainer/base_trainer.py)
    "WANDB_ERROR_REPORTING": "false",  # W&B's client reports its own errors (wandb/analytics); metrics are not affected
}

# Spins of a waiting OpenMP thread of libgomp before it sleeps. With the default, 300000, training on 2 cores makes
# little progress next to one busy process. A smaller bound is slower alone and faster then: benchmarks/threads.py.
SPIN_COUNT = "2000"


def limit_thread_spin() -> None:
    """Limit how long OpenMP threads spin, in this process and its children, unless OMP_WAIT_POLICY is set.

    Call before importing torch: libgomp reads its variables once, on load.
    """
    if not os.environ.get("OMP_WAIT_POLICY"):
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def silence_telemetry() -> None:
    """Disable the telemetry of libraries in this process and its children; keep variables that are set."""
    for name, value in _TELEMETRY_OFF.items():
        os.environ.setdefault(name, value)


def with_repository(environment: Mapping[str, str]) -> dict[str, str]:
    """Return environment variables in which a Python process finds this checkout's package first."""
    paths = filter(None, (str(REPOSITORY), environment.get("PYTHONPATH")))
    return {**environment, "PYTHONPATH": os.pathsep.join(paths)}


def reporters() -> list[str]:
    """Return the trackers named in REPORT_TO; TensorBoard if it is not set.

    Raises:
        SetupError: a name is unknown, its library is not installed, or a variable of W&B has an invalid value.
    """
    names = [name.strip() for name in (os.environ.get("REPORT_TO") or "tensorboard").split(",")]
    if names == ["none"]:
        return []
    installed = [name for name in _TRACKERS if util.find_spec(name)]
    for name in names:
        if name not in installed:
            raise SetupError(f"REPORT_TO: {name!r} is not installed. Set none, or some of {', '.join(installed)}")
    if "wandb" in names and (mode := os.environ.get("WANDB_MODE", "")) not in _WANDB_MODES:
        raise SetupError(f"WANDB_MODE: found {mode!r}, expected online, offline or disabled. Set one of them")
    for variable in WANDB_TIMEOUTS if "wandb" in names else ():
        if (value := os.environ.get(variable)) and not _NUMBER.fullmatch(value):
            raise SetupError(f"{variable}: found {value!r}, expected a number of seconds. Set one, or unset it")
    return names


def sanity_is_skipped() -> bool:
    """Return whether SANITY=skip is set: start runs without a sanity check.

    Raises:
        SetupError: another value.
    """
    value = os.environ.get("SANITY", "")
    if value not in ("", "skip"):
        raise SetupError(f"SANITY: found {value!r}, expected skip or nothing. Set SANITY=skip, or unset it")
    return value == "skip"


def gpu_hour_price() -> float | None:
    """Return GPU_HOUR_PRICE, the price of an hour of one GPU in any currency; None if unset.

    Raises:
        SetupError: it is not a price.
    """
    text = os.environ.get("GPU_HOUR_PRICE")
    if not text:
        return None
    if not _NUMBER.fullmatch(text):
        raise SetupError(f"GPU_HOUR_PRICE: found {text!r}, expected a price. Set for example GPU_HOUR_PRICE=2.50")
    return float(text)


def host_memory_bytes() -> int:
    """Return the memory of this machine, or the limit of its container."""
    limits = (file.read_text(encoding="utf-8").strip() for file in _MEMORY_LIMITS if file.is_file())
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(int(limit) for limit in limits if limit.isdigit())])


# Libraries that decide how a run computes.
STACK = (
    "torch", "transformers", "trl", "accelerate", "datasets", "deepspeed", "peft", "bitsandbytes", "liger-kernel",
)  # fmt: skip


def library_version(name: str) -> str:
    """Return the installed version of a library, or `not installed`."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
