"""Check that this machine or container can train: each check is ok, warning or error, with its fix."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sft_recipes.launch import command, node_checks
from sft_recipes.launch.node_checks import CheckResult, all_reduce, nccl_log_variables, occupied_gpus, read_transports
from sft_recipes.launch.topology import Gpu, hidden_gpus, nvidia_smi_error, visible_gpus
from sft_recipes.runtime import cuda, timeouts
from sft_recipes.runtime.env import library_version, with_repository
from sft_recipes.runtime.paths import REPOSITORY, hub_cache
from sft_recipes.runtime.programs import run_program
from sft_recipes.runtime.run_dir import runs_root
from sft_recipes.runtime.units import GIB


def run_checks(requested_gpus: int | None) -> Iterator[CheckResult]:
    """Yield the result of every check.

    Args:
        requested_gpus: number of GPUs of the run to check for; None if not given.
    """
    gpus = visible_gpus()
    probe = node_checks.probe_torch(os.environ, "all")
    if error := nvidia_smi_error():
        fix = "see dmesg; after a driver update, restart the machine"
        yield CheckResult("driver", "error", f"nvidia-smi fails ({error})", fix)
    else:
        yield from check_driver(gpus, requested_gpus, cuda.driver_version(), probe)
    if occupied := ", ".join(occupied_gpus(gpus)):
        fix = "see nvidia-smi for the process; or set DEVICES=…"
        yield CheckResult("GPU memory", "warning", f"in use on {occupied}", fix)
    yield check_flash_attention(probe)
    yield check_operators(probe)
    yield all_reduce(_measure_all_reduce(len(gpus)), len(gpus), bool(os.environ.get("ALLOW_SOCKETS")))
    least = GIB * len(gpus) if len(gpus) > 1 else GIB // 4  # of NCCL and data workers
    shared: node_checks.Status = "error" if len(gpus) > 1 else "warning"
    yield check_space("shared memory", Path("/dev/shm"), least, shared, "--shm-size 16g, or --ipc host")
    least, status = (100 * GIB, "warning") if gpus else (GIB, "error")
    for name, path in (("disk: runs", runs_root()), ("disk: hub cache", hub_cache())):
        yield check_space(name, path, least, status, "free space; `make plan` prints the size of a run")
    yield check_hub()
    yield check_versions("cuda" if probe.get("cuda") else "cpu")


def check_driver(
    gpus: Sequence[Gpu], requested: int | None, version: str | None, probe: dict[str, Any]
) -> Iterator[CheckResult]:
    """Check the GPUs, their driver, and whether PyTorch can use them.

    Args:
        requested: number of GPUs of the run to check for; None if not given.
        version: of the driver.
        probe: the report of `training/torch_probe.py`.
    """
    if requested is not None and requested > len(gpus):
        fix = hidden_gpus() or "see nvidia-smi; in a container, give it GPUs (docker/README.md)"
        yield CheckResult("GPUs", "error", f"found {len(gpus) or 'none'}, expected {requested}", fix)
    else:
        listed = ", ".join(f"{gpu.id}: {gpu.name}, {gpu.memory_mib / 1024:.0f} GiB" for gpu in gpus)
        yield CheckResult("GPUs", "ok", listed or "none: CPU recipes only")
    if gpus:
        yield CheckResult("driver", "ok", version or "version unknown: nvidia-smi does not report it")
    if not gpus or "error" in probe:
        return
    if problem := cuda.find_problem(probe, len(gpus), version, os.environ.get("CUDA_VISIBLE_DEVICES")):
        yield CheckResult("CUDA", "error", *problem)
    else:
        yield CheckResult("CUDA", "ok", f"PyTorch {probe['torch']} with CUDA {probe['cuda']} finds {probe['devices']}")


def check_flash_attention(probe: dict[str, Any]) -> CheckResult:
    """Check that flash-attn is installed and correct on this GPU."""
    if "error" in probe:
        return CheckResult("torch", "error", probe["error"], "run make setup to install the locked packages")
    report = probe["flash_attention"]
    if report is None:
        return CheckResult("flash-attn", "ok", "not checked: it needs a GPU; PyTorch attention is used")
    if "missing" in report:
        return CheckResult("flash-attn", "warning", "not installed; PyTorch attention is used", "make image has it")
    if "error" in report:  # compiled for another torch, or for other GPUs, which `model.attention: auto` skips
        capabilities = ";".join(sorted({gpu["capability"] for gpu in probe.get("gpus", [])}))
        detail = f"cannot run on compute capability {capabilities} ({report['error']})"
        fix = f"rebuild it with CUDA_ARCHITECTURES='{capabilities}' (docker/README.md)"
        return CheckResult("flash-attn", "warning" if report["loads"] else "error", detail, fix)
    forward, backward, tolerance = report["forward"], report["backward"], report["tolerance"]
    detail = f"error {forward:.1e} forward, {backward:.1e} backward, tolerance {tolerance:.0e}"
    if not (forward <= tolerance and backward <= tolerance):  # a NaN fails this
        return CheckResult("flash-attn", "error", detail, "set model.attention=sdpa, and report it")
    return CheckResult("flash-attn", "ok", detail)


def check_operators(probe: dict[str, Any]) -> CheckResult:
    """Check that DeepSpeed's operators are compiled, or can be at the first start of ZeRO."""
    compiled = ", ".join(probe.get("operators", []))
    if compiled or probe.get("compiler"):
        return CheckResult("operators", "ok", f"compiled: {compiled or 'at the first start of ZeRO'}")
    fix = "install g++ and python3-dev to use CPU offload, or ZeRO on the CPU"
    return CheckResult("operators", "warning", "not compiled, and no C++ compiler with Python's headers", fix)


def check_space(name: str, path: Path, least: int, status: node_checks.Status, fix: str) -> CheckResult:
    """Check the free space of a folder, or of the nearest one above it that exists.

    Args:
        least: bytes; with less the check has this status and fix.
    """
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    detail = f"{free / GIB:.2f} GiB free in {path}"
    if free < least:
        return CheckResult(name, status, detail, f"expected {least / GIB:.2f} GiB: {fix}")
    return CheckResult(name, "ok", detail)


def check_hub() -> CheckResult:
    """Check that the Hub answers, and accepts the token."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import build_hf_headers, get_session

    if constants.HF_HUB_OFFLINE:
        return CheckResult("Hub", "ok", "not checked: HF_HUB_OFFLINE is set")
    url = f"{constants.ENDPOINT}/api/{'whoami-v2' if get_token() else 'models?limit=1'}"
    try:
        status = get_session().get(url, headers=build_hf_headers(), timeout=timeouts.HUB_REQUEST).status_code
    except Exception as error:  # of the HTTP library or the URL; its message may have the token
        status = type(error).__name__
    if status == 401:
        fix = "create one: https://huggingface.co/settings/tokens"
        return CheckResult("Hub", "error", "HF_TOKEN is not valid", fix)
    if status != 200:
        fix = "download models and data first (`make download`), and set HF_HUB_OFFLINE=1"
        return CheckResult("Hub", "warning", f"no answer ({status})", fix)
    token = "HF_TOKEN is valid" if get_token() else "no HF_TOKEN: gated models are unavailable"
    return CheckResult("Hub", "ok", f"reachable; {token}")


def check_versions(torch_build: str) -> CheckResult:
    """Check the installed packages against the lock."""
    lock = locked(torch_build)
    installed = {name: library_version(name) for name in lock}
    differ = [f"{name} {installed[name]}, expected {lock[name]}" for name in lock if installed[name] != lock[name]]
    if differ:
        status = "error" if "not installed" in installed.values() else "warning"
        return CheckResult("versions", status, "; ".join(differ), "run make setup to install the locked versions")
    return CheckResult("versions", "ok", f"{len(lock)} packages as locked")


def locked(torch_build: str) -> dict[str, str]:
    """Return name and version of the packages that the lock installs on every Linux machine with this torch build."""
    files = [REPOSITORY / "requirements" / f"{name}.txt" for name in ("common", torch_build)]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    pin = r"""^([\w.-]+)==(\S+)(?: ; sys_platform == ["']linux["'])? \\$"""
    return dict(re.findall(pin, text, re.MULTILINE))


def _measure_all_reduce(gpus: int) -> dict[str, Any]:
    """Run `tools/allreduce_bench.py` over the GPUs, or over two CPU processes; add NCCL's transports."""
    with tempfile.TemporaryDirectory(prefix="sft-") as folder:
        ranks, report = gpus or 2, Path(folder) / "result.json"
        loopback = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        overrides = {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", **({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})}
        environment = with_repository({**loopback, **os.environ, **nccl_log_variables(folder), **overrides})
        test = command.allreduce_test(ranks, report)
        code, output = run_program(*test, timeout=timeouts.ALLREDUCE_TEST, environment=environment)
        if code == 0:
            return {**json.loads(report.read_text(encoding="utf-8")), "transports": read_transports(folder)}
        errors = [line.strip() for line in output.splitlines() if re.match(r"\s*\S*(Error|Exception)\b", line)]
        reason = errors[0] if errors else " ".join(output.split())[-200:]
        return {"error": f"{ranks} ranks: all-reduce failed: {reason}"}
