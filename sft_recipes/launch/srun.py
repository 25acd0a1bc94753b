"""Print the srun command of a phase of a job, in a container or without one.

It runs in the machine's system Python, with the standard library only, and prints a shell command line:

    python3 -I sft_recipes/launch/srun.py prepare|train RECIPE [key=value …]

It reads RUNTIME (`local`, `pyxis`, `apptainer`), IMAGE, the variables of `make train`, and Slurm's.

Sources: srun(1); https://github.com/NVIDIA/pyxis (usage); apptainer-exec(1).
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

if __name__ == "__main__":  # in a Python without this package installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sft_recipes.launch import mounts
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.paths import REPOSITORY

_OPTIONS = ("GPUS", "PROCESSES", "GPU_TYPE", "ALLOW_CHANGE", "INIT_FROM")  # `--gpus`, …
_FLAGS = ("RESUME", "STRICT_VERSIONS", "OVERFIT")
_OVERRIDES = {"DATA": "data.train", "VALIDATION": "data.validation"}
# Variables that the image also sets, and that must have the job's values (pyxis prefers the image's otherwise).
_JOB_VARIABLES = ("HF_HOME", "RUNS_DIR", "PYTHONPATH", "SFT_RECIPES_IMAGE")


def command(phase: str, recipe: str, overrides: list[str]) -> list[str]:
    """Return the srun command line of a phase: `prepare` as one task, `train` as one task per node.

    Raises:
        SetupError: the runtime, its image or the virtual environment is missing.
    """
    arguments = _arguments(phase, recipe, overrides)
    logs = os.environ.get("SFT_RECIPES_LOGS", "slurm/logs")
    srun = ["srun", "--kill-on-bad-exit=1", "--wait=0", "--export=ALL"]
    if phase == "prepare":
        srun += ["--nodes=1", "--ntasks=1", "--relative=0"]
    else:
        srun += [f"--output={logs.replace('%', '%%')}/node-%n-%N.txt"]
    # Until a launcher handles signals: the signal of the time limit would kill it.
    ignoring_usr1 = ["sh", "-c", "trap '' USR1; exec \"$@\"", "sh"]
    runtime = os.environ.get("RUNTIME") or "local"
    if runtime == "local":
        python = REPOSITORY / ".venv" / "bin" / "python"
        if not python.exists():
            raise SetupError(f"RUNTIME: file not found: {python}. Run `make setup`, or set RUNTIME=pyxis or apptainer")
        return [*srun, *ignoring_usr1, str(python), "-m", "sft_recipes", *arguments]
    if runtime not in ("pyxis", "apptainer"):
        raise SetupError(f"RUNTIME: found {runtime!r}, expected local, pyxis or apptainer in a job")
    image = _image(runtime)
    folder = Path(logs).absolute()
    volumes = [*mounts.volumes(arguments[1:], not os.environ.get("DRY_RUN")), f"{folder}:{folder}:rw"]
    in_image = ["python", "-m", "sft_recipes", *arguments]
    if runtime == "pyxis":
        return [
            *srun, f"--container-image={image}", f"--container-mounts={','.join(volumes)}",
            "--no-container-mount-home", "--no-container-remap-root", f"--container-workdir={REPOSITORY}",
            f"--container-env={','.join(_JOB_VARIABLES)}", *ignoring_usr1, *in_image,
        ]  # fmt: skip
    variables = [f"{name}={os.environ[name]}" for name in _JOB_VARIABLES if os.environ.get(name)]
    return [
        *srun, *ignoring_usr1, "apptainer", "exec", *([] if os.environ.get("GPUS") == "0" else ["--nv"]), "--no-home",
        *(part for mount in volumes for part in ("--bind", mount)), "--pwd", str(REPOSITORY),
        *(part for variable in variables for part in ("--env", variable)), image, *in_image,
    ]  # fmt: skip


def _arguments(phase: str, recipe: str, overrides: list[str]) -> list[str]:
    """Return the arguments of a launcher."""
    value = {name: text for name, text in os.environ.items() if text}
    if value.get("SLURM_RESTART_COUNT", "0") != "0":
        value.pop("RESUME", None)  # explicit at the first start only; a requeued job resumes anyway
    arguments = [phase, recipe, "--name", value.get("NAME") or f"{recipe}-{value.get('SLURM_JOB_ID', 'JOBID')}"]
    for name in filter(value.__contains__, (*_OPTIONS, *_FLAGS)):
        option = f"--{name.lower().replace('_', '-')}"
        arguments += [option] if name in _FLAGS else [option, value[name]]
    return [*arguments, *(f"{key}={value[name]}" for name, key in _OVERRIDES.items() if name in value), *overrides]


def _image(runtime: str) -> str:
    """Return IMAGE; a file must exist, and only pyxis can pull from a registry."""
    image = os.environ.get("IMAGE", "")
    is_file = runtime == "apptainer" or image.endswith(".sqsh")
    if not image or (is_file and not Path(image).is_file()):
        expected = "a .sif file" if runtime == "apptainer" else "a .sqsh file, or a registry image"
        raise SetupError(f"IMAGE: found {image or 'none'}, expected {expected} (docker/README.md)")
    return str(Path(image).absolute()) if is_file else image


if __name__ == "__main__":
    try:
        print(shlex.join(command(sys.argv[1], sys.argv[2], sys.argv[3:])))
    except SetupError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
