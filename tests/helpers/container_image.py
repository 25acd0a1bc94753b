"""Podman on this machine, and the CPU variant of the image, built as a user builds it."""

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

TIMEOUT_SECONDS = 1800  # many times the slowest command
PLANTED_KEY = "planted-" + secrets.token_hex(20)  # must not appear in the image
BASE = "localhost/base:bookworm"
# podman inside another container, without crun, systemd and a separate network.
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
    """The image, its checkout, and the environment variables of `make` there."""

    name: str
    checkout: Path
    variables: dict[str, str]

    def make(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["make", *arguments], cwd=self.checkout, env={**self.variables, **variables}, capture_output=True, text=True,
            timeout=TIMEOUT_SECONDS, check=False,
        )  # fmt: skip

    def run(self, *arguments: str) -> str:
        """Return the standard output of a command in the image."""
        command = ["podman", "run", "--rm", self.name, *arguments]
        done = subprocess.run(
            command, env=self.variables, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def podman(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["podman", *arguments], env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )


@pytest.fixture(scope="session")
def podman_environment(tmp_path_factory) -> dict[str, str]:
    """Return the environment in which podman works on this machine."""
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
    info = podman("info", environment=environment)
    if info.returncode:
        pytest.skip(f"podman does not work here: {info.stderr.strip()}")
    return environment


@pytest.fixture(scope="session")
def base(podman_environment, tmp_path_factory) -> str:
    """Build a Debian base image from packages: no registry is needed."""
    if podman("image", "exists", BASE, environment=podman_environment).returncode:
        root, archive = (tmp_path_factory.mktemp("base") / name for name in ("root", "root.tar"))
        packages = "--include=python3-venv,ca-certificates"
        subprocess.run(
            ["debootstrap", "--variant=minbase", packages, "bookworm", root], check=True, capture_output=True
        )
        subprocess.run(["tar", "-C", root, "-cf", archive, "."], check=True)
        assert podman("import", str(archive), BASE, environment=podman_environment).returncode == 0
        shutil.rmtree(root)
        archive.unlink()
    return BASE


def pip_settings(folder: Path) -> list[str]:
    """Return build options that give pip this machine's settings, and the files that they name."""
    listed = subprocess.run(["pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    settings = dict(line.split("=", 1) for line in listed.splitlines() if "=" in line)
    settings = {key.rsplit(".", 1)[1]: value.strip("'\"").replace("\\n", " ") for key, value in settings.items()}
    config = folder / "pip.conf"
    config.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()))
    values = {part for value in settings.values() for part in value.split()}
    # The parent folder of a file:// index also has its files.
    paths = {str(Path(part[7:]).parent) if part.startswith("file://") else part for part in values}
    existing = sorted(path for path in paths if path.startswith("/") and Path(path).exists())
    return [f"--volume={config}:/etc/pip.conf:ro", *(f"--volume={path}:{path}:ro" for path in existing)]


@pytest.fixture(scope="session")
def image(podman_environment, base, tmp_path_factory) -> Image:
    """Build the image from a clone that contains keys in files, with keys in the environment too."""
    checkout = tmp_path_factory.mktemp("clone") / "sft recipes"
    subprocess.run(["git", "clone", "--quiet", REPOSITORY, checkout], check=True)
    changed = subprocess.run(
        ["git", "-C", REPOSITORY, "diff", "HEAD", "--binary"], capture_output=True, check=True
    ).stdout
    if changed:
        subprocess.run(["git", "-C", checkout, "apply"], input=changed, check=True)
    for path in (".env", "docker/.netrc", "runs/old/log.txt", "data/rows.jsonl", "token"):
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        (checkout / path).write_text(f"HF_TOKEN={PLANTED_KEY}\n")
    arguments = [f"--build-arg={name}={base}" for name in ("BASE_IMAGE", "BUILDER_IMAGE")] + pip_settings(
        checkout.parent
    )
    keys = {"HF_TOKEN": PLANTED_KEY, "WANDB_API_KEY": PLANTED_KEY}
    built = Image(
        "localhost/sft-recipes:test", checkout, {**podman_environment, **keys, "IMAGE": "localhost/sft-recipes:test"}
    )
    done = built.make("image", BUILD_ARGS=" ".join(arguments))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads(podman("image", "inspect", built.name, environment=podman_environment).stdout)
    return built
