"""Check that this machine or container can train: each check is ok, warning or error, with its fix."""

from __future__ import annotations

import email.utils
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sft_recipes.launch import command, preflight
from sft_recipes.launch.node_checks import IDLE_GPU_BYTES, CheckResult, Status, all_reduce, find_transports
from sft_recipes.launch.topology import Gpu, hidden_gpus, nvidia_smi_error, unlisted, visible_gpus
from sft_recipes.runtime import cuda, timeouts
from sft_recipes.runtime.env import host_memory_bytes, library_version
from sft_recipes.runtime.paths import REPOSITORY, hf_home, hub_cache
from sft_recipes.runtime.run_dir import runs_root
from sft_recipes.runtime.units import GIB

_MAX_CLOCK_SECONDS = 60.0


def run_checks(requested_gpus: int | None) -> Iterator[CheckResult]:
    """Yield the result of every check.

    Args:
        requested_gpus: number of GPUs of the run to check for; None if not given.
    """
    gpus = visible_gpus()
    probe = preflight.probe_torch(os.environ, "all")
    if error := nvidia_smi_error():
        fix = "see dmesg; after a driver update, restart the machine"
        yield CheckResult("driver", "error", f"nvidia-smi fails ({error})", fix)
    else:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        yield from check_driver(gpus, requested_gpus, cuda.driver_version(), probe, visible)
    yield from check_gpu_memory(probe.get("gpus", []))
    yield check_flash_attention(probe)
    yield check_operators(probe, bool(gpus))
    yield all_reduce(_measure_all_reduce(len(gpus)), len(gpus), bool(os.environ.get("ALLOW_SOCKETS")))
    yield check_rdma(len(gpus), int(os.environ.get("NODES") or 1))
    yield check_shared_memory(_free_bytes(Path("/dev/shm")), len(gpus))
    yield check_host(host_memory_bytes(), len(os.sched_getaffinity(0)), len(gpus))
    yield check_disk("runs", runs_root(), bool(gpus))
    yield check_disk("hub cache", hub_cache(), bool(gpus))
    yield from check_hub(_query_hub())
    yield check_versions("cuda" if probe.get("cuda") else "cpu")


def check_driver(
    gpus: Sequence[Gpu], requested: int | None, version: str | None, probe: dict[str, Any], visible: str | None = None
) -> Iterator[CheckResult]:
    """Check the GPUs, their driver, and whether PyTorch can use them.

    Args:
        requested: number of GPUs of the run to check for; None if not given.
        version: of the driver.
        probe: the report of `training/torch_probe.py`.
        visible: CUDA_VISIBLE_DEVICES; None if unset.
    """
    if requested is not None and requested > len(gpus):
        fix = hidden_gpus() or "see nvidia-smi; in a container, give it GPUs (docker/README.md)"
        yield CheckResult("GPUs", "error", f"found {len(gpus) or 'none'}, expected {requested}", fix)
    elif gpus:
        detail = ", ".join(f"{gpu.id}: {gpu.name}, {gpu.memory_mib / 1024:.0f} GiB" for gpu in gpus)
        yield CheckResult("GPUs", "ok", detail)
    else:
        yield CheckResult("GPUs", "ok", "none: CPU recipes only")
    if not gpus:
        return
    for product in unlisted(gpus):
        fix = "set GPU_TYPE to one of docs/models.md to forecast hours"
        detail = f"{product} is not in the table: planned by its memory, without hours"
        yield CheckResult("GPU type", "warning", detail, fix)
    yield CheckResult("driver", "ok", version or "version unknown: nvidia-smi does not report it")
    if "error" in probe:
        return
    if problem := cuda.find_problem(probe, len(gpus), version, visible):
        yield CheckResult("CUDA", "error", *problem)
    else:
        yield CheckResult("CUDA", "ok", f"PyTorch {probe['torch']} with CUDA {probe['cuda']} finds {probe['devices']}")


def check_gpu_memory(gpus: Sequence[dict[str, Any]]) -> Iterator[CheckResult]:
    """Check that no other process uses much memory of a GPU."""
    for index, gpu in enumerate(gpus):
        used = gpu["total"] - gpu["free"]
        if used > IDLE_GPU_BYTES:
            detail = f"GPU {index}: {used / GIB:.1f} of {gpu['total'] / GIB:.1f} GiB in use"
            yield CheckResult("GPU memory", "warning", detail, "see nvidia-smi for the process; or set DEVICES=…")
    if gpus and all(gpu["total"] - gpu["free"] <= IDLE_GPU_BYTES for gpu in gpus):
        yield CheckResult("GPU memory", "ok", "free")


# Errors of CUDA and flash-attn if flash-attn was compiled for other GPUs than this one.
_NO_KERNEL = re.compile("no kernel image is available|invalid device function|only supports Ampere GPUs or newer")


def check_flash_attention(probe: dict[str, Any]) -> CheckResult:
    """Check that flash-attn is installed and correct on this GPU."""
    if "error" in probe:
        return CheckResult("torch", "error", probe["error"], "run make setup to install the locked packages")
    report = probe["flash_attention"]
    if report is None:
        return CheckResult("flash-attn", "ok", "not checked: it needs a GPU; PyTorch attention is used")
    if "missing" in report:
        fix = "PyTorch attention is used; the image has it (make image)"
        return CheckResult("flash-attn", "warning", f"not installed ({report['missing']})", fix)
    if "error" in report and _NO_KERNEL.search(report["error"]):
        capabilities = sorted({gpu["capability"] for gpu in probe.get("gpus", [])})
        detail = f"no kernel for compute capability {' or '.join(capabilities)}; PyTorch attention is used"
        fix = f"rebuild it with CUDA_ARCHITECTURES='{';'.join(capabilities)}' (docker/README.md)"
        fix = "it needs Ampere or newer" if "Ampere" in report["error"] else fix
        return CheckResult("flash-attn", "warning", detail, fix)
    if "error" in report:
        return CheckResult("flash-attn", "error", report["error"], "build it for this GPU (docker/README.md)")
    forward, backward, tolerance = report["forward"], report["backward"], report["tolerance"]
    detail = f"error {forward:.1e} forward, {backward:.1e} backward, tolerance {tolerance:.0e}"
    if not (forward <= tolerance and backward <= tolerance):  # a NaN fails this
        return CheckResult("flash-attn", "error", detail, "set model.attention=sdpa, and report it")
    return CheckResult("flash-attn", "ok", detail)


def check_operators(probe: dict[str, Any], on_gpus: bool) -> CheckResult:
    """Check that DeepSpeed's operators are compiled, or can be at the first start of ZeRO."""
    if compiled := probe.get("operators", []):
        return CheckResult("operators", "ok", f"compiled: {', '.join(compiled)}")
    if probe.get("compiler"):
        return CheckResult("operators", "ok", "compiled at the first start of ZeRO")
    user = "CPU offload" if on_gpus else "ZeRO on the CPU"
    fix = f"install g++ and python3-dev to use {user}"
    return CheckResult("operators", "warning", "not compiled, and no C++ compiler with Python's headers", fix)


def check_rdma(gpus: int, nodes: int) -> CheckResult:
    """Check that NCCL can use the machine's RDMA adapters; an error only for several nodes."""
    adapters = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    if not adapters:
        return CheckResult("RDMA", "ok", "no adapter")
    listed = ", ".join(adapters)
    problem = _rdma_problem() if gpus else None
    if problem is None:
        return CheckResult("RDMA", "ok", listed)
    detail, fix = problem
    return CheckResult("RDMA", "error" if nodes > 1 else "warning", f"{listed}, but {detail}", fix)


def _rdma_problem() -> tuple[str, str] | None:
    """Return why this process cannot use RDMA, and the fix."""
    import resource

    if not Path("/dev/infiniband").is_dir():
        return "/dev/infiniband is missing", "give it to the container: --device /dev/infiniband"
    if not _can_load("libibverbs.so.1"):
        return "libibverbs is missing", "install libibverbs1 and ibverbs-providers"
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] not in (resource.RLIM_INFINITY, -1):
        return "locked memory is limited", "--ulimit memlock=-1 (ulimit -l unlimited)"
    return None


def _can_load(library: str) -> bool:
    import ctypes

    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def check_shared_memory(free_bytes: int | None, gpus: int) -> CheckResult:
    """Check the shared memory of NCCL and data workers."""
    if free_bytes is None:
        return CheckResult("shared memory", "error", "no /dev/shm", "mount it: --shm-size 16g, or --ipc host")
    detail = f"{free_bytes / GIB:.2f} GiB free in /dev/shm"
    least = GIB * max(gpus, 1) if gpus > 1 else GIB // 4
    if free_bytes < least:
        fix = f"expected {least / GIB:.2f} GiB: --shm-size 16g, or --ipc host"
        return CheckResult("shared memory", "error" if gpus > 1 else "warning", detail, fix)
    return CheckResult("shared memory", "ok", detail)


def check_host(memory_bytes: int, cores: int, gpus: int) -> CheckResult:
    """Check the cores that this process may use against the number of GPUs."""
    detail = f"{memory_bytes / GIB:.0f} GiB of memory, {cores} cores"
    if cores < gpus:
        return CheckResult("host", "error", detail, f"{gpus} ranks share them; give the job all cores of the node")
    return CheckResult("host", "ok", detail)


def check_disk(name: str, path: Path, on_gpus: bool) -> CheckResult:
    """Check free space and write permission of the folder of runs or of the Hub cache."""
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        fix = "set RUNS_DIR=… (or HF_HOME=…), or change its owner"
        return CheckResult(f"disk: {name}", "error", f"{existing} is not writable", fix)
    free = shutil.disk_usage(existing).free
    detail = f"{free / GIB:.0f} GiB free in {path}"
    least = 100 * GIB if on_gpus else GIB
    if free < least:
        fix = f"expected {least / GIB:.0f} GiB: free space; `make plan` prints the size of a run"
        return CheckResult(f"disk: {name}", "warning" if on_gpus else "error", detail, fix)
    return CheckResult(f"disk: {name}", "ok", detail)


def check_hub(answer: dict[str, Any]) -> Iterator[CheckResult]:
    """Check the Hub, its token, and this machine's clock against the Hub's."""
    if answer.get("offline"):
        yield CheckResult("Hub", "ok", "not checked: HF_HUB_OFFLINE is set")
        return
    if "error" in answer:
        fix = "download models and data first (`make download`), and set HF_HUB_OFFLINE=1"
        yield CheckResult("Hub", "warning", f"no answer ({answer['error']})", fix)
        return
    if answer["status"] == 401:
        fix = "create one: https://huggingface.co/settings/tokens"
        yield CheckResult("Hub", "error", "HF_TOKEN is not valid", fix)
    elif answer["status"] >= 400:
        fix = "try again, or download models first (`make download`)"
        yield CheckResult("Hub", "warning", f"HTTP status {answer['status']}", fix)
    else:
        token = "HF_TOKEN is valid" if answer["token"] else "no HF_TOKEN: gated models are unavailable"
        yield CheckResult("Hub", "ok", f"reachable; {token}")
    if answer.get("date") is not None:
        offset = answer["now"] - answer["date"]
        status: Status = "ok" if abs(offset) < _MAX_CLOCK_SECONDS else "error"
        fix = "" if status == "ok" else "set it (timedatectl set-ntp true): certificates and tokens depend on it"
        yield CheckResult("clock", status, f"{offset:+.0f} s from the Hub's", fix)


def check_versions(torch_build: str) -> CheckResult:
    """Check the installed packages against the lock."""
    differ, missing = [], []
    for name, version in locked(torch_build).items():
        installed = library_version(name)
        if installed == "not installed":
            missing.append(name)
        elif installed != version:
            differ.append(f"{name} {installed}, expected {version}")
    if missing:
        return CheckResult("versions", "error", f"not installed: {', '.join(missing)}", "run make setup")
    if differ:
        return CheckResult("versions", "warning", "; ".join(differ), "run make setup to install the locked versions")
    return CheckResult("versions", "ok", f"{len(locked(torch_build))} packages as locked")


def locked(torch_build: str) -> dict[str, str]:
    """Return name and version of the packages that the lock installs on every Linux machine with this torch build."""
    lines: list[str] = []
    for name in ("common", torch_build):
        lines += (REPOSITORY / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    versions = {}
    for line in lines:
        pin = re.match(r"([\w.-]+)==(\S+)(?:\s*;\s*([^\\]*))?", line)
        if pin and (not pin[3] or pin[3].strip() in ('sys_platform == "linux"', "sys_platform == 'linux'")):
            versions[pin[1]] = pin[2]
    return versions


def _measure_all_reduce(gpus: int) -> dict[str, Any]:
    """Run `tools/allreduce_bench.py` over the GPUs, or over two CPU processes; add NCCL's transports."""
    with tempfile.TemporaryDirectory(prefix="sft-") as folder:
        ranks, report = gpus or 2, Path(folder) / "report.json"
        # Not torchrun's --standalone: its rendezvous uses this machine's host name, which need not resolve.
        rendezvous = command.Rendezvous("127.0.0.1", command.free_port("127.0.0.1"), 0)
        debug = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,GRAPH,NET", "NCCL_DEBUG_FILE": f"{folder}/nccl-%p"}
        overrides = {"OMP_NUM_THREADS": "1", **({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})}
        loopback = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        environment = {**loopback, **os.environ, **debug, **overrides}
        try:
            done = subprocess.run(
                command.allreduce_test(ranks, 1, rendezvous, report),
                capture_output=True, text=True, check=False, timeout=timeouts.ALLREDUCE_TEST, env=environment,
                cwd=REPOSITORY,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"error": f"{ranks} ranks: no all-reduce within {timeouts.ALLREDUCE_TEST:.0f} s"}
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if re.match(r"\S*(Error|Exception)\b", line.strip())]
            return {"error": f"{ranks} ranks: all-reduce failed: {errors[0].strip() if errors else 'a rank failed'}"}
        log = "\n".join(file.read_text(errors="replace") for file in Path(folder).glob("nccl-*"))
        return {**json.loads(report.read_text(encoding="utf-8")), "transports": find_transports(log)}


def _query_hub() -> dict[str, Any]:
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false", "no", "off"):
        return {"offline": True}
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    token = (os.environ.get("HF_TOKEN") or _stored_token()).strip()
    if not re.fullmatch(r"[!-~]*", token):  # urllib's error for an invalid header would print the token
        return {"status": 401, "token": True, "date": None}
    request = urllib.request.Request(f"{endpoint}/api/{'whoami-v2' if token else 'models?limit=1'}")
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=timeouts.HUB_REQUEST) as response:
            status, headers = response.status, response.headers
    except urllib.error.HTTPError as error:
        status, headers = error.code, error.headers
    except ValueError:
        return {"error": f"HF_ENDPOINT={endpoint} is not a URL"}
    except OSError as error:
        return {"error": str(getattr(error, "reason", error)) or type(error).__name__}
    date = email.utils.parsedate_to_datetime(headers["Date"]).timestamp() if headers.get("Date") else None
    return {"status": status, "token": bool(token), "date": date, "now": time.time()}


def _stored_token() -> str:
    file = Path(os.environ.get("HF_TOKEN_PATH") or hf_home() / "token")
    return file.read_text(encoding="utf-8").strip() if file.is_file() and os.access(file, os.R_OK) else ""


def _free_bytes(path: Path) -> int | None:
    return shutil.disk_usage(path).free if path.is_dir() else None
