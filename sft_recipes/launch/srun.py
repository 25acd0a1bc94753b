"""Writes the command by which Slurm starts one launcher on each node of a job, in a container or without one.

It is run by the machine's own python, which has nothing but its standard library:

    python3 -I sft_recipes/launch/srun.py RECIPE [key=value …]

and prints words that a shell reads. What it reads besides: RUNTIME (`local`, `pyxis`, `apptainer`), IMAGE, the
variables that Make knows of `train`, and Slurm's own.

Sources: srun(1); https://github.com/NVIDIA/pyxis (usage); apptainer-exec(1).
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

if __name__ == "__main__":  # by a python that knows of no package here
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sft_recipes.launch import mounts
from sft_recipes.launch.mounts import REPOSITORY, InputError, Mount

_OPTIONS = {
    "GPUS": "--gpus",
    "PROCESSES": "--processes",
    "GPU_TYPE": "--gpu-type",
    "ALLOW_CHANGE": "--allow-change",
}
_FLAGS = {"RESUME": "--resume", "STRICT_VERSIONS": "--strict-versions"}
_OVERRIDES = {"DATA": "data.train", "VALIDATION": "data.validation"}
# What an image has a value of its own for, and takes ours instead (pyxis: its own go first otherwise).
_OURS = ("HF_HOME", "RUNS_DIR", "PYTHONPATH", "SFT_RECIPES_IMAGE")


def command(recipe: str, overrides: list[str]) -> list[str]:
    """The whole command.

    Raises:
        InputError: the runtime, its image or the virtual environment is not there.
    """
    words = _verb(recipe, overrides)
    logs = os.environ.get("SFT_RECIPES_LOGS", "slurm/logs")
    srun = ["srun", "--kill-on-bad-exit=1", "--export=ALL", f"--output={logs.replace('%', '%%')}/node-%n-%N.txt"]
    runtime = os.environ.get("RUNTIME") or "local"
    if runtime == "local":
        python = REPOSITORY / ".venv" / "bin" / "python"
        if not python.exists():
            raise InputError(
                f"RUNTIME: there is no {python}; say `make setup` where the nodes' disk is, or RUNTIME=pyxis or "
                f"apptainer with IMAGE="
            )
        return [*srun, str(python), "-m", "sft_recipes", *words]
    if runtime not in ("pyxis", "apptainer"):
        raise InputError(f"RUNTIME: {runtime!r} is not what a job is started with; say local, pyxis or apptainer")
    image = _image(runtime)
    seen = mounts.needed("train", words[1:], dry=bool(os.environ.get("DRY_RUN")))
    seen.append(Mount(Path(logs).absolute(), writable=True))
    python_there = ["python", "-m", "sft_recipes", *words]
    if runtime == "pyxis":
        return [
            *srun, f"--container-image={image}", f"--container-mounts={','.join(map(str, seen))}",
            "--no-container-mount-home", "--no-container-remap-root", f"--container-workdir={REPOSITORY}",
            f"--container-env={','.join(_OURS)}", *python_there,
        ]  # fmt: skip
    ours = [f"{name}={os.environ[name]}" for name in _OURS if os.environ.get(name)]
    return [
        *srun, "apptainer", "exec", *([] if os.environ.get("GPUS") == "0" else ["--nv"]), "--no-home",
        *(part for mount in seen for part in ("--bind", str(mount))), "--pwd", str(REPOSITORY),
        *(part for one in ours for part in ("--env", one)), image, *python_there,
    ]  # fmt: skip


def _verb(recipe: str, overrides: list[str]) -> list[str]:
    """What each node's launcher is told."""
    value = {name: os.environ.get(name, "") for name in (*_OPTIONS, *_FLAGS, *_OVERRIDES, "NAME")}
    if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        value["RESUME"] = ""  # insisted on once, not again and again
    name = value["NAME"] or f"{recipe}-{os.environ.get('SLURM_JOB_ID', 'JOBID')}"
    return [
        "train", recipe, "--name", name,
        *(part for key, option in _OPTIONS.items() if value[key] for part in (option, value[key])),
        *(flag for key, flag in _FLAGS.items() if value[key]),
        *(f"{dotted}={value[key]}" for key, dotted in _OVERRIDES.items() if value[key]),
        *overrides,
    ]  # fmt: skip


def _image(runtime: str) -> str:
    """The image that is named; a file must be there, and a registry's name is pyxis's alone to fetch."""
    image = os.environ.get("IMAGE", "")
    kind = {"pyxis": "a .sqsh file, or a registry's name", "apptainer": "a .sif file"}[runtime]
    if not image:
        raise InputError(f"IMAGE: RUNTIME={runtime} needs one; say IMAGE=<{kind}> (docker/README.md)")
    is_file = runtime == "apptainer" or image.endswith(".sqsh")
    if is_file and not Path(image).is_file():
        raise InputError(f"IMAGE: there is no {image}; say IMAGE=<{kind}> (docker/README.md)")
    return str(Path(image).absolute()) if is_file else image


if __name__ == "__main__":
    try:
        print(shlex.join(command(sys.argv[1], sys.argv[2:])))
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
