"""GPU behavior that can be tested without a GPU: a fake nvidia-smi (tests/helpers/fake_gpus) replaces the driver,
tests/helpers/fake_torch a CUDA build of PyTorch, and tests/helpers/simulated_cuda.py simulates CUDA for the libraries."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.recipes import SHIPPED
from helpers.simulated_cuda import STRATEGIES, cases
from helpers.workplace import HANG_SECONDS, HELPERS, REPOSITORY

from sft_recipes import cli
from sft_recipes.config import loader
from sft_recipes.launch import node_checks, topology
from sft_recipes.launch.placement import Placement
from sft_recipes.planner import plan as plans
from sft_recipes.runtime import cuda
from sft_recipes.runtime.errors import UserError
from sft_recipes.tools import doctor

pytestmark = pytest.mark.usefixtures("no_gpu_mask")

FAKES = HELPERS / "fake_gpus"
FAKE_TORCH = HELPERS / "fake_torch"

# For each GPU type of the recipes: name in nvidia-smi, memory in MiB, compute capability.
GPUS = {
    "h100-80g": ("NVIDIA H100 80GB HBM3", 81559, "9.0"),
    "a100-80g": ("NVIDIA A100-SXM4-80GB", 81920, "8.0"),
    "a100-40g": ("NVIDIA A100-SXM4-40GB", 40960, "8.0"),
    "l40s-48g": ("NVIDIA L40S", 46068, "8.9"),
    "rtx4090-24g": ("NVIDIA GeForce RTX 4090", 24564, "8.9"),
}
OTHERS = {"b200": ("NVIDIA B200", 183359, "10.0"), "unknown": ("NVIDIA Graphics Device", 60000, "11.0")}
ON_GPUS = [name for name in SHIPPED if loader.load(name).hardware.gpus]

# Report of `training/torch_probe.py` for a CUDA build that finds no GPU.
NONE = {"torch": "2.13.0+cu130", "cuda": "13.0", "devices": 0, "warning": ""}
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 12080). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)
NO_COMPATIBILITY = (
    "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling NumCudaDevices() that "
    "might have already set an error? Error 804: forward compatibility was attempted on non supported HW (Triggered "
    "internally at /pytorch/c10/cuda/CUDAFunctions.cpp:119.)"
)


def machine(gpu_type="h100-80g", gpus=8, driver="580.95.05", **more):
    """Return the environment variables of a machine with these GPUs."""
    name, memory, capability = {**GPUS, **OTHERS}[gpu_type]
    return {
        "PATH": f"{FAKES}{os.pathsep}{os.environ['PATH']}", "FAKE_GPUS": str(gpus), "FAKE_GPU_NAME": name,
        "FAKE_GPU_MEMORY": str(memory), "FAKE_GPU_CAPABILITY": capability, "FAKE_GPU_DRIVER": driver,
        "FAKE_GPU_MEMORY_USED": "4", **more,
    }  # fmt: skip


@pytest.fixture
def on(monkeypatch):
    """Set the variables of a machine with GPUs for this process."""

    def put(gpu_type="h100-80g", gpus=8, **more):
        for name, value in machine(gpu_type, gpus, **more).items():
            monkeypatch.setenv(name, value)

    return put


def error_line(done):
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stdout + done.stderr
    assert done.stderr.startswith("error: GPUS: ")
    return done.stderr


# ---- a GPU run where PyTorch cannot use the GPUs


def test_cpu_build_is_rejected_before_anything_starts(workplace):
    line = error_line(workplace.sft("train", "1b", "--gpus", "1", **machine(gpus=3)))
    assert "1 requested, but " in line, "for any build of the installed PyTorch"
    path = f"{FAKE_TORCH}{os.pathsep}{REPOSITORY}"
    done = workplace.sft("train", "1b", "--gpus", "1", **machine(gpus=3, PYTHONPATH=path, FAKE_TORCH_CUDA=""))
    assert error_line(done) == (
        "error: GPUS: 1 requested, but PyTorch 2.13.0+cpu is a CPU build, expected a CUDA build. Install it: "
        "TORCH=cuda make setup\n"
    )
    assert workplace.names() == [], done.stdout


def test_sanity_and_verify_resume_are_rejected_as_train_is(workplace, monkeypatch):
    variables = machine(gpus=1, PYTHONPATH=f"{FAKE_TORCH}{os.pathsep}{REPOSITORY}", FAKE_TORCH_CUDA="")
    assert "is a CPU build" in error_line(workplace.sft("sanity", "1b", **variables))
    run = workplace.runs / "1b-1"
    run.mkdir(parents=True)
    plans.write(plans.resolve(loader.load("1b"), plans.Topology(1, 1, gpu_type="h100-80g")), run / "plan.json")
    assert "is a CPU build" in error_line(workplace.sft("verify-resume", "1b-1", **variables))


def test_old_driver_is_rejected_unless_pytorch_can_use_the_gpus(on, monkeypatch, workplace):
    """The driver's version alone rejects nothing: with NVIDIA's forward-compatibility package 570 runs CUDA 13."""
    plan = plans.resolve(loader.load("8b"), plans.Topology(8, 8, gpu_type="h100-80g"))
    fake = {"PYTHONPATH": str(FAKE_TORCH), "FAKE_TORCH_CUDA": "13.0", "FAKE_TORCH_DEVICES": "8"}
    on(driver="570.86.15", **fake)
    node_checks.check_gpus(plan)
    assert node_checks.gpu_problem(8) is None
    none = {"FAKE_TORCH_DEVICES": "0", "FAKE_TORCH_WARNING": TOO_OLD}
    on(driver="570.86.15", **none)
    with pytest.raises(UserError, match="8 requested, but found NVIDIA driver 570.86.15, expected 580 or newer"):
        node_checks.check_gpus(plan)
    assert node_checks.gpu_problem(8)[0].startswith(
        "found NVIDIA driver 570.86.15, expected 580 or newer for CUDA 13.0"
    )
    assert node_checks.gpu_problem(0) is None, "a node without GPUs is not checked"
    path = {"PYTHONPATH": f"{FAKE_TORCH}{os.pathsep}{REPOSITORY}"}
    line = error_line(workplace.sft("train", "8b", **machine(driver="570.86.15", **{**fake, **none, **path})))
    assert (
        "8 requested, but found NVIDIA driver 570.86.15, expected 580 or newer for CUDA 13.0 (" in line
        and "Update it" in line
    )


@pytest.mark.parametrize(
    ("probe", "driver", "visible", "problem", "fix"),
    [
        ({**NONE, "devices": 8}, "570.86.15", None, None, None),
        ({**NONE, "devices": 9}, None, "0,1", None, None),
        (NONE, "570.86.15", None, "found NVIDIA driver 570.86.15, expected 580 or newer for CUDA 13.0", "Update it"),
        ({**NONE, "cuda": "12.8"}, "520.61.05", None, "expected 525 or newer for CUDA 12.8", "Update it"),
        ({**NONE, "warning": TOO_OLD}, "570.86.15", None, "expected 580 or newer for CUDA 13.0", "Update it"),
        ({**NONE, "warning": NO_COMPATIBILITY}, "570.86.15", None,
         "Error 804: forward compatibility was attempted on non supported HW)", "Update it"),
        (NONE, None, None, "found no NVIDIA driver, expected 580 or newer for CUDA 13.0", "Install it"),
        (NONE, "580.95.05", "GPU-1234", "PyTorch finds none with CUDA_VISIBLE_DEVICES='GPU-1234'", "nvidia-smi -L"),
        ({**NONE, "devices": 1}, "570.86.15", "0", "PyTorch finds 1 with CUDA_VISIBLE_DEVICES='0'", "nvidia-smi -L"),
        ({**NONE, "warning": "CUDA unknown error - this may be due to x. Setting"}, "580.95.05", None,
         "PyTorch finds none (PyTorch reports: …CUDA unknown error - this may be due to x", "dmesg"),
        ({**NONE, "cuda": None}, "580.95.05", None, "is a CPU build, expected a CUDA build", "TORCH=cuda make setup"),
        ({"error": "ImportError: libcudart.so.13"}, "580.95.05", None, "does not load (ImportError: lib", "make setup"),
    ],
)  # fmt: skip
def test_cuda_problem_names_cause_and_fix(probe, driver, visible, problem, fix):
    result = cuda.find_problem(probe, 8, driver, visible)
    assert (result is None) == (problem is None)
    if result:
        assert problem in result[0] and fix in result[1] and len(". ".join(result)) < 240


@pytest.mark.parametrize(
    ("mask", "options", "error"),
    [
        ("", ("--gpus", "1"), "1 requested, but this machine has none; CUDA_VISIBLE_DEVICES='' leaves 0 of the 4"),
        ("-1", (), "8 requested, but this machine has none; CUDA_VISIBLE_DEVICES='-1' leaves 0 of the 4"),
        ("NoDevFiles", (), "CUDA_VISIBLE_DEVICES='NoDevFiles' leaves 0 of the 4"),
        ("7", (), "CUDA_VISIBLE_DEVICES='7' leaves 0 of the 4"),
        ("0,1", ("--gpus", "4"), "4 requested, but this machine has 2; CUDA_VISIBLE_DEVICES='0,1' leaves 2 of the 4"),
        (None, ("--gpus", "8"), "8 requested, but this machine has 4; set GPUS=4"),
    ],
)
def test_hidden_gpus_are_named(on, monkeypatch, capsys, mask, options, error):
    on(gpus=4)
    if mask is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    assert cli.main(["train", "8b", *options, "--dry-run"]) == 2
    assert error in capsys.readouterr().err


def test_driver_that_is_broken_is_named(on, monkeypatch, tmp_path):
    on(gpus=0)
    assert topology.hidden_gpus().startswith("nvidia-smi fails (No devices were found): see dmesg")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert topology.hidden_gpus() == "" and cuda.driver_version() is None


def test_setup_keeps_the_build_of_an_existing_environment(tmp_path):
    """A login node without a driver and nodes with GPUs may share it; TORCH alone changes the build."""
    python, requirements = tmp_path / "venv" / "bin" / "python", tmp_path / "requirements"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    requirements.mkdir()
    script = shutil.copy(REPOSITORY / "requirements" / "install.sh", requirements)
    for name in ("common", "cpu", "cuda"):
        (requirements / f"{name}.txt").write_text(f"# {name}\n")
    content = f"cpu {python.resolve()}\n# common\n# cpu\n# cuda\n"
    (tmp_path / "venv" / f".lock-{hashlib.sha256(content.encode()).hexdigest()}").touch()
    kept = {key: value for key, value in os.environ.items() if key != "TORCH"}
    for torch, code, error in (({}, 0, ""), ({"TORCH": "cuda"}, 2, "was not created by this script")):
        done = subprocess.run(
            ["bash", script, tmp_path / "venv"], env={**kept, **machine(), **torch}, capture_output=True, text=True,
            check=False, timeout=HANG_SECONDS,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (code, "") and error in done.stderr, done.stderr


# ---- plan, dry run and doctor on GPUs


@pytest.mark.parametrize("name", ON_GPUS)
def test_recipe_plans_on_a_machine_as_for_its_hardware(name, on, monkeypatch, tmp_path, capsys):
    """`plan` and `train --dry-run` on one node; the plan of each node of a job on several."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    hardware = loader.load(name).hardware
    on(hardware.gpu_type, hardware.gpus // hardware.nodes)
    assert cli.main(["plan", name, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["gpus"], planned["gpu_type"], planned["fits"]) == (hardware.gpus, hardware.gpu_type, True)
    place = Placement(hardware.nodes, 0, "node1", "7-0", 8, "127.0.0.1", 15001) if hardware.nodes > 1 else None
    here = topology.available_topology(loader.load(name), topology.HardwareRequest(), place)
    made = json.loads(plans.to_json(plans.resolve(loader.load(name), here)))
    ours = ("run_id", "created", "fewest_gpus", "cheapest_change", "devices")
    assert {k: v for k, v in made.items() if k not in ours} == {k: v for k, v in planned.items() if k not in ours}
    if place is None:
        assert cli.main(["train", name, "--dry-run"]) == 0
        arguments = shlex.split(capsys.readouterr().out)
        assert arguments[-2:] == ["sft_recipes.training.main", str(tmp_path / "runs" / f"{name}-1" / "plan.json")]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("driver", ["570.86.15", "580.95.05"])
@pytest.mark.parametrize("gpu_type", [*GPUS, *OTHERS])
def test_check_driver_for_every_gpu_type(gpu_type, driver, on, monkeypatch):
    """With a driver that is too old and one that is not; a CUDA build of PyTorch is simulated."""
    on(gpu_type, 2, driver=driver)
    usable = driver.startswith("580")
    probe = {**NONE, "devices": 2 if usable else 0, "warning": "" if usable else TOO_OLD}
    checks = doctor.check_driver(topology.visible_gpus(), 2, cuda.driver_version(), probe)
    results = {result.check: result for result in checks}
    name, memory, _ = {**GPUS, **OTHERS}[gpu_type]
    assert results["GPUs"].status == "ok" and f"1: {name}, {memory / 1024:.0f} GiB" in results["GPUs"].detail
    assert results["driver"].detail == driver and results["CUDA"].status == ("ok" if usable else "error")
    assert usable or "expected 580 or newer for CUDA 13.0" in str(results["CUDA"])
    assert node_checks.occupied_gpus(topology.visible_gpus()) == []
    on(gpu_type, 2, FAKE_GPU_MEMORY_USED="2048")
    assert node_checks.occupied_gpus(topology.visible_gpus()) == ["GPU 0: 2.0 GiB", "GPU 1: 2.0 GiB"]


def test_gpu_of_unknown_memory_needs_gpu_type(on, capsys, monkeypatch, tmp_path):
    """GB10, which shares the host's memory: nvidia-smi has no size for it."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    on("unknown", 1, FAKE_GPU_MEMORY="[N/A]", FAKE_GPU_NAME="NVIDIA GB10", FAKE_GPU_MEMORY_USED="[N/A]")
    assert node_checks.occupied_gpus(topology.visible_gpus()) == []
    assert cli.main(["train", "1b", "--dry-run"]) == 2
    assert (
        "GPU_TYPE: nvidia-smi reports no memory size for NVIDIA GB10; set GPU_TYPE=<its GiB>" in capsys.readouterr().err
    )
    assert cli.main(["train", "1b", "--gpu-type", "96", "--dry-run"]) == 0


# ---- launches, SFTConfig and DeepSpeed's configuration, with CUDA simulated


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """Return the arguments, launch and configuration of every case, by name."""
    kept = {key: value for key, value in os.environ.items() if key not in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, HELPERS / "simulated_cuda.py", tmp_path_factory.mktemp("simulated")],
        env={**kept, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, check=False, timeout=HANG_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


CASES = pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)


def test_every_recipe_and_strategy_is_a_case():
    plans_ = [case.plan() for case in cases()]
    assert {plan.recipe for plan in plans_} >= set(ON_GPUS)
    for nodes in (1, 2):
        assert {plan.parallelism for plan in plans_ if plan.nodes == nodes} >= set(STRATEGIES)


@CASES
def test_launch_matches_the_plan(simulated, case):
    plan, launched = case.plan(), simulated[case.name]["launch"]
    variables = launched["environment"]
    assert launched["arguments"][-3:-1] == ["-m", "sft_recipes.training.main"]
    if plan.parallelism == "single":
        assert "rendezvous" not in launched and "ACCELERATE_USE_CPU" not in variables
    else:
        assert launched["nodes"] == [plan.nodes, plan.nodes]
        assert launched["ranks_per_node"] == plan.gpus // plan.nodes
        assert (launched["node"], launched["restarts"]) == (case.node, 0)
        backend, endpoint = launched["rendezvous"]
        address, port = endpoint.split(":")
        assert backend == "static" and port != "29500", "two runs on one machine would share it"
        assert (address, port) == ("10.0.0.1", "15001") if plan.nodes > 1 else address == "127.0.0.1"
        assert launched["shutdown_timeout"] == int(variables["PET_SHUTDOWN_TIMEOUT"]) >= 120
    cores = len(os.sched_getaffinity(0))
    assert int(variables["OMP_NUM_THREADS"]) == max(cores // (plan.gpus // plan.nodes), 1)
    assert variables.get("CUDA_VISIBLE_DEVICES") == case.devices
    assert ("NCCL_SOCKET_IFNAME" in variables) == (plan.nodes == 1), "loopback is for one node"
    assert variables["ACCELERATE_MIXED_PRECISION"] == "no", "the trainer sets it from the plan"


@CASES
def test_launch_starts_the_strategy_of_the_plan(simulated, case):
    plan, variables = case.plan(), simulated[case.name]["launch"]["environment"]
    zero, fsdp = plan.parallelism.startswith("zero"), plan.parallelism == "fsdp2"
    assert (variables.get("ACCELERATE_USE_DEEPSPEED") == "true") == zero
    assert (variables.get("ACCELERATE_USE_FSDP") == "true") == fsdp
    if zero:
        assert Path(variables["ACCELERATE_DEEPSPEED_CONFIG_FILE"]).name == "deepspeed.json"
        assert variables["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == str(plan.parallelism.startswith("zero3")).lower()
    expected = {
        "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_OFFLOAD_PARAMS": "false", "FSDP_ACTIVATION_CHECKPOINTING": "false",
    }  # fmt: skip
    assert {name: variables.get(name) for name in expected} == (expected if fsdp else dict.fromkeys(expected))


@CASES
def test_arguments_of_a_rank_are_for_a_gpu(simulated, case):
    plan, found = case.plan(), simulated[case.name]["arguments"]
    checkpoints = plan.sections.trainer["gradient_checkpointing"]
    reentrant = plan.method != "full" and plan.parallelism.startswith("zero3")
    every = {"every_n_layers": checkpoints} if checkpoints > 1 else {}
    assert found == {
        "bf16": True, "fp16": False, "mixed_precision": "bf16", "tf32": None, "torch_compile": False,
        "use_cpu": False, "device": "cuda:0", "n_gpu": 1,
        "optim": plan.sections.trainer.get("optim", "adamw_torch_fused"), "dataloader_pin_memory": True,
        "gradient_checkpointing": bool(checkpoints), "activation_checkpointing": bool(checkpoints),
        "activation_checkpointing_kwargs": {"use_reentrant": reentrant, **every} if checkpoints else None,
        "per_device_train_batch_size": plan.per_device_train_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "ddp_find_unused_parameters": False, "max_grad_norm": plan.max_grad_norm,
    }  # fmt: skip


@CASES
def test_deepspeed_configuration_matches_the_plan(simulated, case):
    plan, found = case.plan(), simulated[case.name].get("deepspeed")
    if not plan.parallelism.startswith("zero"):
        assert found is None
        return
    stage = int(plan.parallelism[4])
    assert found == {
        "train_batch": plan.effective_batch_size, "micro_batch": plan.per_device_train_batch_size,
        "accumulation": plan.gradient_accumulation_steps, "clipping": plan.max_grad_norm,
        "bf16": True, "fp16": False, "accumulation_dtype": "fp32", "communication_dtype": "torch.float32",
        "stage": stage, "overlaps": True, "reduce_bucket": 200_000_000,
        "gather_bucket": 200_000_000 if stage < 3 else 500_000_000,  # for stage 3 the default, which DeepSpeed does not use
        "prefetch_bucket": 50_000_000,
        "persistence_threshold": plan.zero3_sizes.get("stage3_param_persistence_threshold", 100_000),
        "gathers_on_save": stage == 3,
        "offload_pinned": True if plan.parallelism == "zero3_offload" else None,
    }  # fmt: skip
