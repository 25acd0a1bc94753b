"""The image of the CPU's variant, really built and run: what is in it, who it runs as, and what leaves it."""

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
from helpers.container_image import PLANTED_KEY, base, engine, image
from helpers.workplace import HANG_SECONDS, REPOSITORY

from sft_recipes.tools import doctor

__all__ = ["base", "engine", "image"]  # fixtures

# More steps than anybody waits for: every run here is stopped.
SETTINGS = (
    "trainer.max_steps=800 trainer.eval_steps=400 trainer.save_steps=400 trainer.logging_steps=1 "
    "data.max_eval_samples=20 generation.show=0 generation.exact_match=0"
)
# What the CPU's variant may take, in bytes: torch, pyarrow, transformers and bitsandbytes are half of it.
BUDGET = 2.6e9
SOMEBODY = 1234


def test_the_smoke_test_passes_without_root_network_or_a_writable_root(image):
    done = image.make("smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    steps = {step["name"]: step for step in told["steps"]}
    assert told["passed"] and "sft-recipes:tried" in told["image"]
    assert steps["confined"]["said"] == "user 10000, root read-only, no network"
    trained = {f"train: {engine}" for engine in ("single", "ddp", "zero2", "zero3", "fsdp2")}
    assert steps.keys() == {"confined", "doctor", *trained, "kill-and-resume", "generate"}


def test_nothing_of_a_key_is_in_a_layer_or_its_history(image):
    keys, layers = [], 0
    with (
        subprocess.Popen(["podman", "save", image.name], env=image.variables, stdout=subprocess.PIPE) as saving,
        tarfile.open(fileobj=saving.stdout, mode="r|") as archive,
    ):
        for member in archive:
            if not member.isreg():
                continue  # a layer's other name
            layers += member.name.endswith(".tar")
            keys += [member.name] if holds(archive.extractfile(member), PLANTED_KEY.encode()) else []
    assert layers >= 2 and keys == []
    history = asked(image, "history", "--no-trunc", image.name)
    assert "COPY" in history and PLANTED_KEY not in history
    assert image.run("sh", "-c", "ls -A /opt/sft-recipes").split() == [
        "LICENSE", "Makefile", "REVISION", "accelerate_configs", "deepspeed_configs", "docker", "pyproject.toml", "recipes",
        "requirements", "sft_recipes",
    ]  # fmt: skip


def holds(file, key):
    """Whether an uncompressed file has these bytes, across the edges of what is read at once too."""
    rest = b""
    while file is not None and (part := file.read(1 << 24)):
        if key in rest + part:
            return True
        rest = part[-len(key) :]
    return False


def asked(image, *words):
    """What podman says."""
    return subprocess.run(["podman", *words], env=image.variables, capture_output=True, text=True, check=True).stdout


def test_the_image_keeps_to_its_budget_and_says_what_it_is(image):
    (told,) = json.loads(asked(image, "image", "inspect", image.name))
    assert told["Size"] < BUDGET, f"{told['Size'] / 1e9:.2f} GB"
    labels = told["Labels"]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=image.checkout, capture_output=True, text=True, check=True
    )
    assert labels["org.opencontainers.image.revision"].startswith(commit.stdout.strip())
    assert labels["sft-recipes.version.torch"] == doctor.locked("cpu")["torch"].partition("+")[0]
    assert told["Config"]["User"] == "10000:10000" and told["Config"]["Entrypoint"] == ["/usr/bin/tini", "--"]
    assert told["Healthcheck"]["Test"][-1] == "sft_recipes.launch.healthcheck"
    assert image.run("python", "-m", "sft_recipes.launch.healthcheck") == "healthy\n"


def test_the_lock_was_obeyed(image):
    listed = json.loads(image.run("python", "-m", "pip", "list", "--format", "json"))
    here = {plain(one["name"]): one["version"] for one in listed}
    assert {plain(name): version for name, version in doctor.locked("cpu").items()}.items() <= here.items()
    text = "".join((REPOSITORY / "requirements" / f"{name}.txt").read_text() for name in ("common", "cpu"))
    named = {plain(name) for name in re.findall(r"^([\w.-]+)==", text, re.MULTILINE)}
    assert here.keys() - named == {"pip"}, "what the venv brings"


def plain(name):
    """A package's name as the index has it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_operators_are_there_compiled_and_no_compiler_is(image):
    seen = json.loads(image.run("python", "-m", "sft_recipes.training.torch_probe").splitlines()[-1])
    assert seen["operators"] == ["deepspeed_shm_comm_op"] and not seen["compiler"]
    assert image.run("sh", "-c", "ls /usr/lib/*/libibverbs.so.1 /usr/lib/*/librdmacm.so.1").count("\n") == 2


def manifest(run):
    return json.loads((run / "manifest.json").read_text())


def words_of(runs):
    return ["make", "train", "NAME=stopped", f"RUNS_DIR={runs}", f"ARGS={SETTINGS}"]


def await_step(run, step, process):
    until = time.monotonic() + HANG_SECONDS
    while not ((run / "metrics.jsonl").is_file() and f'"step": {step},' in (run / "metrics.jsonl").read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "hangs"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("all the 'runs'")


@pytest.fixture(scope="module")
def stopped(image, runs):
    """What was said of a run whose container was asked to stop, as a scheduler does; and its manifest then."""
    process = subprocess.Popen(
        words_of(runs), cwd=image.checkout, env={**image.variables, "SANITY": "skip"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    await_step(runs / "stopped", 5, process)
    (container,) = asked(image, "ps", "--quiet").split()
    asked(image, "stop", container)
    return process.communicate(timeout=HANG_SECONDS)[0], manifest(runs / "stopped")


def test_a_container_that_is_stopped_saves_and_says_so(stopped, runs):
    said, told = stopped
    assert "Error 75" in said, "the run's own exit code; Make has 0 and 2 alone"
    assert (told["state"], told["exit_code"]) == ("stopped", 75) and told["steps"] >= 5
    assert (runs / "stopped" / f"checkpoint-{told['steps']}" / "complete.json").is_file()
    (start,) = told["starts"]
    assert "sft-recipes:tried" in start["image"] and len(start["code"]["commit"]) == 40
    assert PLANTED_KEY not in said + json.dumps(told)


def test_ctrl_c_in_a_terminal_saves_as_well_and_the_run_goes_on(image, stopped, runs):
    process = subprocess.Popen(
        ["script", "--quiet", "--return", "--flush", "--command", shlex.join(words_of(runs)), "/dev/null"],
        cwd=image.checkout, env={**image.variables, "SANITY": "skip", "TERM": "xterm"}, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    before = stopped[1]["steps"]
    await_step(runs / "stopped", before + 2, process)
    process.stdin.write("\x03")
    process.stdin.flush()
    said = process.communicate(timeout=HANG_SECONDS)[0]
    assert f"going on from checkpoint-{before}" in said
    told = manifest(runs / "stopped")
    assert (told["state"], told["exit_code"]) == ("stopped", 75), said
    assert told["steps"] > before and (runs / "stopped" / f"checkpoint-{told['steps']}" / "complete.json").is_file()


def test_what_is_written_belongs_to_the_user(stopped, runs):
    written = list((runs / "stopped").rglob("*"))
    assert len(written) > 10 and {path.stat().st_uid for path in written} == {os.geteuid()}


def test_any_id_can_be_mapped(image, tmp_path):
    """There is no name for it in the image."""
    others = tmp_path / "others"
    others.mkdir()
    os.chown(others, SOMEBODY, SOMEBODY)
    mapped = f"{image.variables['CONTAINER_ARGS']} --user {SOMEBODY}:{SOMEBODY}"
    done = image.make("inspect", "ARGS=data.max_eval_samples=20", RUNS_DIR=str(others), CONTAINER_ARGS=mapped)
    assert done.returncode == 0, done.stdout + done.stderr
    written = list(others.rglob("*"))
    assert written and {path.stat().st_uid for path in written} == {SOMEBODY}


def test_anothers_runs_are_refused(image, tmp_path):
    """Root of this machine is no more than any user in the container."""
    others = tmp_path / "others"
    others.mkdir(mode=0o700)
    os.chown(others, SOMEBODY, SOMEBODY)
    done = image.make("train", "NAME=mine", f"RUNS_DIR={others}", SANITY="skip")
    assert "error: " in done.stderr and "Permission denied" in done.stderr and "Error 2" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and list(others.iterdir()) == []


def test_other_verbs_run_there_too(image, stopped, runs):
    assert '"optimizer_steps"' in image.make("plan", "ARGS=--json", RUNS_DIR=str(runs)).stdout
    diagnosed = image.make("diagnose", "RUN=stopped", RUNS_DIR=str(runs))
    assert "stopped, step" in diagnosed.stdout, diagnosed.stdout + diagnosed.stderr


def test_data_elsewhere_is_seen_and_data_that_is_nowhere_is_refused(image, runs, tmp_path):
    rows, held_out = tmp_path / "my 'rows'.jsonl", tmp_path / "held,out.jsonl"
    for file, first in ((rows, 1), (held_out, 50)):
        lines = ({"prompt": f"{n} + {n}?", "completion": str(2 * n)} for n in range(first, first + 40))
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("inspect", f"DATA={rows}", f"VALIDATION={held_out}", "ARGS=--json")
    seen = image.make(*words, RUNS_DIR=str(runs))
    assert "my 'rows'.jsonl:1" in seen.stdout, seen.stdout + seen.stderr
    gone = image.make("inspect", "DATA=/nowhere/rows.jsonl", RUNS_DIR=str(runs))
    assert "error: data.train" in gone.stderr and "Error 2" in gone.stderr


def test_a_full_disk_in_runs_is_told(image, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], check=True)
    try:
        done = image.make("train", f"RUNS_DIR={small}", SANITY="skip")
    finally:
        subprocess.run(["umount", small], check=True)
    assert "Error 2" in done.stderr and "error: RUNS_DIR: tiny needs up to" in done.stderr, done.stderr


@pytest.mark.parametrize("name", ["cuda", "flash-attn", "nvcc"])
def test_what_the_cuda_stages_name_is_in_the_index(name):
    """They cannot be built without CUDA's compiler; that each file that they lock is to be had can be asked."""
    text = (REPOSITORY / "requirements" / f"{name}.txt").read_text()
    locked = re.findall(r"^([\w.-]+)==(\S+)(.*?)(?=^\w|\Z)", text, re.MULTILINE | re.DOTALL)
    assert locked
    for package, version, rest in locked:
        accepts = {"Accept": "application/vnd.pypi.simple.v1+json"}
        request = urllib.request.Request(f"https://pypi.org/simple/{package}/", headers=accepts)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                there = {file["hashes"].get("sha256") for file in json.load(answer)["files"]}
        except urllib.error.URLError as error:
            pytest.skip(f"the index does not answer: {error}")
        wanted = set(re.findall(r"sha256:(\w{64})", rest))
        assert wanted and wanted <= there, f"{package}=={version}"
