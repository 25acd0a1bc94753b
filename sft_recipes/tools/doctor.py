"""Says whether this machine, or this container, is fit to train: a finding a check, green, yellow or red, with the way
out."""

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
from sft_recipes.launch.node_checks import OWNED_BY_NOBODY_ELSE, Colour, Finding, all_reduce, ways
from sft_recipes.launch.topology import Gpu, hidden_gpus, nvidia_smi_error, unlisted, visible_gpus
from sft_recipes.runtime import cuda, timeouts
from sft_recipes.runtime.env import host_memory_bytes, library_version
from sft_recipes.runtime.paths import REPOSITORY
from sft_recipes.runtime.run_dir import runs_root

GIB = 2**30
_SECONDS_OF_CLOCK = 60.0


def examine(wanted_gpus: int | None) -> Iterator[Finding]:
    """Every check, in turn; `wanted_gpus` is how many a run would take, None where nobody said."""
    gpus = visible_gpus()
    seen = preflight.ask_torch(os.environ, "all")
    if error := nvidia_smi_error():
        way_out = "see dmesg; after an update of the driver, restart the machine"
        yield Finding("driver", "red", f"nvidia-smi fails ({error})", way_out)
    else:
        yield from driver(gpus, wanted_gpus, cuda.driver_version(), seen, os.environ.get("CUDA_VISIBLE_DEVICES"))
    yield from memory_of_gpus(seen.get("gpus", []))
    yield attention(seen)
    yield operators(seen, bool(gpus))
    yield all_reduce(_sum_over_ranks(len(gpus)), len(gpus), bool(os.environ.get("ALLOW_SOCKETS")))
    yield fabric(len(gpus), int(os.environ.get("NODES") or 1))
    yield shared_memory(_free_in(Path("/dev/shm")), len(gpus))
    yield host(host_memory_bytes(), len(os.sched_getaffinity(0)), len(gpus))
    yield from (disk(name, path, bool(gpus)) for name, path in (("runs", runs_root()), ("hub cache", _hub())))
    yield from hub(_ask_hub())
    yield versions("cuda" if seen.get("cuda") else "cpu")


def driver(
    gpus: Sequence[Gpu], wanted: int | None, version: str | None, seen: dict[str, Any], visible: str | None = None
) -> Iterator[Finding]:
    """The driver, the GPUs, and whether PyTorch can use them.

    Args:
        wanted: number of GPUs that a run would take; None if not said.
        version: of the driver.
        seen: the report of `training/examine.py`.
        visible: CUDA_VISIBLE_DEVICES; None if unset.
    """
    if wanted is not None and wanted > len(gpus):
        way_out = hidden_gpus() or "see nvidia-smi; in a container, give it GPUs (docker/README.md)"
        yield Finding("GPUs", "red", f"{len(gpus) or 'none'}, and {wanted} are wanted", way_out)
    elif gpus:
        yield Finding(
            "GPUs", "green", ", ".join(f"{gpu.id}: {gpu.name}, {gpu.memory_mib / 1024:.0f} GiB" for gpu in gpus)
        )
    else:
        yield Finding("GPUs", "green", "none: recipes for the CPU")
    if not gpus:
        return
    for product in unlisted(gpus):
        fix = "set GPU_TYPE to one of docs/models.md to forecast hours"
        yield Finding("GPU type", "yellow", f"{product} is not in the table: planned by its memory, without hours", fix)
    yield Finding("driver", "green", version or "version unknown: nvidia-smi does not report it")
    if "error" in seen:
        return
    if found := cuda.problem(seen, len(gpus), version, visible):
        yield Finding("CUDA", "red", *found)
    else:
        yield Finding("CUDA", "green", f"PyTorch {seen['torch']} with CUDA {seen['cuda']} finds {seen['devices']}")


def memory_of_gpus(gpus: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    """What others hold of the GPUs, where it is much."""
    for index, gpu in enumerate(gpus):
        held = gpu["total"] - gpu["free"]
        if held > OWNED_BY_NOBODY_ELSE:
            found = f"GPU {index}: {held / GIB:.1f} of {gpu['total'] / GIB:.1f} GiB are taken"
            yield Finding("GPU memory", "yellow", found, "`nvidia-smi` lists by whom; or take others: DEVICES=…")
    if gpus and all(gpu["total"] - gpu["free"] <= OWNED_BY_NOBODY_ELSE for gpu in gpus):
        yield Finding("GPU memory", "green", "free")


# What CUDA and flash-attn report if flash-attn was compiled for other GPUs than this one.
_NO_KERNEL = re.compile("no kernel image is available|invalid device function|only supports Ampere GPUs or newer")


def attention(seen: dict[str, Any]) -> Finding:
    """Whether flash-attn is there and right."""
    if "error" in seen:
        return Finding("torch", "red", seen["error"], "make setup installs the locked packages")
    looked = seen["flash_attention"]
    if looked is None:
        return Finding("flash-attn", "green", "not looked at: it needs a GPU; torch's own attention is used")
    if "missing" in looked:
        way_out = "torch's own attention is used; the image has it (make image)"
        return Finding("flash-attn", "yellow", f"not there ({looked['missing']})", way_out)
    if "error" in looked and _NO_KERNEL.search(looked["error"]):
        capabilities = sorted({gpu["capability"] for gpu in seen.get("gpus", [])})
        said = f"it has no kernel for compute capability {' or '.join(capabilities)}; torch's own attention is used"
        fix = f"rebuild it with CUDA_ARCHITECTURES='{';'.join(capabilities)}' to use it (docker/README.md)"
        return Finding("flash-attn", "yellow", said, "it needs Ampere or newer" if "Ampere" in looked["error"] else fix)
    if "error" in looked:
        return Finding("flash-attn", "red", looked["error"], "build it for this GPU: docker/README.md")
    said = f"off by {looked['forward']:.1e} forward, {looked['backward']:.1e} backward, of {looked['tolerance']:.0e}"
    # Written so that a NaN is no pass.
    if not (looked["forward"] <= looked["tolerance"] and looked["backward"] <= looked["tolerance"]):
        return Finding("flash-attn", "red", f"{said} that are allowed", "say model.attention=sdpa, and report it")
    return Finding("flash-attn", "green", said)


def operators(seen: dict[str, Any], on_gpus: bool) -> Finding:
    """Whether ZeRO has what it compiles at its first start, or can compile it."""
    built = seen.get("operators", [])
    if built:
        return Finding("operators", "green", f"compiled: {', '.join(built)}")
    if seen.get("compiler"):
        return Finding("operators", "green", "compiled at the first start under ZeRO")
    needs = "offloading" if on_gpus else "ZeRO on the CPU"
    way_out = f"install g++ and python3-dev where {needs} is wanted"
    return Finding("operators", "yellow", "not compiled, and no C++ compiler with Python's headers", way_out)


def fabric(gpus: int, nodes: int) -> Finding:
    """Whether NCCL can use an adapter for RDMA that the machine has; it matters between nodes."""
    adapters = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    if not adapters:
        return Finding("RDMA", "green", "no adapter")
    here = ", ".join(adapters)
    wrong = _wrong_with_rdma() if gpus else None
    if wrong is None:
        return Finding("RDMA", "green", here)
    found, way_out = wrong
    return Finding("RDMA", "red" if nodes > 1 else "yellow", f"{here}, but {found}", way_out)


def _wrong_with_rdma() -> tuple[str, str] | None:
    """What keeps this process from it, and the way out."""
    import resource

    if not Path("/dev/infiniband").is_dir():
        return "no /dev/infiniband here", "give it to the container: --device /dev/infiniband"
    if not _loads("libibverbs.so.1"):
        return "no libibverbs", "install libibverbs1 and ibverbs-providers"
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] not in (resource.RLIM_INFINITY, -1):
        return "locked memory is limited", "--ulimit memlock=-1 (ulimit -l unlimited)"
    return None


def _loads(library: str) -> bool:
    import ctypes

    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def shared_memory(number_bytes: int | None, gpus: int) -> Finding:
    """What NCCL and data workers share."""
    if number_bytes is None:
        return Finding("shared memory", "red", "no /dev/shm", "mount it: --shm-size 16g, or --ipc host")
    said = f"{number_bytes / GIB:.2f} GiB free in /dev/shm"
    least = GIB * max(gpus, 1) if gpus > 1 else GIB // 4
    if number_bytes < least:
        way_out = f"{least / GIB:.2f} GiB are wanted: --shm-size 16g, or --ipc host"
        return Finding("shared memory", "red" if gpus > 1 else "yellow", said, way_out)
    return Finding("shared memory", "green", said)


def host(memory: int, cores: int, gpus: int) -> Finding:
    """The machine's own memory, and the cores that this process may use."""
    said = f"{memory / GIB:.0f} GiB of memory, {cores} cores"
    if cores < gpus:
        return Finding("host", "red", said, f"{gpus} ranks share them; give the job all of the node's cores")
    return Finding("host", "green", said)


def disk(name: str, path: Path, on_gpus: bool) -> Finding:
    """Room and permission where runs, or models of the Hub, are kept."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding(
            f"disk: {name}", "red", f"{there} cannot be written", "say RUNS_DIR=… (or HF_HOME=…), or make it yours"
        )
    free = shutil.disk_usage(there).free
    said = f"{free / GIB:.0f} GiB free in {path}"
    least = 100 * GIB if on_gpus else GIB
    if free < least:
        way_out = f"make room; `make plan` says what a run takes (wanted here: {least / GIB:.0f} GiB)"
        return Finding(f"disk: {name}", "yellow" if on_gpus else "red", said, way_out)
    return Finding(f"disk: {name}", "green", said)


def hub(answer: dict[str, Any]) -> Iterator[Finding]:
    """The Hub, its token, and this machine's clock, by the Hub's own."""
    if answer.get("offline"):
        yield Finding("Hub", "green", "not asked: HF_HUB_OFFLINE is set")
        return
    if "error" in answer:
        way_out = "bring models and data beforehand (`make download`), and set HF_HUB_OFFLINE=1"
        yield Finding("Hub", "yellow", f"no answer ({answer['error']})", way_out)
        return
    if answer["status"] == 401:
        yield Finding(
            "Hub", "red", "it does not know this HF_TOKEN", "make another: https://huggingface.co/settings/tokens"
        )
    elif answer["status"] >= 400:
        yield Finding(
            "Hub", "yellow", f"it answers with {answer['status']}", "try again, or bring models with `make download`"
        )
    else:
        token = "its token is good" if answer["token"] else "no HF_TOKEN: models that are not gated"
        yield Finding("Hub", "green", f"answers; {token}")
    if answer.get("date") is not None:
        off = answer["now"] - answer["date"]
        colour: Colour = "green" if abs(off) < _SECONDS_OF_CLOCK else "red"
        way_out = "" if colour == "green" else "set it (timedatectl set-ntp true): certificates and tokens depend on it"
        yield Finding("clock", colour, f"{off:+.0f} s off the Hub's", way_out)


def versions(torch_build: str) -> Finding:
    """Installed packages against the lock."""
    other, missing = [], []
    for name, version in locked(torch_build).items():
        here = library_version(name)
        if here == "not installed":
            missing.append(name)
        elif here != version:
            other.append(f"{name} {here} instead of {version}")
    if missing:
        return Finding("versions", "red", f"not installed: {', '.join(missing)}", "make setup")
    if other:
        return Finding("versions", "yellow", "; ".join(other), "make setup installs the locked ones")
    return Finding("versions", "green", f"the lock's {len(locked(torch_build))} packages")


def locked(torch_build: str) -> dict[str, str]:
    """Name and version of the packages that the lock has for every Linux machine with this build of torch."""
    lines: list[str] = []
    for name in ("common", torch_build):
        lines += (REPOSITORY / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    found = {}
    for line in lines:
        pinned = re.match(r"([\w.-]+)==(\S+)(?:\s*;\s*([^\\]*))?", line)
        if pinned and (not pinned[3] or pinned[3].strip() in ('sys_platform == "linux"', "sys_platform == 'linux'")):
            found[pinned[1]] = pinned[2]
    return found


def _sum_over_ranks(gpus: int) -> dict[str, Any]:
    """What `training/links.py` measures over the GPUs, or over two processes on the CPU, and NCCL's ways."""
    with tempfile.TemporaryDirectory(prefix="sft-") as place:
        ranks, result = gpus or 2, Path(place) / "result.json"
        # Not torchrun's --standalone: its ranks meet at this machine's own name, which need not resolve.
        meeting = command.Rendezvous("127.0.0.1", command.free_port("127.0.0.1"), 0)
        debug = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,GRAPH,NET", "NCCL_DEBUG_FILE": f"{place}/nccl-%p"}
        quiet = {"OMP_NUM_THREADS": "1", **({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})}
        loopback = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        environment = {**loopback, **os.environ, **debug, **quiet}
        done = _run(command.links(ranks, 1, meeting, result), timeouts.ALLREDUCE_TEST, environment)
        if done is None:
            return {"error": f"{ranks} ranks did not sum within {timeouts.ALLREDUCE_TEST:.0f} s"}
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if re.match(r"\S*(Error|Exception)\b", line.strip())]
            return {"error": f"{ranks} ranks cannot sum: {said[0].strip() if said else 'they end with an error'}"}
        log = "\n".join(file.read_text(errors="replace") for file in Path(place).glob("nccl-*"))
        return {**json.loads(result.read_text(encoding="utf-8")), "ways": ways(log)}


def _ask_hub() -> dict[str, Any]:
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false", "no", "off"):
        return {"offline": True}
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    token = (os.environ.get("HF_TOKEN") or _stored_token()).strip()
    if not re.fullmatch(r"[!-~]*", token):  # what is said of a header that cannot be has it whole
        return {"status": 401, "token": True, "date": None}
    request = urllib.request.Request(f"{endpoint}/api/{'whoami-v2' if token else 'models?limit=1'}")
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=timeouts.HUB_REQUEST) as answer:
            status, headers = answer.status, answer.headers
    except urllib.error.HTTPError as error:
        status, headers = error.code, error.headers
    except ValueError:
        return {"error": f"HF_ENDPOINT={endpoint} is no address"}
    except OSError as error:
        return {"error": str(getattr(error, "reason", error)) or type(error).__name__}
    date = email.utils.parsedate_to_datetime(headers["Date"]).timestamp() if headers.get("Date") else None
    return {"status": status, "token": bool(token), "date": date, "now": time.time()}


def _stored_token() -> str:
    file = Path(os.environ.get("HF_TOKEN_PATH") or _hub() / "token")
    return file.read_text(encoding="utf-8").strip() if file.is_file() and os.access(file, os.R_OK) else ""


def _hub() -> Path:
    return Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")


def _free_in(path: Path) -> int | None:
    return shutil.disk_usage(path).free if path.is_dir() else None


def _run(
    command: list[str], seconds: float = 60.0, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str] | None:
    """How a command ended; None where it is not there, or did not end in time."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=seconds, env=environment, cwd=REPOSITORY
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
