"""Diagnose why PyTorch cannot use the GPUs of this machine: its build, the driver, or the visible devices."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sft_recipes.runtime import timeouts
from sft_recipes.runtime.programs import run_program

# The first driver branch of each CUDA major version, by "minor version compatibility":
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
FIRST_DRIVER = {"12": 525, "13": 580}


def find_problem(
    report: Mapping[str, Any], needed: int, driver: str | None, visible: str | None
) -> tuple[str, str] | None:
    """Return why PyTorch cannot use as many GPUs as needed.

    PyTorch's report decides, not the driver version: with NVIDIA's forward-compatibility package a driver of
    an older branch runs CUDA 13 on data-center GPUs.

    Args:
        report: the report of `training/torch_probe.py`, or an `error` if there is none.
        needed: number of GPUs.
        driver: version of the NVIDIA driver, as `driver_version` returns it.
        visible: CUDA_VISIBLE_DEVICES of the processes that need the GPUs; None if unset.

    Returns:
        The problem and its fix; None if there is none.
    """
    if "error" in report:
        return f"PyTorch does not load ({report['error']})", "Install the locked packages: make setup"
    if report["cuda"] is None:
        return f"PyTorch {report['torch']} is a CPU build, expected a CUDA build", "Install it: TORCH=cuda make setup"
    if report["devices"] >= needed:
        return None
    first = FIRST_DRIVER.get(report["cuda"].partition(".")[0], 0)
    expected = f"expected {first or 'one'} or newer for CUDA {report['cuda']}"
    warning = report["warning"].partition(" (Trig")[0][-70:]
    reported = f" (PyTorch reports: …{warning})" if warning else ""
    if driver is None:
        return f"found no NVIDIA driver, {expected}{reported}", "Install it; in a container, see docker/README.md"
    if not report["devices"] and int(driver.partition(".")[0]) < first:
        fix = "Update it; for forward compatibility on data-center GPUs see docker/README.md"
        return f"found NVIDIA driver {driver}, {expected}{reported}", fix
    masked = "" if visible is None else f" with CUDA_VISIBLE_DEVICES={visible!r}"
    fix = "See `nvidia-smi -L`, CUDA_VISIBLE_DEVICES and dmesg"
    return f"PyTorch finds {report['devices'] or 'none'}{masked}{reported}", fix


def nvidia_smi(*options: str) -> tuple[int, str]:
    """Return exit code and output of nvidia-smi."""
    return run_program("nvidia-smi", *options, timeout=timeouts.NVIDIA_SMI)


def driver_version() -> str | None:
    """Return the NVIDIA driver version from nvidia-smi; None without a driver."""
    version = re.match(r"\d+\.[\d.]+", nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")[1])
    return version[0] if version else None
