"""An engine on this machine, and the image of the CPU's variant, built as a user builds it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.workplace import REPOSITORY

SECONDS = 1800  # many times what the slowest of these takes
PLANTED_KEY = "planted-" + secrets.token_hex(20)  # must be found again nowhere
BASE = "localhost/base:bookworm"
# podman inside another container, where crun, systemd and a network of its own are not to be had.
CONFIGURATION = """
[containers]
netns = "host"
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


@dataclass(frozen=True)
class Image:
    """The image, in a checkout of its own, and what a `make` there needs to know."""

    name: str
    checkout: Path
    variables: dict[str, str]

    def make(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["make", *words], cwd=self.checkout, env={**self.variables, **variables}, capture_output=True, text=True,
            timeout=SECONDS, check=False,
        )  # fmt: skip

    def run(self, *words: str) -> str:
        """What a command in the image says."""
        command = ["podman", "run", "--rm", "--no-healthcheck", self.name, *words]
        done = subprocess.run(command, env=self.variables, capture_output=True, text=True, timeout=SECONDS, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


def podman(*words: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["podman", *words], env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )


@pytest.fixture(scope="session")
def engine(tmp_path_factory) -> dict[str, str]:
    """The environment in which podman works here."""
    missing = [name for name in ("podman", "debootstrap") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs {' and '.join(missing) or 'root'} (Debian: podman, buildah, runc, debootstrap, uidmap)")
    configuration = tmp_path_factory.mktemp("podman") / "containers.conf"
    configuration.write_text(CONFIGURATION)
    kept = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    environment = {
        **kept, "CONTAINERS_CONF": str(configuration), "RUNTIME": "podman", "VARIANT": "cpu",
        "CONTAINER_ARGS": "--ulimit nofile=4096:4096 --ulimit nproc=4096:4096 --env OMP_NUM_THREADS=1",
    }  # fmt: skip
    works = podman("info", environment=environment)
    if works.returncode:
        pytest.skip(f"podman does not work here: {works.stderr.strip()}")
    return environment


@pytest.fixture(scope="session")
def base(engine, tmp_path_factory) -> str:
    """A Debian to build on, made from its packages: no image registry is asked."""
    if podman("image", "exists", BASE, environment=engine).returncode:
        root, archive = (tmp_path_factory.mktemp("base") / name for name in ("root", "root.tar"))
        packages = "--include=python3-venv,ca-certificates"
        subprocess.run(
            ["debootstrap", "--variant=minbase", packages, "bookworm", root], check=True, capture_output=True
        )
        subprocess.run(["tar", "-C", root, "-cf", archive, "."], check=True)
        assert podman("import", str(archive), BASE, environment=engine).returncode == 0
        shutil.rmtree(root)
        archive.unlink()
    return BASE


def pip_settings(folder: Path) -> list[str]:
    """pip in the build takes packages from where this machine's takes them: its settings, and the files they name."""
    listed = subprocess.run(["pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    settings = dict(line.split("=", 1) for line in listed.splitlines() if "=" in line)
    settings = {key.rsplit(".", 1)[1]: value.strip("'\"").replace("\\n", " ") for key, value in settings.items()}
    written = folder / "pip.conf"
    written.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()))
    named = {word for value in settings.values() for word in value.split()}
    named = {
        str(Path(word[7:]).parent) if word.startswith("file://") else word for word in named
    }  # an index, its files
    there = sorted(path for path in named if path.startswith("/") and Path(path).exists())
    return [f"--volume={written}:/etc/pip.conf:ro", *(f"--volume={path}:{path}:ro" for path in there)]


@pytest.fixture(scope="session")
def image(engine, base, tmp_path_factory) -> Image:
    """Built from a clean clone in which keys lie about, by somebody whose environment has them too."""
    checkout = tmp_path_factory.mktemp("clone") / "sft recipes"
    subprocess.run(["git", "clone", "--quiet", REPOSITORY, checkout], check=True)
    changed = subprocess.run(
        ["git", "-C", REPOSITORY, "diff", "HEAD", "--binary"], capture_output=True, check=True
    ).stdout
    if changed:
        subprocess.run(["git", "-C", checkout, "apply"], input=changed, check=True)
    for place in (".env", "docker/.netrc", "runs/old/log.txt", "data/rows.jsonl", "token"):
        (checkout / place).parent.mkdir(parents=True, exist_ok=True)
        (checkout / place).write_text(f"HF_TOKEN={PLANTED_KEY}\n")
    arguments = [f"--build-arg={one}={base}" for one in ("BASE_IMAGE", "BUILDER_IMAGE")] + pip_settings(checkout.parent)
    keys = {"HF_TOKEN": PLANTED_KEY, "WANDB_API_KEY": PLANTED_KEY}
    built = Image("localhost/sft-recipes:tried", checkout, {**engine, **keys, "IMAGE": "localhost/sft-recipes:tried"})
    done = built.make("image", BUILD_ARGS=" ".join(arguments))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads(podman("image", "inspect", built.name, environment=engine).stdout)
    return built
