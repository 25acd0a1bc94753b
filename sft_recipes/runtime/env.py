"""Reads what a run finds around it: the machine's memory and libraries, and the environment variables that Make, sbatch
and containers pass on alike; an empty one is as good as none."""

from __future__ import annotations

import os
from importlib import metadata, util
from pathlib import Path

from sft_recipes.runtime.errors import SetupError

# The names of transformers' integrations (integrations/integration_utils.py, 5.23), and the module that each needs.
_TRACKERS = {
    "azure_ml": "azureml",
    "clearml": "clearml",
    "codecarbon": "codecarbon",
    "comet_ml": "comet_ml",
    "dagshub": "dagshub",
    "dvclive": "dvclive",
    "flyte": "flytekit",
    "kubeflow": "transformers",
    "mlflow": "mlflow",
    "neptune": "neptune",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}
_WANDB_MODES = ("", "online", "offline", "disabled", "shared", "dryrun", "run")
# Of control groups, version 2 and 1; `max`, or more than any machine has, where there is none.
_MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_TELEMETRY_OFF = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # TRL reports every trainer by huggingface_hub (trl/trainer/base_trainer.py)
    "WANDB_ERROR_REPORTING": "false",  # W&B's client reports on itself (wandb/analytics); a run's figures are not that
}

# How often a waiting OpenMP thread of libgomp spins before it sleeps. With the default, 300000, training on 2 cores
# hardly moves next to one busy process. A smaller bound costs more alone and saves more: benchmarks/threads.py.
SPIN_COUNT = "2000"


def limit_thread_spin() -> None:
    """Bounds how long OpenMP threads spin, here and in processes started from here, unless the user chose a policy.

    Must run before torch is imported: libgomp reads its variables once, when it is loaded.
    """
    if not os.environ.get("OMP_WAIT_POLICY"):
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def silence_telemetry() -> None:
    """Has no library report on its use from this process or those that it starts; what the user has set stays."""
    for name, value in _TELEMETRY_OFF.items():
        os.environ.setdefault(name, value)


def reporters() -> list[str]:
    """Return the trackers named in REPORT_TO; TensorBoard if it is not set.

    Raises:
        SetupError: a name is unknown or its library is not installed.
    """
    names = [name.strip() for name in (os.environ.get("REPORT_TO") or "tensorboard").split(",")]
    if names == ["none"]:
        return []
    available = [name for name, module in _TRACKERS.items() if util.find_spec(module)]
    for name in names:
        if name not in available and name != "none":
            problem = "not installed" if name in _TRACKERS else "not a tracker"
            raise SetupError(f"REPORT_TO: {name!r} is {problem}. Available: none, {', '.join(available)}")
    if "none" in names:
        raise SetupError(f"REPORT_TO: found {','.join(names)}, expected none or trackers. Set one or the other")
    if "wandb" in names and (mode := os.environ.get("WANDB_MODE", "")) not in _WANDB_MODES:
        raise SetupError(f"WANDB_MODE: found {mode!r}, expected online, offline or disabled. Set one of them")
    return names


def sanity_is_skipped() -> bool:
    """SANITY=skip: a run starts although nothing has tried it.

    Raises:
        SetupError: another word.
    """
    asked = os.environ.get("SANITY", "")
    if asked not in ("", "skip"):
        raise SetupError(f"SANITY: {asked!r} is not known; say SANITY=skip, or leave it out")
    return asked == "skip"


def gpu_hour_price() -> float | None:
    """GPU_HOUR_PRICE: what an hour of one GPU costs, in the user's money; None where it is not said.

    Raises:
        SetupError: it is no number.
    """
    text = os.environ.get("GPU_HOUR_PRICE")
    if not text:
        return None
    try:
        price = float(text)
    except ValueError:
        price = -1.0
    if not 0 <= price < 1e6:
        raise SetupError(f"GPU_HOUR_PRICE: {text!r} is not a price; wanted a number such as 2.50")
    return price


def host_memory_bytes() -> int:
    """The memory that this machine has, or that its container may take."""
    limits = (file.read_text(encoding="utf-8").strip() for file in _MEMORY_LIMITS if file.is_file())
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(int(one) for one in limits if one.isdigit())])


def library_version(name: str) -> str:
    """The installed version of a library, or `not installed`."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
