"""What `doctor` says of a machine: of this one, and of what it may be told of others."""

import json
import math
import subprocess
import sys
import time

import pytest
from helpers.workplace import REPOSITORY

from sft_recipes.config import loader
from sft_recipes.launch import healthcheck, node_checks, topology
from sft_recipes.launch.topology import Gpu
from sft_recipes.planner import plan as plans
from sft_recipes.runtime import heartbeat
from sft_recipes.runtime.heartbeat import Heartbeat
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.tools import doctor

CARDS = [Gpu("0", 81559, "NVIDIA H100 80GB HBM3", 9.0), Gpu("1", 81559, "NVIDIA H100 80GB HBM3", 9.0)]
SEEN = {"torch": "2.13.0+cu130", "cuda": "13.0", "devices": 2, "warning": ""}


def test_this_machine_is_examined_and_what_is_red_is_the_exit_code(workplace):
    """Eight GPUs are wanted where none can be seen; all else is as it is."""
    done = workplace.sft("doctor", "--json", "--gpus", "8", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    found = {one["check"]: one for one in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 1, done.stdout + done.stderr
    assert {check for check, one in found.items() if one["colour"] == "red"} == {"GPUs"}
    assert found["GPUs"]["found"] == "none, and 8 are wanted" and "nvidia-smi" in found["GPUs"]["way_out"]
    assert {"flash-attn", "operators", "shared memory", "host", "disk: runs", "disk: hub cache"} <= found.keys()
    assert "over 2 ranks (gloo)" in found["all-reduce"]["found"]
    assert found["versions"]["colour"] == "green" and "packages" in found["versions"]["found"]
    assert found["Hub"]["found"] == "not asked: HF_HUB_OFFLINE is set"
    refused = workplace.sft("doctor", "--gpus", "many")
    assert refused.returncode == 2 and refused.stderr.startswith("error: GPUS: 'many'")


@pytest.mark.parametrize(
    ("seen", "version", "colour", "says"),
    [
        (SEEN, "580.65.06", "green", "PyTorch 2.13.0+cu130 with CUDA 13.0 finds 2"),
        ({**SEEN, "devices": 1}, "580.65.06", "red", "PyTorch finds 1; See `nvidia-smi -L`"),
        ({**SEEN, "devices": 0}, "535.183.01", "red", "found NVIDIA driver 535.183.01, expected 580 or newer"),
        ({**SEEN, "cuda": None}, "580.65.06", "red", "is a CPU build, expected a CUDA build"),
    ],
)
def test_driver_and_cuda_go_together(seen, version, colour, says):
    last = list(doctor.driver(CARDS, 2, version, seen))[-1]
    assert (last.check, last.colour) == ("CUDA", colour) and says in str(last)


def test_a_gpu_that_is_not_in_the_table_is_reported():
    other = Gpu("0", 60_000, "NVIDIA Graphics Device", 11.0)
    found = [line for line in doctor.driver([other], 1, "580.65.06", SEEN) if line.check == "GPU type"]
    assert [line.colour for line in found] == ["yellow"] and "NVIDIA Graphics Device is not in the table" in str(
        found[0]
    )
    assert not any(line.check == "GPU type" for line in doctor.driver(CARDS, 2, "580.65.06", SEEN))


def test_memory_that_others_hold_is_named():
    gib = 2**30
    (one,) = doctor.memory_of_gpus([{"total": 80 * gib, "free": 79.5 * gib}, {"total": 80 * gib, "free": 20 * gib}])
    assert one.colour == "yellow" and "GPU 1: 60.0 of 80.0 GiB are taken" in str(one)


@pytest.mark.parametrize(
    ("looked", "colour"),
    [
        (None, "green"),
        ({"missing": "No module named 'flash_attn'"}, "yellow"),
        ({"error": "flash_attn_2_cuda.so: undefined symbol: _ZNK3c106SymInt6sym_neERKS0_"}, "red"),
        ({"forward": 4e-3, "backward": 8e-3, "tolerance": 3e-2}, "green"),
        ({"forward": 4e-3, "backward": 0.4, "tolerance": 3e-2}, "red"),
        ({"forward": math.nan, "backward": 8e-3, "tolerance": 3e-2}, "red"),
    ],
)
def test_flash_attention_must_be_right_where_it_is(looked, colour):
    finding = doctor.attention({"flash_attention": looked})
    assert finding.colour == colour and (colour == "green" or finding.way_out)


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        ("CUDA error: no kernel image is available for execution on the device", "CUDA_ARCHITECTURES='12.0;8.9'"),
        ("CUDA error: invalid device function", "CUDA_ARCHITECTURES='12.0;8.9'"),
        ("FlashAttention only supports Ampere GPUs or newer.", "it needs Ampere or newer"),
    ],
)
def test_a_gpu_that_flash_attention_has_no_kernel_for_can_train(error, fix):
    """`model.attention: auto` passes it over."""
    gpus = [{"capability": "8.9"}, {"capability": "12.0"}, {"capability": "8.9"}]
    finding = doctor.attention({"flash_attention": {"error": error}, "gpus": gpus})
    assert finding.colour == "yellow" and fix in finding.way_out
    assert "no kernel for compute capability 12.0 or 8.9; torch's own attention is used" in finding.found


# Lines as NCCL 2.2x writes them at NCCL_DEBUG=INFO.
LOGS = {
    "direct": "node:1:9 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read",
    "shared memory": "node:1:9 [0] NCCL INFO Channel 00 : 0[0] -> 1[1] via SHM/direct/direct",
    "InfiniBand or RoCE": "node:1:9 [0] NCCL INFO Channel 00/0 : 8[0] -> 0[0] [receive] via NET/IB/0/GDRDMA",
    "plain sockets": "node:1:9 [0] NCCL INFO Channel 00/0 : 1[0] -> 0[0] [receive] via NET/Socket/0",
    "a plugin's network": "node:1:9 [0] NCCL INFO Channel 00/0 : 1[0] -> 0[0] [send] via NET/AWS Libfabric/0/GDRDMA",
    "NVLink's switch": "node:1:9 [0] NCCL INFO NVLS multicast support is available on dev 0",
    "by a way that its log does not tell": "node:1:9 [0] NCCL INFO NVLS multicast support is not available on dev 0",
}


@pytest.mark.parametrize(
    ("way", "colour"), list(zip(LOGS, ("green", "yellow", "green", "red", "green", "green", "yellow"), strict=True))
)
def test_the_way_that_nccl_chose_is_told_and_judged(way, colour):
    ways = node_checks.ways(f"node:1:9 [0] NCCL INFO Using network Socket\n{LOGS[way]}\n")
    assert ways == [way] or (ways == [] and way.startswith("by a way"))
    measured = {"backend": "nccl", "ranks": 2, "right": True, "bytes_a_second": 3e11, "ways": ways}
    finding = node_checks.all_reduce(measured, 2)
    assert finding.colour == colour and f"300.0 GB/s over 2 ranks (nccl), {way}" in str(finding)
    assert node_checks.all_reduce(measured, 2, sockets_allowed=True).colour == ("green" if colour == "red" else colour)


def test_rdma_that_cannot_be_used_matters_between_nodes(monkeypatch):
    monkeypatch.setattr(doctor.Path, "glob", lambda self, pattern: iter([doctor.Path("mlx5_0")]))
    monkeypatch.setattr(doctor, "_wrong_with_rdma", lambda: ("no libibverbs", "install it"))
    assert [doctor.fabric(*asked).colour for asked in ((0, 1), (8, 1), (8, 2))] == ["green", "yellow", "red"]


def test_a_driver_that_does_not_answer_is_red(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho Failed to initialize NVML: version mismatch\nexit 18\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert topology.nvidia_smi_error() == "Failed to initialize NVML: version mismatch"
    monkeypatch.setattr(doctor.preflight, "ask_torch", lambda *_: {"error": "not asked"})
    found = next(doctor.examine(None))
    assert (found.check, found.colour) == ("driver", "red") and "Failed to initialize NVML" in found.found
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert topology.nvidia_smi_error() is None


@pytest.mark.parametrize("token", ["hf_secret\r", "hf_secret\n", "hf_\x00secret", "hf_sécret"])
def test_a_token_that_cannot_be_sent_is_not_told(monkeypatch, token):
    monkeypatch.setattr(doctor.os, "environ", {"HF_TOKEN": token, "HF_ENDPOINT": "http://127.0.0.1:9", "PATH": ""})
    said = " ".join(map(str, doctor.hub(doctor._ask_hub())))
    assert "secret" not in said and "sécret" not in said


def test_a_sum_that_is_wrong_or_does_not_come_is_red():
    assert node_checks.all_reduce({"right": False}, 2).colour == "red"
    assert "cannot sum" in str(node_checks.all_reduce({"error": "8 ranks cannot sum: NCCL error"}, 8))


def test_shared_memory_disk_cores_and_versions(tmp_path, monkeypatch):
    gib = 2**30
    assert doctor.shared_memory(gib // 16, 8).colour == "red", "what docker gives where nothing is said"
    assert doctor.shared_memory(gib // 16, 0).colour == "yellow"
    assert doctor.shared_memory(64 * gib, 8).colour == doctor.shared_memory(gib, 0).colour == "green"
    assert doctor.shared_memory(None, 0).colour == "red"
    assert doctor.host(8 * gib, 1, 8).colour == "red"
    assert doctor.disk("runs", tmp_path / "not" / "yet", on_gpus=False).colour == "green"
    monkeypatch.setattr(doctor, "locked", lambda build: {"torch": "1.0", "no-such-package": "1"})
    assert "not installed: no-such-package" in str(doctor.versions("cpu"))
    monkeypatch.setattr(doctor, "locked", lambda build: {"transformers": "1.0"})
    assert doctor.versions("cpu").colour == "yellow" and "instead of 1.0" in str(doctor.versions("cpu"))


@pytest.mark.parametrize(
    ("answer", "colours"),
    [
        ({"offline": True}, ["green"]),
        ({"error": "timed out"}, ["yellow"]),
        ({"status": 200, "token": True, "date": 1000.0, "now": 1003.0}, ["green", "green"]),
        ({"status": 401, "token": True, "date": 1000.0, "now": 1003.0}, ["red", "green"]),
        ({"status": 503, "token": False, "date": None, "now": 1003.0}, ["yellow"]),
        ({"status": 200, "token": False, "date": 1000.0, "now": 5000.0}, ["green", "red"]),
    ],
)
def test_the_hub_its_token_and_the_clock(answer, colours):
    assert [finding.colour for finding in doctor.hub(answer)] == colours


def test_the_hub_is_asked_with_the_token_and_never_told_of_it(tmp_path):
    """A server of our own stands for the Hub."""
    server = tmp_path / "hub.py"
    server.write_text(
        "import http.server, sys\n"
        "class Hub(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        good = self.headers['Authorization'] == 'Bearer good'\n"
        "        self.send_response(200 if good and self.path == '/api/whoami-v2' else 401)\n"
        "        self.end_headers()\n"
        "    def log_message(self, *_): pass\n"
        "server = http.server.HTTPServer(('127.0.0.1', 0), Hub)\n"
        "print(server.server_port, flush=True)\n"
        "server.serve_forever()\n"
    )
    process = subprocess.Popen([sys.executable, server], stdout=subprocess.PIPE, text=True)
    try:
        endpoint = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        asked = "from sft_recipes.tools import doctor; print(*doctor.hub(doctor._ask_hub()), sep='\\n')"
        for token, says in (("good", "answers; its token is good"), ("bad-secret", "does not know this HF_TOKEN")):
            environment = {
                "PATH": "/usr/bin",
                "HF_ENDPOINT": endpoint,
                "HF_TOKEN": token,
                "PYTHONPATH": str(REPOSITORY),
            }
            done = subprocess.run(
                [sys.executable, "-c", asked], env=environment, capture_output=True, text=True, check=True
            )
            assert says in done.stdout and "clock" in done.stdout and "bad-secret" not in done.stdout
    finally:
        process.kill()
        process.wait()


def test_a_container_whose_run_hangs_is_not_healthy(tmp_path, monkeypatch):
    recipe = loader.load("tiny", ["monitor.heartbeat_timeout_seconds=60"])
    folder = RunDir(tmp_path / "tiny-1")
    folder.ranks.mkdir(parents=True)
    plans.write(plans.make(recipe, plans.Topology(gpus=0, processes=1)), folder.plan)
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    held = subprocess.Popen(  # the plan's name stands in a rank's command line
        [sys.executable, "-c", "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); "
         "print(flush=True); time.sleep(600)", folder.lock, folder.plan], stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        held.stdout.readline()
        for ago, hangs in ((1.0, False), (5000.0, True)):
            pulse = Heartbeat(0, held.pid, 7, "step", 3, time.monotonic() - ago, 0.1)
            heartbeat.place(folder.ranks, 0).write_bytes(heartbeat.to_bytes(pulse))
            said = healthcheck.hanging()
            assert bool(said) == hangs and all("tiny-1: rank 0" in line and "hangs in step 7" in line for line in said)
    finally:
        held.kill()
        held.wait()
    assert healthcheck.hanging() == [], "nobody carries it out any more"
