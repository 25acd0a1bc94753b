"""The checks of `doctor`, on this machine and on reports of others."""

import json
import math
import re
import subprocess
import sys

import pytest
from helpers.workplace import REPOSITORY

from sft_recipes.launch import node_checks, topology
from sft_recipes.launch.topology import Gpu
from sft_recipes.tools import doctor

GPUS = [Gpu("0", 81559, "NVIDIA H100 80GB HBM3", 9.0), Gpu("1", 81559, "NVIDIA H100 80GB HBM3", 9.0)]
PROBE = {"torch": "2.13.0+cu130", "cuda": "13.0", "devices": 2, "warning": ""}


def test_doctor_fails_without_the_requested_gpus(workplace):
    """Eight GPUs are requested where none is visible; every other check is as on this machine."""
    done = workplace.sft("doctor", "--json", "--gpus", "8", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    results = {result["check"]: result for result in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 1, done.stdout + done.stderr
    assert {check for check, result in results.items() if result["status"] == "error"} == {"GPUs"}
    assert results["GPUs"]["detail"] == "found none, expected 8" and "nvidia-smi" in results["GPUs"]["fix"]
    assert {"flash-attn", "operators", "shared memory", "disk: runs", "disk: hub cache"} <= results.keys()
    assert "over 2 ranks (gloo)" in results["all-reduce"]["detail"]
    assert results["versions"]["status"] == "ok" and "packages" in results["versions"]["detail"]
    assert results["Hub"]["detail"] == "not checked: HF_HUB_OFFLINE is set"
    done = workplace.sft("doctor", "--gpus", "many")
    assert done.returncode == 2 and done.stderr.startswith("error: GPUS: found 'many', expected an integer")


@pytest.mark.parametrize(
    ("probe", "version", "status", "text"),
    [
        (PROBE, "580.65.06", "ok", "PyTorch 2.13.0+cu130 with CUDA 13.0 finds 2"),
        ({**PROBE, "devices": 1}, "580.65.06", "error", "PyTorch finds 1; See `nvidia-smi -L`"),
        ({**PROBE, "devices": 0}, "535.183.01", "error", "found NVIDIA driver 535.183.01, expected 580 or newer"),
        ({**PROBE, "cuda": None}, "580.65.06", "error", "is a CPU build, expected a CUDA build"),
    ],
)
def test_check_driver(probe, version, status, text):
    last = list(doctor.check_driver(GPUS, 2, version, probe))[-1]
    assert (last.check, last.status) == ("CUDA", status) and text in str(last)


def test_occupied_gpus_are_named(monkeypatch):
    monkeypatch.setattr(node_checks, "ask_nvidia", lambda _: [["0", "512"], ["1", "61440"], ["2", "[N/A]"]])
    assert node_checks.occupied_gpus(GPUS) == ["GPU 1: 60.0 GiB"] and not node_checks.occupied_gpus(GPUS[:1])


@pytest.mark.parametrize(
    ("report", "status"),
    [
        (None, "ok"),
        ({"missing": "No module named 'flash_attn'"}, "warning"),
        ({"error": "flash_attn_2_cuda.so: undefined symbol: _ZNK3c106SymInt6sym_neERKS0_", "loads": False}, "error"),
        ({"error": "CUDA error: no kernel image is available for execution on the device", "loads": True}, "warning"),
        ({"forward": 4e-3, "backward": 8e-3, "tolerance": 3e-2}, "ok"),
        ({"forward": 4e-3, "backward": 0.4, "tolerance": 3e-2}, "error"),
        ({"forward": math.nan, "backward": 8e-3, "tolerance": 3e-2}, "error"),
    ],
)
def test_check_flash_attention(report, status):
    result = doctor.check_flash_attention({"flash_attention": report})
    assert result.status == status and (status == "ok" or result.fix)


def test_check_flash_attention_names_gpu_without_kernel():
    """`model.attention: auto` skips it."""
    gpus = [{"capability": "8.9"}, {"capability": "12.0"}, {"capability": "8.9"}]
    report = {"error": "FlashAttention only supports Ampere GPUs or newer.", "loads": True}
    result = doctor.check_flash_attention({"flash_attention": report, "gpus": gpus})
    assert result.status == "warning" and "CUDA_ARCHITECTURES='12.0;8.9'" in result.fix
    assert "cannot run on compute capability 12.0;8.9 (FlashAttention only supports Ampere" in result.detail


# Lines as NCCL 2.2x writes them at NCCL_DEBUG=INFO.
LOGS = {
    "P2P": "node:1:9 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read",
    "shared memory": "node:1:9 [0] NCCL INFO Channel 00 : 0[0] -> 1[1] via SHM/direct/direct",
    "InfiniBand or RoCE": "node:1:9 [0] NCCL INFO Channel 00/0 : 8[0] -> 0[0] [receive] via NET/IB/0/GDRDMA",
    "TCP sockets": "node:1:9 [0] NCCL INFO Channel 00/0 : 1[0] -> 0[0] [receive] via NET/Socket/0",
    "network plugin": "node:1:9 [0] NCCL INFO Channel 00/0 : 1[0] -> 0[0] [send] via NET/AWS Libfabric/0/GDRDMA",
    "NVLink SHARP": "node:1:9 [0] NCCL INFO NVLS multicast support is available on dev 0",
    "transport not in the NCCL log": "node:1:9 [0] NCCL INFO NVLS multicast support is not available on dev 0",
}


@pytest.mark.parametrize(
    ("transport", "status"), [(transport, "error" if transport == "TCP sockets" else "ok") for transport in LOGS]
)
def test_all_reduce_check_reports_the_transport(transport, status, tmp_path):
    (tmp_path / "nccl-9").write_text(f"node:1:9 [0] NCCL INFO Using network Socket\n{LOGS[transport]}\n")
    transports = node_checks.read_transports(str(tmp_path))
    assert transports == [transport] or (transports == [] and transport == "transport not in the NCCL log")
    measured = {"backend": "nccl", "ranks": 2, "correct": True, "bytes_per_second": 3e11, "transports": transports}
    result = node_checks.all_reduce(measured, 2)
    assert result.status == status and f"300.0 GB/s over 2 ranks (nccl), {transport}" in str(result)
    allowed = node_checks.all_reduce(measured, 2, sockets_allowed=True)
    assert allowed.status == ("ok" if status == "error" else status)


def test_failing_nvidia_smi_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho Failed to initialize NVML: version mismatch\nexit 18\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert topology.nvidia_smi_error() == "Failed to initialize NVML: version mismatch"
    monkeypatch.setattr(node_checks, "probe_torch", lambda *_: {"error": "not run"})
    result = next(doctor.run_checks(None))
    assert (result.check, result.status) == ("driver", "error") and "Failed to initialize NVML" in result.detail
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert topology.nvidia_smi_error() == ""


def test_failed_all_reduce_is_an_error():
    assert node_checks.all_reduce({"correct": False}, 2).status == "error"
    assert "NCCL error" in str(node_checks.all_reduce({"error": "8 ranks: all-reduce failed: NCCL error"}, 8))


def test_check_space_and_versions(tmp_path, monkeypatch):
    place = tmp_path / "not" / "yet"
    assert doctor.check_space("disk: runs", place, 1, "error", "free space").status == "ok"
    assert str(doctor.check_space("disk: runs", place, 2**60, "error", "free space")).startswith("error ")
    monkeypatch.setattr(doctor, "locked", lambda build: {"torch": "1.0", "no-such-package": "1"})
    assert "no-such-package not installed, expected 1" in str(result := doctor.check_versions("cpu"))
    assert result.status == "error"
    monkeypatch.setattr(doctor, "locked", lambda build: {"transformers": "1.0"})
    assert doctor.check_versions("cpu").status == "warning" and ", expected 1.0" in str(doctor.check_versions("cpu"))


def test_check_hub_sends_the_token_and_never_prints_it(tmp_path):
    """A local server replaces the Hub."""
    server = tmp_path / "hub.py"
    server.write_text(
        "import http.server, sys\n"
        "class Hub(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        token = self.headers['Authorization']\n"
        "        known = (token, self.path) in (('Bearer good', '/api/whoami-v2'), (None, '/api/models?limit=1'))\n"
        "        self.send_response(200 if known else 503 if token == 'Bearer busy' else 401)\n"
        "        self.end_headers()\n"
        "    def log_message(self, *_): pass\n"
        "server = http.server.HTTPServer(('127.0.0.1', 0), Hub)\n"
        "print(server.server_port, flush=True)\n"
        "server.serve_forever()\n"
    )
    program = (
        "import os, sys; from sft_recipes.tools import doctor\n"
        "for token in sys.argv[1:]:\n"
        "    os.environ['HF_TOKEN'] = token; print(doctor.check_hub())\n"
        "from huggingface_hub import constants\n"
        "constants.ENDPOINT = 'http://127.0.0.1:9'; print(doctor.check_hub())\n"
        "constants.ENDPOINT = 'no URL'; print(doctor.check_hub())\n"
        "constants.HF_HUB_OFFLINE = True; print(doctor.check_hub())\n"
    )
    process = subprocess.Popen([sys.executable, server], stdout=subprocess.PIPE, text=True)
    try:
        environment = {
            "PATH": "/usr/bin", "HF_ENDPOINT": f"http://127.0.0.1:{process.stdout.readline().strip()}",
            "HF_HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY),
        }  # fmt: skip
        tokens = ("good", "", "bad-secret", "busy", "hf_secret\r", "hf_s\x7fecret", "hf_sécret")
        done = subprocess.run(
            [sys.executable, "-c", program, *tokens], env=environment, capture_output=True, text=True, check=True
        )
    finally:
        process.kill()
        process.wait()
    lines = done.stdout.splitlines()
    expected = [
        "ok .*reachable; HF_TOKEN is valid", "ok .*no HF_TOKEN: gated models are unavailable", "error .*HF_TOKEN is not valid",
        r"warning .*no answer \(503\)", "error .*not valid", "error|warning", "error|warning", "warning .*no answer",
        "warning .*no answer", "ok .*not checked",
    ]  # fmt: skip
    assert len(lines) == len(expected), done.stdout
    assert [line for line, pattern in zip(lines, expected, strict=True) if not re.match(pattern, line)] == []
    assert "secret" not in done.stdout + done.stderr and "sécret" not in done.stdout + done.stderr
