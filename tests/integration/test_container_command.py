"""Where a verb runs, and the command that takes it into a container. An engine that only answers stands in for docker
and podman here, and one for nvidia-smi; tests/container/ has a real engine."""

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
NASTY = "a b'c\"d$(touch written)`touch written`;&|*é"

ENGINE = """#!{python}
import json, os, sys
words = sys.argv[1:]
if words[:1] == ["info"]:
    if os.environ.get("ENGINE_IS_DOWN"):
        sys.exit("Cannot connect to the daemon")
    print(os.environ.get("ENGINE_OPTIONS", "[]") if "SecurityOptions" in words[-1] else os.environ["ENGINE_KNOWS"])
elif words == ["--version"]:
    print(os.environ.get("ENGINE_SAYS", "version 28"))
elif words[:2] == ["image", "inspect"]:
    sys.exit(0 if words[-1] in os.environ.get("ENGINE_HAS", "").split() else "no such image")
else:
    print(json.dumps({{"ran": words}}))
    sys.exit(75)
"""
NVIDIA_SMI = """#!/bin/sh
for one in $GPUS_HERE; do echo "$one"; done
"""


HERE = """#!/bin/sh
echo "here: $*"
"""


@pytest.fixture
def machine(tmp_path):
    """A machine with a checkout whose virtual environment does nothing, and with these engines, images and GPUs."""
    checkout, programs = tmp_path / "checkout", tmp_path / "programs"
    package = [
        f"sft_recipes/{name}.py"
        for name in ("__init__", "launch/__init__", "launch/mounts", "runtime/__init__", "runtime/timeouts")
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
    executable(checkout / ".venv" / "bin" / "python", HERE)
    for needed in ("sh", "bash", "git", "cat", "env"):
        (programs / needed).symlink_to(shutil.which(needed))

    def run(*words, engines=("docker", "podman"), gpus="0 1 2 3", images=None, knows='{"nvidia": 1}', **variables):
        for name in ("docker", "podman", "nvidia-smi", "python"):
            (programs / name).unlink(missing_ok=True)
        for engine in engines:
            executable(programs / engine, ENGINE.format(python=sys.executable))
        if gpus:
            executable(programs / "nvidia-smi", NVIDIA_SMI)
        executable(programs / "python", HERE)
        images = "localhost/sft-recipes:cuda localhost/sft-recipes:cpu" if images is None else images
        environment = {
            "PATH": str(programs), "HOME": str(tmp_path / "home"), "RUNS_DIR": str(tmp_path / "runs"),
            "GPUS_HERE": gpus, "ENGINE_HAS": images, "ENGINE_KNOWS": knows, **variables,
        }  # fmt: skip
        module = checkout / "sft_recipes" / "launch" / "container.py"
        return subprocess.run(
            [sys.executable, "-I", str(module), str(checkout / ".venv"), *words],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    return SimpleNamespace(run=run, checkout=checkout, path=tmp_path)


def command(done):
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def values(command, option):
    return [command[at + 1] for at, word in enumerate(command) if word == option]


def refused(done):
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == "" and lines[-1].startswith("error: "), (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return lines[-1]


def test_with_gpus_and_an_engine_it_runs_in_the_image_and_is_that_process(machine):
    done = machine.run("train", "8b", "--gpus", "2")
    assert done.returncode == 75, "the engine's own exit code comes back"
    assert json.loads(done.stdout)["ran"][:2] == ["run", "--rm"]
    assert "in a container: docker, localhost/sft-recipes:cuda, GPUs 0,1 (RUNTIME=local" in done.stderr


def test_what_is_printed_is_the_whole_command(machine):
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
    assert printed[-6:] == ["-m", "sft_recipes", "train", "8b", "--gpus", "2"], "pasted, it trains"


def test_keys_are_passed_by_name_and_printed_nowhere(machine):
    variables = {"HF_TOKEN": SECRET, "WANDB_API_KEY": SECRET, "NCCL_SOME": SECRET, "GPUS": "2"}
    for words in ({"DRY_RUN": "1"}, {}):
        done = machine.run("train", "8b", "--gpus", "2", **variables, **words)
        assert SECRET not in done.stdout + done.stderr and "WANDB_API_KEY" in done.stdout


@pytest.mark.parametrize(
    "variable",
    [
        "CUDA_LAUNCH_BLOCKING", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_DEVICE_ORDER", "CUDA_MODULE_LOADING",
        "TRITON_INTERPRET", "TRITON_PRINT_AUTOTUNING", "DS_ACCELERATOR", "DS_SKIP_CUDA_CHECK", "DS_BUILD_FUSED_ADAM",
        "FLASH_ATTENTION_DETERMINISTIC", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NVML_BASED_CUDA_CHECK",
    ],
)  # fmt: skip
def test_variables_of_cuda_triton_deepspeed_and_torch_are_passed_by_name(machine, variable):
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
def test_variables_that_describe_the_host_are_not_passed(machine, variable):
    printed = command(machine.run("train", "8b", "--gpus", "1", DRY_RUN="1", **{variable: "0"}))
    assert variable not in printed


@pytest.mark.parametrize(
    "variable",
    ["TRITON_CACHE_DIR", "TRITON_DUMP_DIR", "CUDA_CACHE_PATH", "PYTORCH_KERNEL_CACHE_PATH", "CUDA_MPS_PIPE_DIRECTORY"],
)
def test_caches_of_compiled_kernels_are_mounted_where_they_are(machine, variable):
    """The image's own lie in /tmp and are lost with the container."""
    folder = machine.path / "caches" / "kernels"
    done = machine.run("train", "tiny", RUNTIME="docker", **{variable: str(folder)})
    ran = json.loads(done.stdout)["ran"]
    assert f"{folder}:{folder}:rw" in values(ran, "--volume") and variable in values(ran, "--env")
    assert folder.is_dir(), "made as the user: an engine would make it as root"


@pytest.mark.parametrize(
    ("words", "device", "inside"),
    [
        (("--gpus", "4"), "0,1,2,3", ["--gpus", "4"]),
        (("--devices", "0,2"), "0,2", ["--gpus", "2"]),
        (("--gpus", "2", "--devices", "1,3"), "1,3", ["--gpus", "2"]),
        (("--gpus", "1", "a=b"), "0", ["--gpus", "1", "a=b"]),
    ],
)
def test_the_container_gets_just_the_gpus_asked_for(machine, words, device, inside):
    printed = command(machine.run("train", "8b", *words, DRY_RUN="1"))
    assert values(printed, "--gpus")[0] == f'"device={device}"'
    assert printed[printed.index("sft_recipes") + 3 :] == inside and "--devices" not in printed
    with_cdi = machine.run("train", "8b", *words, DRY_RUN="1", RUNTIME="podman")
    if with_cdi.returncode == 2:  # this machine describes no devices
        assert "install the NVIDIA Container Toolkit" in refused(with_cdi)


def test_a_mask_of_gpus_is_kept(machine):
    printed = command(machine.run("train", "8b", "--gpus", "2", DRY_RUN="1", CUDA_VISIBLE_DEVICES="3,1,0"))
    assert values(printed, "--gpus")[0] == '"device=3,1"' and "CUDA_VISIBLE_DEVICES" not in printed


@pytest.mark.parametrize(
    ("verb", "gets"), [("train", True), ("generate", True), ("doctor", True), ("plan", False), ("report", False)]
)
def test_every_verb_runs_there_and_only_those_that_compute_get_gpus(machine, verb, gets):
    printed = command(machine.run(verb, "x", DRY_RUN="1", RUNTIME="docker"))
    assert ('"device=0,1,2,3"' in printed) == gets and printed[-2:] == [verb, "x"]


@pytest.mark.parametrize(
    ("variables", "words", "where"),
    [
        ({}, ("--gpus", "2"), "docker"),
        ({"engines": ("podman",), "RUNTIME": "podman"}, ("--gpus", "0"), "podman"),
        ({"RUNTIME": "podman"}, (), "podman"),
        ({"RUNTIME": "local"}, ("--gpus", "2"), "local"),
        ({}, (), "local"),
        ({}, ("--gpus", "0"), "local"),
        ({"gpus": ""}, ("--gpus", "2"), "local"),  # where it is refused as ever: this machine has none
        ({"ENGINE_IS_DOWN": "1"}, ("--gpus", "2"), "local"),
        ({"engines": ()}, ("--gpus", "2"), "local"),
    ],
)
def test_where_a_verb_runs(machine, variables, words, where):
    done = machine.run("plan", "tiny", *words, **variables)
    if where == "local":
        assert done.stdout.startswith("here: -m sft_recipes plan tiny"), done.stderr
        asked_in_vain = words == ("--gpus", "2") and variables.get("gpus", "4") and variables.get("RUNTIME") != "local"
        assert ("without a container: neither docker nor podman answers here" in done.stderr) == bool(asked_in_vain)
    else:
        assert done.returncode == 75 and f"in a container: {where}," in done.stderr


def test_data_outside_is_mounted_and_never_silently_absent(machine):
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
    words = (f"data.train=[{rows}, '{second}']", f"data.validation={link}", f"model.name_or_path={model}")
    printed = command(machine.run("train", "tiny", *words, DRY_RUN="1", RUNTIME="podman", VARIANT="cpu", gpus=""))
    mounted = {volume.rsplit(":", 1)[0].partition(":")[0] for volume in values(printed, "--volume")}
    assert {str(path) for path in (rows, second, link, model, blob)} <= mounted
    assert all(volume.endswith(":ro") for volume in values(printed, "--volume") if str(outside) in volume)
    relative = command(
        machine.run("train", "tiny", "data.train=elsewhere/my rows.jsonl", DRY_RUN="1", RUNTIME="docker")
    )
    assert any(volume.startswith(f"{rows}:") for volume in values(relative, "--volume"))


def test_more_can_be_mounted(machine):
    (machine.path / "models").mkdir()
    printed = command(
        machine.run("plan", "tiny", DRY_RUN="1", RUNTIME="docker", MOUNTS=f"{machine.path / 'models'}:/etc/ssl")
    )
    assert {f"{machine.path / 'models'}:{machine.path / 'models'}:ro", "/etc/ssl:/etc/ssl:ro"} <= set(
        values(printed, "--volume")
    )
    assert "MOUNTS: /nowhere: there is no such folder on this machine" in refused(
        machine.run("plan", "tiny", RUNTIME="docker", MOUNTS="/nowhere")
    )


def volumes(done):
    return {volume.partition(":")[0] for volume in values(command(done), "--volume")}


def test_links_in_a_folder_of_data_lead_somewhere_there_too(machine):
    """A dangling link would be passed over, and the run train on fewer rows."""
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


def test_a_chain_of_links_beside_the_code_is_followed_to_its_end(machine):
    (machine.path / "big").mkdir()
    (machine.path / "mid").symlink_to(machine.path / "big")
    (machine.checkout / "data").symlink_to(machine.path / "mid")
    word = f"data.train={machine.checkout / 'data'}"
    assert str(machine.path / "mid") in volumes(machine.run("train", "tiny", word, DRY_RUN="1", RUNTIME="docker"))


def test_what_a_recipe_names_is_there(machine):
    rows, held, model = (machine.path / name for name in ("rows.jsonl", "held out.jsonl", "model"))
    for file in (rows, held):
        file.write_text("{}")
    model.mkdir()
    (machine.checkout / "recipes" / "mine.yaml").write_text(
        f"model:\n  name_or_path: {model}   # ours\ndata:\n  train:\n    - {rows}\n  validation: '{held}'\n"
    )
    assert {str(rows), str(held), str(model)} <= volumes(machine.run("train", "mine", DRY_RUN="1", RUNTIME="docker"))


def test_a_verb_over_a_run_sees_what_the_run_was_made_of(machine):
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


def test_home_is_spelled_out(machine):
    home = machine.path / "home"
    home.mkdir()
    (home / "rows.jsonl").write_text("{}")
    printed = command(machine.run("train", "tiny", "data.train=~/rows.jsonl", "a='~/b'", DRY_RUN="1", RUNTIME="docker"))
    assert printed[-2:] == [f"data.train={home}/rows.jsonl", f"a='{home}/b'"]
    assert f"{home}/rows.jsonl" in {volume.partition(":")[0] for volume in values(printed, "--volume")}


def test_nothing_is_made_by_a_dry_run(machine):
    before = {path.name for path in machine.path.iterdir()}
    for more in ({"DRY_RUN": "1"}, {}):
        done = machine.run(
            "inspect", "tiny", "--html", "page.html", *([] if more else ["--dry-run"]), RUNTIME="docker", **more
        )
        assert "--dry-run" not in command(done)
    assert {path.name for path in machine.path.iterdir()} == before


def test_a_verb_without_options_for_gpus_takes_them_from_make(machine):
    printed = command(machine.run("generate", "x", DRY_RUN="1", GPUS="1", DEVICES=""))
    assert printed[0] == "docker" and values(printed, "--gpus") == ['"device=0"'] and printed[-2:] == ["generate", "x"]
    assert values(command(machine.run("smoke", DRY_RUN="1", DEVICES="1,3")), "--gpus") == ['"device=1,3"']


def test_standard_input_is_the_containers_for_prompts_alone(machine):
    """A client in the background that reads the terminal is stopped by it, or turns for ever."""
    asked = {"DRY_RUN": "1", "RUNTIME": "docker"}
    assert "--interactive" in command(machine.run("generate", "x", **asked))
    for words in (("generate", "x", "--prompt", "y"), ("train", "tiny")):
        assert not {"--interactive", "--tty"} & set(command(machine.run(*words, **asked)))


def test_rootless_docker_and_podman_by_dockers_name(machine):
    asked = {"DRY_RUN": "1", "RUNTIME": "docker"}
    printed = command(machine.run("train", "8b", "--gpus", "1", ENGINE_OPTIONS='["name=rootless"]', **asked))
    assert values(printed, "--user") == ["0:0"] and not values(printed, "--ulimit"), (
        "root in there is the user out here"
    )
    assert values(command(machine.run("plan", "8b", ENGINE_OPTIONS='["name=userns"]', **asked)), "--userns") == ["host"]
    assert command(machine.run("plan", "8b", ENGINE_SAYS="podman version 4.3.1", **asked))[0] == "podman"


def test_a_container_without_gpus_gets_none_by_its_engines_default(machine):
    printed = command(machine.run("plan", "8b", DRY_RUN="1", RUNTIME="docker"))
    assert "NVIDIA_VISIBLE_DEVICES=void" in values(printed, "--env")
    cpu = command(machine.run("smoke", DRY_RUN="1", VARIANT="cpu"))
    assert cpu[-1] == "--cpu" and not values(cpu, "--gpus")


def test_a_page_that_is_asked_for_can_be_written_and_nothing_beside_it(machine):
    printed = command(machine.run("inspect", "tiny", "--html", "page.html", DRY_RUN="1", RUNTIME="docker"))
    page = machine.path / "page.html"
    assert f"{page}:{page}:rw" in values(printed, "--volume") and f"{machine.path}:{machine.path}:rw" not in printed
    run = machine.path / "old" / "run-1"
    run.mkdir(parents=True)
    printed = command(machine.run("report", str(run), DRY_RUN="1", RUNTIME="docker"))
    assert f"{run}:{run}:rw" in values(printed, "--volume")


@pytest.mark.parametrize("variable", ["NAME", "DATA", "RUN", "PROMPT", "ARGS"])
def test_what_is_typed_stays_a_word(machine, variable):
    option = {"NAME": "--name", "DATA": f"data.train={NASTY}", "RUN": "--run", "PROMPT": "--prompt", "ARGS": NASTY}[
        variable
    ]
    words = [option] if variable in ("DATA", "ARGS") else [option, NASTY]
    printed = command(machine.run("train", "tiny", *words, DRY_RUN="1", RUNTIME="docker"))
    assert printed[-len(words) :] == words
    assert not (machine.path / "written").exists()


@pytest.mark.parametrize("variable", ["IMAGE", "RUNTIME", "VARIANT", "RUNS_DIR", "HF_HOME", "MOUNTS"])
def test_nothing_typed_is_a_command(machine, variable):
    wanted = {
        "IMAGE": "has no image",
        "RUNTIME": "is not known",
        "VARIANT": "is not known",
        "MOUNTS": "there is no such folder",
    }
    done = machine.run("plan", "tiny", **{"RUNTIME": "docker", "DRY_RUN": "1", variable: NASTY.replace("/", "")})
    if variable in wanted:
        assert wanted[variable] in refused(done)
    else:
        place = machine.path / NASTY
        assert f"{place}:{place}:rw" in values(command(done), "--volume")
    assert not (machine.path / "written").exists()


@pytest.mark.parametrize(
    ("words", "variables", "line"),
    [
        (("--gpus", "9"), {}, "GPUS: 9 asked for, but this machine has 4; say GPUS=4"),
        (("--gpus", "1"), {"gpus": "", "RUNTIME": "docker", "VARIANT": "cpu"}, "GPUS: 1 asked for, but this machine has none"),
        (("--devices", "0,7"), {}, "DEVICES: no GPU 7 here; there are: 0, 1, 2, 3"),
        (("--gpus", "2"), {"images": ""}, "has no image localhost/sft-recipes:cuda; build it with `make image VARIANT=cuda`"),
        (("--gpus", "2"), {"IMAGE": "other:1"}, "IMAGE: docker has no image other:1"),
        ((), {"RUNTIME": "docker", "ENGINE_IS_DOWN": "1"}, "RUNTIME: docker is here, but its daemon does not answer"),
        ((), {"RUNTIME": "podman", "engines": ("docker",)}, "RUNTIME: there is no podman here"),
        ((), {"RUNTIME": "lxc"}, "RUNTIME: 'lxc' is not known; say local, docker or podman"),
        ((), {"RUNTIME": "apptainer"}, "RUNTIME: apptainer starts a Slurm job's image"),
        (("--gpus", "2"), {"VARIANT": "rocm"}, "VARIANT: 'rocm' is not known; say cuda or cpu"),
        (("--gpus", "2"), {"knows": "{}"}, "RUNTIME: docker cannot give GPUs to a container here"),
        ((), {"RUNTIME": "docker", "RUNS_DIR": "/proc/runs"}, "RUNS_DIR: /proc/runs cannot be made"),
        ((), {"RUNTIME": "docker", "RUNS_DIR": "/etc"}, "/etc: a container has its own; name a folder in it"),
        ((), {"RUNTIME": "docker", "RUNS_DIR": "a:b"}, "engines cannot mount a path with a colon in it"),
        ((), {"RUNTIME": "docker", "CONTAINER_ARGS": "a'b"}, "CONTAINER_ARGS: \"a'b\" cannot be read as words"),
        ((), {"RUNTIME": "docker", "MOUNTS": "/tmp"}, "MOUNTS: /tmp: a container has its own; name a folder of data"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(machine, words, variables, line):
    assert line in refused(machine.run("train", "8b", *words, **variables))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_another_users_runs_are_refused(machine):
    assert "/var belongs to user 0 and is not yours to write" in refused(
        machine.run("train", "tiny", RUNTIME="docker", RUNS_DIR="/var")
    )


def test_an_image_is_built_by_the_engine_that_answers(machine):
    printed = command(machine.run("image", DRY_RUN="1", BUILD_ARGS="--build-arg 'BASE_IMAGE=my base'"))
    assert (
        printed[:4] == ["env", "DOCKER_BUILDKIT=1", "docker", "build"]
        and "TORCH=cuda" in printed
        and printed[-1] == str(machine.checkout)
    )
    assert printed[-3:-1] == ["--build-arg", "BASE_IMAGE=my base"], "the last one counts"
    printed = command(machine.run("image", DRY_RUN="1", RUNTIME="podman", VARIANT="cpu", IMAGE="registry/mine:2"))
    assert printed[0] == "podman" and values(printed, "--tag") == ["registry/mine:2"] and "TORCH=cpu" in printed
    assert "RUNTIME: neither docker nor podman answers here" in refused(machine.run("image", engines=()))
    assert "TORCH=cuda" in command(machine.run("image", DRY_RUN="1", gpus="")), "a build host has no GPU"


def test_the_smoke_test_sees_the_image_alone(machine):
    printed = command(machine.run("smoke", DRY_RUN="1", HF_TOKEN=SECRET, CONTAINER_ARGS="--memory '8 g'"))
    assert values(printed, "--network") == ["none"] and not values(printed, "--volume") and "HF_TOKEN" not in printed
    assert values(printed, "--memory") == ["8 g"] and printed[-1] == "/opt/sft-recipes/docker/smoke.sh"
    assert not values(printed, "--user"), "the image's own"
    assert command(machine.run("smoke", DRY_RUN="1", gpus=""))[-1] == "--cpu"
    assert "the smoke test is the image's" in refused(machine.run("smoke", RUNTIME="local"))


def test_inside_the_image_it_runs_there(machine):
    done = machine.run("plan", "tiny", RUNTIME="docker", SFT_RECIPES_IMAGE="x")
    assert (done.returncode, done.stdout) == (0, "here: -m sft_recipes plan tiny\n")


def test_operators_are_compiled_for_any_machine(tmp_path):
    (tmp_path / "c++").write_text('#!/bin/sh\nfor one; do echo "$one"; done\n')
    (tmp_path / "c++").chmod(0o755)
    wrapped = [str(REPOSITORY / "docker" / "portable-cxx"), "-march=native", "-D__AVX512__", "-O3", "a b.cpp"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(wrapped, env=environment, capture_output=True, text=True, check=True)
    machine = ["-march=x86-64-v3"] if os.uname().machine == "x86_64" else []
    assert done.stdout.splitlines() == [*machine, "-D__AVX256__", "-O3", "a b.cpp"]
