"""Which runtime a command selects, and the container command line it prints. Scripts replace docker, podman and
nvidia-smi here; tests/container/ runs a real container runtime."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers.workplace import REPOSITORY

SECRET = "hf_" + "s" * 30
HOSTILE = "a b'c\"d$(touch written)`touch written`;&|*é"

CONTAINER_RUNTIME = """#!{python}
import json, os, sys
arguments = sys.argv[1:]
if arguments[:1] == ["info"]:
    if os.environ.get("RUNTIME_IS_DOWN"):
        sys.exit("Cannot connect to the daemon")
    print(os.environ.get("RUNTIME_SECURITY_OPTIONS", "[]") if "SecurityOptions" in arguments[-1] else os.environ["RUNTIME_INFO"])
elif arguments == ["--version"]:
    print(os.environ.get("RUNTIME_VERSION", "version 28"))
elif arguments[:2] == ["image", "inspect"]:
    sys.exit(0 if arguments[-1] in os.environ.get("RUNTIME_IMAGES", "").split() else "no such image")
else:
    print(json.dumps({{"ran": arguments}}))
    sys.exit(75)
"""
NVIDIA_SMI = """#!/bin/sh
for id in $GPU_IDS; do echo "$id"; done
"""
LOCAL_PYTHON = """#!/bin/sh
echo "local: $*"
"""


@pytest.fixture
def machine(tmp_path):
    """A checkout whose virtual environment only prints its arguments, with the given runtimes, images and GPUs."""
    checkout, programs = tmp_path / "checkout", tmp_path / "programs"
    package = [
        f"sft_recipes/{name}.py"
        for name in (
            "__init__",
            "launch/__init__",
            "launch/mounts",
            "runtime/__init__",
            "runtime/paths",
            "runtime/timeouts",
        )
    ]
    for file in (*package, "sft_recipes/launch/container.py", "requirements/requirements.in", "recipes/8b.yaml"):
        (checkout / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / file, checkout / file)
    programs.mkdir()

    def executable(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    executable(checkout / "requirements" / "install.sh", "#!/bin/sh\n")
    executable(checkout / ".venv" / "bin" / "python", LOCAL_PYTHON)
    for program in ("sh", "bash", "git", "cat", "env"):
        (programs / program).symlink_to(shutil.which(program))

    def run(*arguments, runtimes=("docker", "podman"), gpus="0 1 2 3", images=None, info='{"nvidia": 1}', **variables):
        for name in ("docker", "podman", "nvidia-smi", "python"):
            (programs / name).unlink(missing_ok=True)
        for runtime in runtimes:
            executable(programs / runtime, CONTAINER_RUNTIME.format(python=sys.executable))
        if gpus:
            executable(programs / "nvidia-smi", NVIDIA_SMI)
        executable(programs / "python", LOCAL_PYTHON)
        images = "localhost/sft-recipes:cuda localhost/sft-recipes:cpu" if images is None else images
        environment = {
            "PATH": str(programs), "HOME": str(tmp_path / "home"), "RUNS_DIR": str(tmp_path / "runs"),
            "GPU_IDS": gpus, "RUNTIME_IMAGES": images, "RUNTIME_INFO": info, **variables,
        }  # fmt: skip
        module = checkout / "sft_recipes" / "launch" / "container.py"
        return subprocess.run(
            [sys.executable, "-I", str(module), str(checkout / ".venv"), *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    return SimpleNamespace(run=run, checkout=checkout, path=tmp_path)


def command(done):
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def values(command, option):
    return [command[at + 1] for at, argument in enumerate(command) if argument == option]


def error_line(done):
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == "" and lines[-1].startswith("error: "), (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return lines[-1]


def test_train_with_gpus_runs_in_the_image(machine):
    done = machine.run("train", "8b", "--gpus", "2")
    assert done.returncode == 75, "the exit code of the container runtime is returned"
    assert json.loads(done.stdout)["ran"][:2] == ["run", "--rm"]
    assert "container: docker, localhost/sft-recipes:cuda, GPUs 0,1 (RUNTIME=local" in done.stderr


def test_dry_run_prints_the_complete_command(machine):
    printed = command(
        machine.run("train", "8b", "--gpus", "2", "--dry-run", DRY_RUN="1", HF_TOKEN=SECRET, NCCL_DEBUG="INFO")
    )
    assert printed[:3] == ["docker", "run", "--rm"]
    assert values(printed, "--gpus")[0] == '"device=0,1"'
    assert values(printed, "--ulimit") == ["memlock=-1:-1", "stack=67108864:67108864"] and "host" in values(
        printed, "--ipc"
    )
    assert values(printed, "--user") == [f"{os.geteuid()}:{os.getegid()}"]
    assert "--read-only" in printed and values(printed, "--cap-drop") == ["ALL"]
    mounted = values(printed, "--volume")
    assert f"{machine.checkout}:{machine.checkout}:ro" in mounted
    assert {
        f"{machine.path / place}:{machine.path / place}:rw" for place in ("runs", "home/.cache/huggingface")
    } <= set(mounted)
    assert {"HF_TOKEN", "NCCL_DEBUG", f"RUNS_DIR={machine.path / 'runs'}"} <= set(values(printed, "--env"))
    assert printed[-6:] == ["-m", "sft_recipes", "train", "8b", "--gpus", "2"], (
        "without --dry-run: pasted into a shell, it trains"
    )


def test_secrets_are_passed_by_name_and_never_printed(machine):
    variables = {"HF_TOKEN": SECRET, "WANDB_API_KEY": SECRET, "NCCL_SOME": SECRET, "GPUS": "2"}
    for dry_run in ({"DRY_RUN": "1"}, {}):
        done = machine.run("train", "8b", "--gpus", "2", **variables, **dry_run)
        assert SECRET not in done.stdout + done.stderr and "WANDB_API_KEY" in done.stdout


@pytest.mark.parametrize(
    "variable",
    [
        "CUDA_LAUNCH_BLOCKING", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_DEVICE_ORDER", "CUDA_MODULE_LOADING",
        "TRITON_INTERPRET", "TRITON_PRINT_AUTOTUNING", "DS_ACCELERATOR", "DS_SKIP_CUDA_CHECK", "DS_BUILD_FUSED_ADAM",
        "FLASH_ATTENTION_DETERMINISTIC", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NVML_BASED_CUDA_CHECK",
    ],
)  # fmt: skip
def test_library_variables_are_passed_by_name(machine, variable):
    done = machine.run("train", "8b", "--gpus", "2", DRY_RUN="1", **{variable: SECRET})
    assert variable in values(command(done), "--env") and SECRET not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "variable",
    [
        "CUDA_VISIBLE_DEVICES", "CUDA_VERSION", "CUDA_HOME", "CUDA_PATH", "CUDA_ROOT", "CUDA_TOOLKIT_ROOT_DIR",
        "CUDA_BIN_PATH", "CUDA_INJECTION64_PATH", "CUDA_MPS_LOG_DIRECTORY", "TRITON_PTXAS_PATH", "TRITON_LIBCUDA_PATH",
        "TRITON_HOME", "PYTORCH_NVCC", "CUDNN_HOME", "XCUDA_LAUNCH_BLOCKING", "LD_LIBRARY_PATH",
    ],
)  # fmt: skip
def test_host_variables_are_not_passed(machine, variable):
    printed = command(machine.run("train", "8b", "--gpus", "1", DRY_RUN="1", **{variable: "0"}))
    assert variable not in printed


@pytest.mark.parametrize(
    "variable",
    ["TRITON_CACHE_DIR", "TRITON_DUMP_DIR", "CUDA_CACHE_PATH", "PYTORCH_KERNEL_CACHE_PATH", "CUDA_MPS_PIPE_DIRECTORY"],
)
def test_kernel_caches_are_mounted_at_their_path(machine, variable):
    """The default ones are in /tmp and are lost with the container."""
    folder = machine.path / "caches" / "kernels"
    done = machine.run("train", "tiny", RUNTIME="docker", **{variable: str(folder)})
    ran = json.loads(done.stdout)["ran"]
    assert f"{folder}:{folder}:rw" in values(ran, "--volume") and variable in values(ran, "--env")
    assert folder.is_dir(), "created as the user: a container runtime would create it as root"


@pytest.mark.parametrize(
    ("arguments", "device", "inside"),
    [
        (("--gpus", "4"), "0,1,2,3", ["--gpus", "4"]),
        (("--devices", "0,2"), "0,2", ["--gpus", "2"]),
        (("--gpus", "2", "--devices", "1,3"), "1,3", ["--gpus", "2"]),
        (("--gpus", "1", "a=b"), "0", ["--gpus", "1", "a=b"]),
    ],
)
def test_container_gets_the_requested_gpus_only(machine, arguments, device, inside):
    printed = command(machine.run("train", "8b", *arguments, DRY_RUN="1"))
    assert values(printed, "--gpus")[0] == f'"device={device}"'
    assert printed[printed.index("sft_recipes") + 3 :] == inside and "--devices" not in printed
    with_cdi = machine.run("train", "8b", *arguments, DRY_RUN="1", RUNTIME="podman")
    if with_cdi.returncode == 2:  # this machine has no CDI files
        assert "Install the NVIDIA Container Toolkit" in error_line(with_cdi)


def test_cuda_visible_devices_is_applied(machine):
    printed = command(machine.run("train", "8b", "--gpus", "2", DRY_RUN="1", CUDA_VISIBLE_DEVICES="3,1,0"))
    assert values(printed, "--gpus")[0] == '"device=3,1"' and "CUDA_VISIBLE_DEVICES" not in printed


@pytest.mark.parametrize(
    ("name", "gets_gpus"), [("train", True), ("generate", True), ("doctor", True), ("plan", False), ("report", False)]
)
def test_only_gpu_commands_get_gpus(machine, name, gets_gpus):
    printed = command(machine.run(name, "x", DRY_RUN="1", RUNTIME="docker"))
    assert ('"device=0,1,2,3"' in printed) == gets_gpus and printed[-2:] == [name, "x"]


@pytest.mark.parametrize(
    ("variables", "arguments", "where"),
    [
        ({}, ("--gpus", "2"), "docker"),
        ({"runtimes": ("podman",), "RUNTIME": "podman"}, ("--gpus", "0"), "podman"),
        ({"RUNTIME": "podman"}, (), "podman"),
        ({"RUNTIME": "local"}, ("--gpus", "2"), "local"),
        ({}, (), "local"),
        ({}, ("--gpus", "0"), "local"),
        ({"gpus": ""}, ("--gpus", "2"), "local"),  # where the command itself reports that this machine has none
        ({"RUNTIME_IS_DOWN": "1"}, ("--gpus", "2"), "local"),
        ({"runtimes": ()}, ("--gpus", "2"), "local"),
    ],
)
def test_select_runtime(machine, variables, arguments, where):
    done = machine.run("plan", "tiny", *arguments, **variables)
    if where == "local":
        assert done.stdout.startswith("local: -m sft_recipes plan tiny"), done.stderr
        unavailable = (
            arguments == ("--gpus", "2") and variables.get("gpus", "4") and variables.get("RUNTIME") != "local"
        )
        assert ("running without a container: neither docker nor podman" in done.stderr) == bool(unavailable)
    else:
        assert done.returncode == 75 and f"container: {where}," in done.stderr


def test_named_data_and_links_are_mounted(machine):
    outside = machine.path / "elsewhere"
    outside.mkdir()
    rows, second, blob = outside / "my rows.jsonl", outside / "b=2.jsonl", machine.path / "blobs" / "abc"
    blob.parent.mkdir()
    for file in (rows, second, blob):
        file.write_text("{}")
    model = outside / "model"
    model.mkdir()
    (model / "model.safetensors").symlink_to(blob)
    link = machine.path / "link.jsonl"
    link.symlink_to(second)
    overrides = (f"data.train=[{rows}, '{second}']", f"data.validation={link}", f"model.name_or_path={model}")
    printed = command(machine.run("train", "tiny", *overrides, DRY_RUN="1", RUNTIME="podman", VARIANT="cpu", gpus=""))
    mounted = {volume.rsplit(":", 1)[0].partition(":")[0] for volume in values(printed, "--volume")}
    assert {str(path) for path in (rows, second, link, model, blob)} <= mounted
    assert all(volume.endswith(":ro") for volume in values(printed, "--volume") if str(outside) in volume)
    relative = command(
        machine.run("train", "tiny", "data.train=elsewhere/my rows.jsonl", DRY_RUN="1", RUNTIME="docker")
    )
    assert any(volume.startswith(f"{rows}:") for volume in values(relative, "--volume"))


def test_mounts_variable(machine):
    (machine.path / "models").mkdir()
    printed = command(
        machine.run("plan", "tiny", DRY_RUN="1", RUNTIME="docker", MOUNTS=f"{machine.path / 'models'}:/etc/ssl")
    )
    assert {f"{machine.path / 'models'}:{machine.path / 'models'}:ro", "/etc/ssl:/etc/ssl:ro"} <= set(
        values(printed, "--volume")
    )
    assert "MOUNTS: /nowhere: folder not found" in error_line(
        machine.run("plan", "tiny", RUNTIME="docker", MOUNTS="/nowhere")
    )


def volumes(done):
    return {volume.partition(":")[0] for volume in values(command(done), "--volume")}


def test_links_in_data_folder_are_mounted(machine):
    """A dangling link would be skipped, and the run would train on fewer rows."""
    data, far, farther = (machine.path / name for name in ("data", "far", "farther"))
    for folder in (data / "sub", far, farther):
        folder.mkdir(parents=True)
    (farther / "c.jsonl").write_text("{}")
    (far / "more").symlink_to(farther)
    (data / "sub" / "b.jsonl").symlink_to(farther / "c.jsonl")
    (data / "all").symlink_to(far)
    (data / "itself").symlink_to(data / "itself")
    seen = volumes(machine.run("train", "tiny", f"data.train={data}", DRY_RUN="1", RUNTIME="docker"))
    assert {str(path) for path in (data, far, farther, farther / "c.jsonl")} <= seen
    seen = volumes(machine.run("plan", "tiny", DRY_RUN="1", RUNTIME="docker", MOUNTS=str(data)))
    assert {str(path) for path in (data, far, farther)} <= seen


def test_chain_of_links_in_the_checkout_is_mounted(machine):
    (machine.path / "big").mkdir()
    (machine.path / "mid").symlink_to(machine.path / "big")
    (machine.checkout / "data").symlink_to(machine.path / "mid")
    override = f"data.train={machine.checkout / 'data'}"
    assert str(machine.path / "mid") in volumes(machine.run("train", "tiny", override, DRY_RUN="1", RUNTIME="docker"))


def test_paths_in_recipe_are_mounted(machine):
    rows, held, model = (machine.path / name for name in ("rows.jsonl", "held out.jsonl", "model"))
    for file in (rows, held):
        file.write_text("{}")
    model.mkdir()
    (machine.checkout / "recipes" / "mine.yaml").write_text(
        f"model:\n  name_or_path: {model}   # ours\ndata:\n  train:\n    - {rows}\n  validation: '{held}'\n"
    )
    assert {str(rows), str(held), str(model)} <= volumes(machine.run("train", "mine", DRY_RUN="1", RUNTIME="docker"))


def test_data_and_model_of_a_run_are_mounted(machine):
    run, base, rows = (machine.path / name for name in ("disk/run-1", "base", "rows.jsonl"))
    (run / "final").mkdir(parents=True)
    base.mkdir()
    rows.write_text("{}")
    (run / "plan.json").write_text(json.dumps({"sections": {"data": {"train": [str(rows)]}}}))
    (run / "final" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    (machine.path / "runs").mkdir()
    (machine.path / "runs" / "run-1").symlink_to(run)
    printed = command(machine.run("generate", "run-1", DRY_RUN="1", RUNTIME="docker"))
    assert {f"{run}:{run}:rw", f"{base}:{base}:ro", f"{rows}:{rows}:ro"} <= set(values(printed, "--volume"))


def test_home_is_expanded_in_overrides(machine):
    home = machine.path / "home"
    home.mkdir()
    (home / "rows.jsonl").write_text("{}")
    printed = command(machine.run("train", "tiny", "data.train=~/rows.jsonl", "a='~/b'", DRY_RUN="1", RUNTIME="docker"))
    assert printed[-2:] == [f"data.train={home}/rows.jsonl", f"a='{home}/b'"]
    assert f"{home}/rows.jsonl" in {volume.partition(":")[0] for volume in values(printed, "--volume")}


def test_dry_run_creates_nothing(machine):
    before = {path.name for path in machine.path.iterdir()}
    for more in ({"DRY_RUN": "1"}, {}):
        done = machine.run(
            "inspect", "tiny", "--html", "page.html", *([] if more else ["--dry-run"]), RUNTIME="docker", **more
        )
        assert "--dry-run" not in command(done)
    assert {path.name for path in machine.path.iterdir()} == before


def test_gpus_of_commands_without_gpu_options(machine):
    printed = command(machine.run("generate", "x", DRY_RUN="1", GPUS="1", DEVICES=""))
    assert printed[0] == "docker" and values(printed, "--gpus") == ['"device=0"'] and printed[-2:] == ["generate", "x"]
    assert values(command(machine.run("smoke", DRY_RUN="1", DEVICES="1,3")), "--gpus") == ['"device=1,3"']


def test_only_generate_without_prompt_reads_standard_input(machine):
    """A background client that reads the terminal is stopped by it, or loops indefinitely."""
    variables = {"DRY_RUN": "1", "RUNTIME": "docker"}
    assert "--interactive" in command(machine.run("generate", "x", **variables))
    for arguments in (("generate", "x", "--prompt", "y"), ("train", "tiny")):
        assert not {"--interactive", "--tty"} & set(command(machine.run(*arguments, **variables)))


def test_rootless_docker_and_podman_named_docker(machine):
    variables = {"DRY_RUN": "1", "RUNTIME": "docker"}
    printed = command(
        machine.run("train", "8b", "--gpus", "1", RUNTIME_SECURITY_OPTIONS='["name=rootless"]', **variables)
    )
    assert values(printed, "--user") == ["0:0"] and not values(printed, "--ulimit"), (
        "root in the container is the user on the host"
    )
    assert values(
        command(machine.run("plan", "8b", RUNTIME_SECURITY_OPTIONS='["name=userns"]', **variables)), "--userns"
    ) == ["host"]
    assert command(machine.run("plan", "8b", RUNTIME_VERSION="podman version 4.3.1", **variables))[0] == "podman"


def test_container_without_gpus_disables_the_default_of_all_gpus(machine):
    printed = command(machine.run("plan", "8b", DRY_RUN="1", RUNTIME="docker"))
    assert "NVIDIA_VISIBLE_DEVICES=void" in values(printed, "--env")
    cpu = command(machine.run("smoke", DRY_RUN="1", VARIANT="cpu"))
    assert cpu[-1] == "--cpu" and not values(cpu, "--gpus")


def test_only_the_output_file_is_writable(machine):
    printed = command(machine.run("inspect", "tiny", "--html", "page.html", DRY_RUN="1", RUNTIME="docker"))
    page = machine.path / "page.html"
    assert f"{page}:{page}:rw" in values(printed, "--volume") and f"{machine.path}:{machine.path}:rw" not in printed
    run = machine.path / "old" / "run-1"
    run.mkdir(parents=True)
    printed = command(machine.run("report", str(run), DRY_RUN="1", RUNTIME="docker"))
    assert f"{run}:{run}:rw" in values(printed, "--volume")


@pytest.mark.parametrize("variable", ["NAME", "DATA", "RUN", "PROMPT", "ARGS"])
def test_hostile_value_stays_one_argument(machine, variable):
    option = {"NAME": "--name", "DATA": f"data.train={HOSTILE}", "RUN": "--run", "PROMPT": "--prompt", "ARGS": HOSTILE}[
        variable
    ]
    arguments = [option] if variable in ("DATA", "ARGS") else [option, HOSTILE]
    printed = command(machine.run("train", "tiny", *arguments, DRY_RUN="1", RUNTIME="docker"))
    assert printed[-len(arguments) :] == arguments
    assert not (machine.path / "written").exists()


@pytest.mark.parametrize("variable", ["IMAGE", "RUNTIME", "VARIANT", "RUNS_DIR", "HF_HOME", "MOUNTS"])
def test_hostile_variable_is_never_run(machine, variable):
    errors = {
        "IMAGE": "has no image",
        "RUNTIME": "expected local, docker or podman",
        "VARIANT": "expected cuda or cpu",
        "MOUNTS": "folder not found",
    }
    done = machine.run("plan", "tiny", **{"RUNTIME": "docker", "DRY_RUN": "1", variable: HOSTILE.replace("/", "")})
    if variable in errors:
        assert errors[variable] in error_line(done)
    else:
        place = machine.path / HOSTILE
        assert f"{place}:{place}:rw" in values(command(done), "--volume")
    assert not (machine.path / "written").exists()


@pytest.mark.parametrize(
    ("arguments", "variables", "line"),
    [
        (("--gpus", "9"), {}, "GPUS: 9 requested, but this machine has 4. Set GPUS=4"),
        (("--gpus", "1"), {"gpus": "", "RUNTIME": "docker", "VARIANT": "cpu"}, "GPUS: 1 requested, but this machine has none"),
        (("--devices", "0,7"), {}, "DEVICES: no GPU 7 on this machine. Available: 0, 1, 2, 3"),
        (("--gpus", "2"), {"images": ""}, "has no image localhost/sft-recipes:cuda. Build it with `make image VARIANT=cuda`"),
        (("--gpus", "2"), {"IMAGE": "other:1"}, "IMAGE: docker has no image other:1"),
        ((), {"RUNTIME": "docker", "RUNTIME_IS_DOWN": "1"}, "RUNTIME: the docker daemon does not answer"),
        ((), {"RUNTIME": "podman", "runtimes": ("docker",)}, "RUNTIME: podman is not installed"),
        ((), {"RUNTIME": "lxc"}, "RUNTIME: found 'lxc', expected local, docker or podman"),
        ((), {"RUNTIME": "apptainer"}, "RUNTIME: apptainer is for Slurm jobs only"),
        (("--gpus", "2"), {"VARIANT": "rocm"}, "VARIANT: found 'rocm', expected cuda or cpu"),
        (("--gpus", "2"), {"info": "{}"}, "RUNTIME: docker has no NVIDIA runtime and no CDI devices"),
        ((), {"RUNTIME": "docker", "RUNS_DIR": "/proc/runs"}, "RUNS_DIR: cannot create /proc/runs"),
        ((), {"RUNTIME": "docker", "RUNS_DIR": "/etc"}, "/etc: the image has its own. Use a folder inside it"),
        ((), {"RUNTIME": "docker", "RUNS_DIR": "a:b"}, "a path with a colon cannot be mounted"),
        ((), {"RUNTIME": "docker", "CONTAINER_ARGS": "a'b"}, "CONTAINER_ARGS: cannot split \"a'b\" into arguments"),
        ((), {"RUNTIME": "docker", "MOUNTS": "/tmp"}, "MOUNTS: /tmp: the image has its own. Set MOUNTS to folders of data"),
    ],
)  # fmt: skip
def test_invalid_input_is_rejected_in_one_line(machine, arguments, variables, line):
    assert line in error_line(machine.run("train", "8b", *arguments, **variables))


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_runs_folder_of_another_user_is_rejected(machine):
    assert "/var is not writable and belongs to user 0" in error_line(
        machine.run("train", "tiny", RUNTIME="docker", RUNS_DIR="/var")
    )


def test_build_image_with_available_runtime(machine):
    printed = command(machine.run("image", DRY_RUN="1", BUILD_ARGS="--build-arg 'BASE_IMAGE=my base'"))
    assert (
        printed[:4] == ["env", "DOCKER_BUILDKIT=1", "docker", "build"]
        and "TORCH=cuda" in printed
        and printed[-1] == str(machine.checkout)
    )
    assert printed[-3:-1] == ["--build-arg", "BASE_IMAGE=my base"], "the last one counts"
    printed = command(machine.run("image", DRY_RUN="1", RUNTIME="podman", VARIANT="cpu", IMAGE="registry/mine:2"))
    assert printed[0] == "podman" and values(printed, "--tag") == ["registry/mine:2"] and "TORCH=cpu" in printed
    assert "RUNTIME: neither docker nor podman answers" in error_line(machine.run("image", runtimes=()))
    assert "TORCH=cuda" in command(machine.run("image", DRY_RUN="1", gpus="")), "a build host has no GPU"


def test_smoke_test_mounts_nothing(machine):
    printed = command(machine.run("smoke", DRY_RUN="1", HF_TOKEN=SECRET, CONTAINER_ARGS="--memory '8 g'"))
    assert values(printed, "--network") == ["none"] and not values(printed, "--volume") and "HF_TOKEN" not in printed
    assert values(printed, "--memory") == ["8 g"] and printed[-1] == "/opt/sft-recipes/docker/smoke.sh"
    assert not values(printed, "--user"), "the user of the image"
    assert command(machine.run("smoke", DRY_RUN="1", gpus=""))[-1] == "--cpu"
    assert "the smoke test runs in the image only" in error_line(machine.run("smoke", RUNTIME="local"))


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
