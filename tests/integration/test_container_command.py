"""Which runtime a command selects, and the container command line it prints. Scripts replace docker, podman and
nvidia-smi here; tests/container/ runs a real container runtime."""

import os
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers.workplace import REPOSITORY

from sft_recipes.runtime import paths
from sft_recipes.runtime.errors import DataError

SECRET = "hf_" + "s" * 30
HOSTILE = "a b'c\"d$(touch written)`touch written`;&|*é"

CONTAINER_RUNTIME = """#!/bin/sh
case "$1" in
    info) [ -z "$RUNTIME_IS_DOWN" ] || exit 1; echo "$RUNTIME_INFO" ;;
    image) for name in $RUNTIME_IMAGES; do [ "$name" != "$5" ] || exit 0; done; exit 1 ;;
    *) for argument; do echo "$argument"; done; exit 75 ;;
esac
"""
NVIDIA_SMI = """#!/bin/sh
for id in $GPU_IDS; do echo "$id"; done
"""
LOCAL_PYTHON = """#!/bin/sh
echo "local: $*"
"""
FILES = (
    "sft_recipes/__init__.py", "sft_recipes/launch/__init__.py", "sft_recipes/launch/container.py",
    "sft_recipes/launch/mounts.py", "sft_recipes/runtime/__init__.py", "sft_recipes/runtime/errors.py",
    "sft_recipes/runtime/paths.py", "sft_recipes/runtime/programs.py", "sft_recipes/runtime/timeouts.py",
    "recipes/8b.yaml",
)  # fmt: skip


@pytest.fixture
def machine(tmp_path):
    """A checkout whose virtual environment only prints its arguments, with the given runtimes, images and GPUs."""
    checkout, programs = tmp_path / "checkout", tmp_path / "programs"
    for file in FILES:
        (checkout / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / file, checkout / file)
    programs.mkdir()

    def executable(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    executable(checkout / "requirements" / "install.sh", "#!/bin/sh\n")
    for python in (checkout / ".venv" / "bin" / "python", programs / "python"):
        executable(python, LOCAL_PYTHON)
    for program in ("sh", "bash"):
        (programs / program).symlink_to(shutil.which(program))

    def run(*arguments, runtimes=("docker", "podman"), gpus="0 1 2 3", images=None, **variables):
        for name in ("docker", "podman", "nvidia-smi"):
            (programs / name).unlink(missing_ok=True)
        for runtime in runtimes:
            executable(programs / runtime, CONTAINER_RUNTIME)
        if gpus:
            executable(programs / "nvidia-smi", NVIDIA_SMI)
        images = "localhost/sft-recipes:cuda localhost/sft-recipes:cpu" if images is None else images
        environment = {
            "PATH": str(programs), "HOME": str(tmp_path / "home"), "RUNS_DIR": str(tmp_path / "runs"),
            "GPU_IDS": gpus, "RUNTIME_IMAGES": images, **variables,
        }  # fmt: skip
        module = checkout / "sft_recipes" / "launch" / "container.py"
        return subprocess.run(
            [sys.executable, "-I", str(module), str(checkout / ".venv"), *arguments],
            cwd=checkout, env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    return SimpleNamespace(run=run, checkout=checkout, path=tmp_path)


def command(done):
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def values(command, option):
    return [command[at + 1] for at, argument in enumerate(command) if argument == option]


def volumes(done):
    """Mounted paths, each with its mode, and each at its own path."""
    parts = [volume.split(":") for volume in values(command(done), "--volume")]
    assert all(outside == inside for outside, inside, _ in parts)
    return {path: mode for path, _, mode in parts}


def error_line(done):
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == "" and lines[-1].startswith("error: "), (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return lines[-1]


def test_train_with_gpus_runs_in_the_image(machine):
    done = machine.run("train", "8b", "--gpus", "2", GPUS="2")
    assert done.returncode == 75, "the exit code of the container runtime is returned"
    assert done.stdout.startswith("run\n--rm\n")
    assert "container: docker, localhost/sft-recipes:cuda, GPUs 0,1 (RUNTIME=local" in done.stderr
    assert all((machine.path / folder).is_dir() for folder in ("runs", "home/.cache/huggingface/hub")), (
        "created as the user: a container runtime would create them as root"
    )


def test_dry_run_prints_the_complete_command(machine):
    before = {path.name for path in machine.path.iterdir()}
    printed = command(
        machine.run(
            "train", "8b", "--gpus", "2", "--dry-run", GPUS="2", DRY_RUN="1", HF_TOKEN=SECRET, NCCL_DEBUG="INFO"
        )
    )
    assert printed[:3] == ["docker", "run", "--rm"]
    assert values(printed, "--gpus")[0] == '"device=0,1"' and "host" in values(printed, "--ipc")
    assert values(printed, "--ulimit") == ["memlock=-1:-1", "stack=67108864:67108864"]
    assert values(printed, "--user") == [f"{os.geteuid()}:{os.getegid()}"]
    assert "--read-only" in printed and values(printed, "--cap-drop") == ["ALL"]
    mounted = set(values(printed, "--volume"))
    assert mounted == {
        f"{machine.path / folder}:{machine.path / folder}:{mode}"
        for folder, mode in (("checkout", "ro"), ("runs", "rw"), ("home/.cache/huggingface", "rw"))
    }
    assert {"HF_TOKEN", "NCCL_DEBUG", f"RUNS_DIR={machine.path / 'runs'}"} <= set(values(printed, "--env"))
    assert printed[-6:] == ["-m", "sft_recipes", "train", "8b", "--gpus", "2"], (
        "without --dry-run: pasted into a shell, it trains"
    )
    assert {path.name for path in machine.path.iterdir()} == before, "nothing is created"


def test_secrets_are_passed_by_name_and_never_printed(machine):
    variables = {"HF_TOKEN": SECRET, "WANDB_API_KEY": SECRET, "MLFLOW_TRACKING_PASSWORD": f"/{SECRET}", "GPUS": "2"}
    for dry_run in ({"DRY_RUN": "1"}, {}):
        done = machine.run("train", "8b", "--gpus", "2", **variables, **dry_run)
        assert SECRET not in done.stdout + done.stderr and "MLFLOW_TRACKING_PASSWORD" in done.stdout


def test_only_listed_variables_are_passed(machine):
    passed = (
        "CUDA_LAUNCH_BLOCKING", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_MODULE_LOADING", "FLASH_ATTENTION_DETERMINISTIC",
        "PYTORCH_ALLOC_CONF", "PYTORCH_NVML_BASED_CUDA_CHECK", "TRITON_INTERPRET", "DS_ACCELERATOR",
        "DS_BUILD_FUSED_ADAM",
    )  # fmt: skip
    of_the_host = (
        "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CUDA_PATH", "CUDA_BIN_PATH", "CUDA_TOOLKIT_ROOT_DIR", "CUDA_VERSION",
        "CUDA_MPS_LOG_DIRECTORY", "TRITON_PTXAS_PATH", "PYTORCH_NVCC", "LD_LIBRARY_PATH", "XHF_TOKEN", "PYTHONSTARTUP",
    )  # fmt: skip
    done = machine.run("train", "8b", GPUS="1", DRY_RUN="1", **dict.fromkeys((*passed, *of_the_host), "1"))
    names = set(values(command(done), "--env"))
    assert set(passed) <= names and not set(of_the_host) & names


@pytest.mark.parametrize(
    ("arguments", "variables", "device", "inside"),
    [
        (("--gpus", "4"), {"GPUS": "4"}, "0,1,2,3", ["--gpus", "4"]),
        (("a=b",), {"CUDA_VISIBLE_DEVICES": "0,2", "RUNTIME": "docker"}, "0,2", ["a=b"]),
        (("--gpus", "2"), {"GPUS": "2", "CUDA_VISIBLE_DEVICES": "3,1,0"}, "3,1", ["--gpus", "2"]),
    ],
)
def test_container_gets_the_requested_gpus_only(machine, arguments, variables, device, inside):
    printed = command(machine.run("train", "8b", *arguments, DRY_RUN="1", **variables))
    assert values(printed, "--gpus")[0] == f'"device={device}"'
    assert printed[printed.index("sft_recipes") + 3 :] == inside
    with_cdi = command(machine.run("train", "8b", *arguments, **{**variables, "DRY_RUN": "1", "RUNTIME": "podman"}))
    assert [name for name in values(with_cdi, "--device") if "nvidia" in name] == [
        f"nvidia.com/gpu={gpu}" for gpu in device.split(",")
    ]


@pytest.mark.parametrize(("name", "gets_gpus"), [("train", True), ("generate", True), ("plan", False)])
def test_only_gpu_commands_get_gpus(machine, name, gets_gpus):
    printed = command(machine.run(name, "x", DRY_RUN="1", RUNTIME="docker"))
    assert ('"device=0,1,2,3"' in printed) == gets_gpus and printed[-2:] == [name, "x"]
    assert ("NVIDIA_VISIBLE_DEVICES=void" in values(printed, "--env")) != gets_gpus
    assert ("--interactive" in printed) == (name == "generate"), (
        "a background client that reads the terminal is stopped by it, or loops indefinitely"
    )


@pytest.mark.parametrize(
    ("variables", "where"),
    [
        ({"GPUS": "2"}, "docker"),
        ({"runtimes": ("podman",), "GPUS": "2"}, "podman"),
        ({"RUNTIME": "podman", "GPUS": "0"}, "podman"),
        ({"RUNTIME": "local", "GPUS": "2"}, "local"),
        ({"GPUS": "0"}, "local"),
        ({"RUNTIME": "pyxis"}, "local"),
        ({"gpus": "", "GPUS": "2"}, "local"),  # where the command itself reports that this machine has none
        ({"RUNTIME_IS_DOWN": "1", "GPUS": "2"}, "neither"),
        ({"runtimes": (), "GPUS": "2"}, "neither"),
    ],
)
def test_select_runtime(machine, variables, where):
    done = machine.run("plan", "tiny", **variables)
    if where in ("local", "neither"):
        assert done.stdout.startswith("local: -m sft_recipes plan tiny"), done.stderr
        assert ("running without a container: neither docker nor podman" in done.stderr) == (where == "neither")
    else:
        assert done.returncode == 75 and f"container: {where}," in done.stderr


def test_data_and_model_of_overrides_are_mounted(machine):
    outside = machine.path / "elsewhere"
    (outside / "model").mkdir(parents=True)
    names = ("my rows.jsonl", "b=2.jsonl", "held out.jsonl", "target.jsonl")
    rows, second, held_out, target = (outside / name for name in names)
    for file in (rows, second, held_out, target):
        file.write_text("{}")
    (machine.path / "home").mkdir()
    shutil.copy(rows, machine.path / "home" / "own.jsonl")
    (machine.checkout / "data.jsonl").symlink_to(target)
    run = machine.path / "disk" / "run-1"
    run.mkdir(parents=True)
    (machine.path / "runs").mkdir()
    (machine.path / "runs" / "run-1").symlink_to(run)
    variables = {"DRY_RUN": "1", "RUNTIME": "podman"}

    assert volumes(machine.run("generate", "run-1", **variables))[str(run)] == "rw"
    done = machine.run(
        "train", "tiny", f"model.name_or_path={outside / 'model'}", f"data.train=[{rows}, '{second}', data.jsonl]", "data.validation=~/own.jsonl",
        "data.retention_eval=../elsewhere/held out.jsonl", **variables,
    )  # fmt: skip
    own = str(machine.path / "home" / "own.jsonl")
    assert (
        volumes(done).items()
        >= dict.fromkeys(
            (str(rows), str(second), str(held_out), str(target), own, str(outside / "model")), "ro"
        ).items()
    )
    assert f"data.validation={own}" in command(done), "the container has another home"


def test_mounts_variable(machine):
    models = machine.path / "models"
    models.mkdir()
    seen = volumes(machine.run("plan", "tiny", DRY_RUN="1", RUNTIME="docker", MOUNTS=f"{models}:/etc/ssl"))
    assert (seen[str(models)], seen["/etc/ssl"]) == ("ro", "ro")


def test_broken_link_in_a_folder_is_rejected(tmp_path, monkeypatch):
    """It would be skipped, and the run would train on fewer rows. In a container, targets may not be mounted."""
    folder, far = tmp_path / "data", tmp_path / "far"
    for place in (folder, far):
        place.mkdir()
    (folder / "all").symlink_to(far)
    paths.check_links(folder, "data.train")
    (far / "rows.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"data.train: .*/data/all/rows.jsonl: the target of this link does not exist$"):
        paths.check_links(folder, "data.train")
    monkeypatch.setenv("SFT_RECIPES_IMAGE", "x")
    with pytest.raises(DataError, match="In a container: add its folder to MOUNTS="):
        paths.check_links(folder, "data.train")


def test_rootless_docker(machine):
    done = machine.run("train", "8b", GPUS="1", DRY_RUN="1", RUNTIME_INFO='["name=rootless"]')
    assert values(command(done), "--user") == ["0:0"], "root in the container is the user on the host"
    assert not values(command(done), "--ulimit")


def test_hostile_values_stay_one_argument(machine):
    arguments = ["--name", HOSTILE, f"data.train={HOSTILE}", HOSTILE]
    assert command(machine.run("train", "tiny", *arguments, DRY_RUN="1", RUNTIME="docker"))[-4:] == arguments
    folder = machine.path / HOSTILE
    folder.mkdir()
    seen = volumes(
        machine.run("plan", HOSTILE, RUNTIME="docker", DRY_RUN="1", MOUNTS=str(folder), RUNS_DIR=f"{folder}/runs")
    )
    assert (seen[str(folder)], seen[f"{folder}/runs"]) == ("ro", "rw")
    for variable in ("IMAGE", "RUNTIME", "VARIANT"):
        assert error_line(machine.run("plan", "tiny", **{"RUNTIME": "docker", variable: HOSTILE}))
    assert not list(machine.path.rglob("written"))


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"GPUS": "2", "images": ""}, "has no image localhost/sft-recipes:cuda. Build it with `make image VARIANT=cuda`"),
        ({"GPUS": "2", "IMAGE": "other:1"}, "IMAGE: docker has no image other:1"),
        ({"RUNTIME": "docker", "RUNTIME_IS_DOWN": "1"}, "RUNTIME: docker does not answer"),
        ({"RUNTIME": "podman", "runtimes": ("docker",)}, "RUNTIME: podman does not answer"),
        ({"RUNTIME": "lxc"}, "RUNTIME: found 'lxc', expected local, docker or podman"),
        ({"RUNTIME": "apptainer"}, "pyxis and apptainer are for jobs"),
        ({"GPUS": "2", "VARIANT": "rocm"}, "VARIANT: found 'rocm', expected cuda or cpu"),
        ({"RUNTIME": "docker", "RUNS_DIR": "/proc/runs"}, "RUNS_DIR, HF_HOME: cannot create /proc/runs"),
        ({"RUNTIME": "docker", "RUNS_DIR": "/etc"}, "/etc: cannot be mounted: the image has its own"),
        ({"RUNTIME": "docker", "RUNS_DIR": "a:b"}, "or it has a colon"),
        ({"RUNTIME": "docker", "CONTAINER_ARGS": "a'b"}, "CONTAINER_ARGS: cannot split \"a'b\" into arguments"),
        ({"RUNTIME": "docker", "MOUNTS": "/tmp"}, "/tmp: cannot be mounted"),
        ({"RUNTIME": "docker", "MOUNTS": "/nowhere"}, "MOUNTS: file or folder not found: /nowhere"),
    ],
)  # fmt: skip
def test_invalid_input_is_rejected_in_one_line(machine, variables, line):
    assert line in error_line(machine.run("train", "8b", **variables))


def test_build_image(machine):
    printed = command(machine.run("image", gpus="", DRY_RUN="1", BUILD_ARGS="--build-arg 'BASE_IMAGE=my base'"))
    assert printed[:2] == ["docker", "build"] and "TORCH=cuda" in printed, "a build host has no GPU"
    assert printed[-3:] == ["--build-arg", "BASE_IMAGE=my base", str(machine.checkout)], "the last one counts"
    printed = command(machine.run("image", DRY_RUN="1", RUNTIME="podman", VARIANT="cpu", IMAGE="registry/mine:2"))
    assert printed[0] == "podman" and values(printed, "--tag") == ["registry/mine:2"] and "TORCH=cpu" in printed
    assert "RUNTIME: docker or podman does not answer" in error_line(machine.run("image", runtimes=()))


def test_smoke_test_mounts_nothing(machine):
    printed = command(
        machine.run("smoke", DRY_RUN="1", HF_TOKEN=SECRET, CUDA_VISIBLE_DEVICES="1", CONTAINER_ARGS="--memory '8 g'")
    )
    assert values(printed, "--network") == ["none"] and not values(printed, "--volume") and "HF_TOKEN" not in printed
    assert values(printed, "--memory") == ["8 g"] and values(printed, "--gpus") == ['"device=1"']
    assert printed[-1] == "/opt/sft-recipes/docker/smoke.sh" and not values(printed, "--user"), "the user of the image"
    for variables in ({"gpus": ""}, {"VARIANT": "cpu"}):
        on_cpu = command(machine.run("smoke", DRY_RUN="1", **variables))
        assert on_cpu[-1] == "--cpu" and not values(on_cpu, "--gpus")
    assert "expected docker or podman; pyxis" in error_line(machine.run("smoke", RUNTIME="local"))


def test_inside_the_image_the_command_runs_directly(machine):
    done = machine.run("plan", "tiny", RUNTIME="docker", SFT_RECIPES_IMAGE="x")
    assert (done.returncode, done.stdout) == (0, "local: -m sft_recipes plan tiny\n")


def test_portable_cxx_removes_native_instructions(tmp_path):
    (tmp_path / "c++").write_text('#!/bin/sh\nfor argument; do echo "$argument"; done\n')
    (tmp_path / "c++").chmod(0o755)
    wrapped = [str(REPOSITORY / "docker" / "portable-cxx"), "-march=native", "-D__AVX512__", "-O3", "a b.cpp"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(wrapped, env=environment, capture_output=True, text=True, check=True)
    machine = ["-march=x86-64-v3"] if os.uname().machine == "x86_64" else []
    assert done.stdout.splitlines() == [*machine, "-D__AVX256__", "-O3", "a b.cpp"]


def test_folder_of_model_is_mounted(machine):
    """`--model=FOLDER`, as make passes MODEL."""
    model = machine.path / "a model"
    model.mkdir()
    seen = volumes(machine.run("plan", f"--model={model}", "data.train=x", DRY_RUN="1", RUNTIME="docker"))
    assert seen[str(model)] == "ro"
