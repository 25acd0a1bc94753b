"""The CPU variant of the image, built and run with podman: contents, user, files written, signals, secrets."""

import json
import os
import re
import shlex
import subprocess
import tarfile
import time
import urllib.error
import urllib.request

import pytest
from helpers.container_image import PLANTED_KEY, base, image, podman_environment
from helpers.workplace import HANG_SECONDS, REPOSITORY

from sft_recipes.tools import doctor

__all__ = ["base", "image", "podman_environment"]  # fixtures

# More steps than any test waits for: every run is stopped.
SETTINGS = (
    "trainer.max_steps=800 trainer.eval_steps=400 trainer.save_steps=400 trainer.logging_steps=1 "
    "data.max_eval_samples=20 generation.show=0 generation.score=0"
)
# Largest size of the CPU variant in bytes: torch, pyarrow, transformers and bitsandbytes are half of it.
MAX_IMAGE_BYTES = 2.6e9
OTHER_USER = 1234


def test_smoke_test_passes(image):
    done = image.make("smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    steps = {step["name"]: step for step in result["steps"]}
    assert result["passed"] and "sft-recipes:test" in result["image"]
    assert steps["confined"]["last_line"] == "user 10000, root read-only, no network"
    trained = {f"train: {strategy}" for strategy in ("single", "ddp", "zero2", "zero3", "fsdp2")}
    assert steps.keys() == {"confined", "doctor", *trained, "kill-and-resume", "generate"}


def test_image_contains_no_key(image):
    keys, layers = [], 0
    with (
        subprocess.Popen(["podman", "save", image.name], env=image.variables, stdout=subprocess.PIPE) as saving,
        tarfile.open(fileobj=saving.stdout, mode="r|") as archive,
    ):
        for member in archive:
            if not member.isreg():
                continue  # a link to a layer
            layers += member.name.endswith(".tar")
            keys += [member.name] if holds(archive.extractfile(member), PLANTED_KEY.encode()) else []
    assert layers >= 2 and keys == []
    history = podman_output(image, "history", "--no-trunc", image.name)
    assert "COPY" in history and PLANTED_KEY not in history
    assert image.run("sh", "-c", "ls -A /opt/sft-recipes").split() == [
        "LICENSE", "Makefile", "REVISION", "accelerate_configs", "deepspeed_configs", "docker", "pyproject.toml", "recipes",
        "requirements", "sft_recipes",
    ]  # fmt: skip


def holds(file, key):
    """Whether an uncompressed file contains these bytes, including across the edges of the parts read."""
    rest = b""
    while file is not None and (part := file.read(1 << 24)):
        if key in rest + part:
            return True
        rest = part[-len(key) :]
    return False


def podman_output(image, *arguments):
    return subprocess.run(
        ["podman", *arguments], env=image.variables, capture_output=True, text=True, check=True
    ).stdout


def test_image_size_and_labels(image):
    (inspected,) = json.loads(podman_output(image, "image", "inspect", image.name))
    assert inspected["Size"] < MAX_IMAGE_BYTES, f"{inspected['Size'] / 1e9:.2f} GB"
    labels = inspected["Labels"]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=image.checkout, capture_output=True, text=True, check=True
    )
    assert labels["org.opencontainers.image.revision"].startswith(commit.stdout.strip())
    assert inspected["Config"]["User"] == "10000:10000" and inspected["Config"]["Entrypoint"] == ["/usr/bin/tini", "--"]


def test_installed_packages_equal_the_lock(image):
    listed = json.loads(image.run("python", "-m", "pip", "list", "--format", "json"))
    installed = {normalize(package["name"]): package["version"] for package in listed}
    assert {normalize(name): version for name, version in doctor.locked("cpu").items()}.items() <= installed.items()
    text = "".join((REPOSITORY / "requirements" / f"{name}.txt").read_text() for name in ("common", "cpu"))
    locked = {normalize(name) for name in re.findall(r"^([\w.-]+)==", text, re.MULTILINE)}
    assert installed.keys() - locked == {"pip"}, "part of every virtual environment"


def normalize(name):
    """Return the normalized package name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_image_has_compiled_operators_and_no_compiler(image):
    probe = json.loads(image.run("python", "-m", "sft_recipes.training.torch_probe").splitlines()[-1])
    assert probe["operators"] == ["deepspeed_shm_comm_op"] and not probe["compiler"]
    assert image.run("sh", "-c", "ls /usr/lib/*/libibverbs.so.1 /usr/lib/*/librdmacm.so.1").count("\n") == 2


def test_image_has_the_bytecode_of_what_a_run_imports(image):
    """Nothing can be written in it, so a process would compile what is missing or stale, each time."""
    program = "import sft_recipes.training.trainer, deepspeed, peft, transformers.models.llama.modeling_llama"
    done = subprocess.run(
        ["podman", "run", "--rm", image.name, "python", "-v", "-c", program],
        env=image.variables, capture_output=True, text=True, check=True,
    )  # fmt: skip
    loaded = re.findall(r"^# code object from (.*)$", done.stderr, re.MULTILINE)
    assert len(loaded) > 3000
    assert [path for path in loaded if path.startswith(("/opt/venv/", "/opt/sft-recipes/"))] == [], "from its source"


def manifest(run):
    return json.loads((run / "manifest.json").read_text())


def train_command(runs):
    return ["make", "train", "NAME=stopped", f"RUNS_DIR={runs}", f"ARGS={SETTINGS}"]


def await_step(run, step, process):
    until = time.monotonic() + HANG_SECONDS
    while not ((run / "metrics.jsonl").is_file() and f'"step": {step},' in (run / "metrics.jsonl").read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "no progress"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("all the 'runs'")


@pytest.fixture(scope="module")
def stopped(image, runs):
    """Stop the container of a run, as a scheduler does; return its output and its manifest."""
    process = subprocess.Popen(
        train_command(runs), cwd=image.checkout, env={**image.variables, "SANITY": "skip"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    await_step(runs / "stopped", 5, process)
    (container,) = podman_output(image, "ps", "--quiet").split()
    podman_output(image, "stop", container)
    return process.communicate(timeout=HANG_SECONDS)[0], manifest(runs / "stopped")


def test_stopped_container_saves_a_checkpoint(stopped, runs):
    output, state = stopped
    assert "Error 75" in output, "the exit code of the run; make itself exits with 0 or 2"
    assert (state["state"], state["exit_code"]) == ("stopped", 75) and state["steps"] >= 5
    assert (runs / "stopped" / f"checkpoint-{state['steps']}" / "complete.json").is_file()
    (start,) = state["starts"]
    assert "sft-recipes:test" in start["image"] and len(start["code"]["commit"]) == 40
    assert PLANTED_KEY not in output + json.dumps(state)


def test_ctrl_c_saves_and_the_run_resumes(image, stopped, runs):
    process = subprocess.Popen(
        ["script", "--quiet", "--return", "--flush", "--command", shlex.join(train_command(runs)), "/dev/null"],
        cwd=image.checkout, env={**image.variables, "SANITY": "skip", "TERM": "xterm"}, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    before = stopped[1]["steps"]
    await_step(runs / "stopped", before + 2, process)
    process.stdin.write("\x03")
    process.stdin.flush()
    output = process.communicate(timeout=HANG_SECONDS)[0]
    assert f"from checkpoint-{before}" in output
    state = manifest(runs / "stopped")
    assert (state["state"], state["exit_code"]) == ("stopped", 75), output
    assert state["steps"] > before and (runs / "stopped" / f"checkpoint-{state['steps']}" / "complete.json").is_file()


def test_written_files_belong_to_the_user(stopped, runs):
    written = list((runs / "stopped").rglob("*"))
    assert len(written) > 10 and {path.stat().st_uid for path in written} == {os.geteuid()}


def test_container_runs_as_any_user_id(image, tmp_path):
    """The image has no name for it."""
    others = tmp_path / "others"
    others.mkdir()
    os.chown(others, OTHER_USER, OTHER_USER)
    mapped = f"{image.variables['CONTAINER_ARGS']} --user {OTHER_USER}:{OTHER_USER}"
    done = image.make("inspect", "ARGS=data.max_eval_samples=20", RUNS_DIR=str(others), CONTAINER_ARGS=mapped)
    assert done.returncode == 0, done.stdout + done.stderr
    written = list(others.rglob("*"))
    assert written and {path.stat().st_uid for path in written} == {OTHER_USER}


def test_runs_folder_of_another_user_is_rejected(image, tmp_path):
    """Root of this machine has no privileges in the container."""
    others = tmp_path / "others"
    others.mkdir(mode=0o700)
    os.chown(others, OTHER_USER, OTHER_USER)
    done = image.make("train", "NAME=mine", f"RUNS_DIR={others}", SANITY="skip")
    assert "error: " in done.stderr and "Permission denied" in done.stderr and "Error 2" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and list(others.iterdir()) == []


def test_other_commands_run_in_the_container(image, stopped, runs):
    assert '"optimizer_steps"' in image.make("plan", "ARGS=--json", RUNS_DIR=str(runs)).stdout
    diagnosed = image.make("diagnose", "RUN=stopped", RUNS_DIR=str(runs))
    assert "stopped, step" in diagnosed.stdout, diagnosed.stdout + diagnosed.stderr


def test_named_data_is_mounted_and_missing_data_rejected(image, runs, tmp_path):
    rows, held_out = tmp_path / "my 'rows'.jsonl", tmp_path / "held,out.jsonl"
    for file, first in ((rows, 1), (held_out, 50)):
        lines = ({"prompt": f"{n} + {n}?", "completion": str(2 * n)} for n in range(first, first + 40))
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ("inspect", f"DATA={rows}", f"VALIDATION={held_out}", "ARGS=--json")
    done = image.make(*command, RUNS_DIR=str(runs))
    assert "my 'rows'.jsonl:1" in done.stdout, done.stdout + done.stderr
    missing = image.make("inspect", "DATA=/nowhere/rows.jsonl", RUNS_DIR=str(runs))
    assert "error: data.train" in missing.stderr and "MOUNTS=" in missing.stderr and "Error 2" in missing.stderr


def test_too_small_disk_is_rejected(image, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], check=True)
    try:
        done = image.make("train", f"RUNS_DIR={small}", SANITY="skip")
    finally:
        subprocess.run(["umount", small], check=True)
    assert "Error 2" in done.stderr and "error: RUNS_DIR: tiny needs up to" in done.stderr, done.stderr


@pytest.mark.parametrize("name", ["cuda", "flash-attn", "nvcc"])
def test_locked_cuda_files_are_in_the_package_index(name):
    """They cannot be built without CUDA's compiler; the index shows whether every locked file exists."""
    text = (REPOSITORY / "requirements" / f"{name}.txt").read_text()
    locked = re.findall(r"^([\w.-]+)==(\S+)(.*?)(?=^\w|\Z)", text, re.MULTILINE | re.DOTALL)
    assert locked
    for package, version, rest in locked:
        accepts = {"Accept": "application/vnd.pypi.simple.v1+json"}
        request = urllib.request.Request(f"https://pypi.org/simple/{package}/", headers=accepts)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                available = {file["hashes"].get("sha256") for file in json.load(answer)["files"]}
        except urllib.error.URLError as error:
            pytest.skip(f"the index does not answer: {error}")
        hashes = set(re.findall(r"sha256:(\w{64})", rest))
        assert hashes and hashes <= available, f"{package}=={version}"
