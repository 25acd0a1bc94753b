"""Serve the model of a finished run with an OpenAI-compatible server: vLLM where installed, else `transformers serve`."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from sft_recipes.planner import plan as plans
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.paths import REPOSITORY
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.tools import final_model

HOST = "127.0.0.1"
SERVER_PYTHON = REPOSITORY / ".venv-serve" / "bin" / "python"  # made by `make serve`


@dataclass(frozen=True)
class Server:
    """A server of a run's model.

    Attributes:
        command: its command line.
        directory: its working directory. The model is named relative to it, so clients send a short name, which has no
            `@`: `transformers serve` would read a revision after it.
        model: the name that requests give.
        folder: the folder of the model.
    """

    command: list[str]
    directory: Path
    model: str
    folder: Path
    is_vllm: bool

    @property
    def environment(self) -> dict[str, str]:
        """Its environment variables; the model is local, and nothing is requested from PyPI or the Hub."""
        return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}


def configure(folder: RunDir, port: int, arguments: str = "") -> Server:
    """Return the server of a finished run's model, the merged one of adapters.

    Args:
        arguments: more arguments of the server, as in a shell.

    Raises:
        SetupError: the run is not finished, its adapters are not merged, the port is in use, or there is no server.
    """
    plan = plans.read(folder.plan)
    target = final_model.find(folder, merged=plan.method != "full")
    model = f"{folder.path.resolve().name}/{target.name}"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise SetupError(f"PORT: {HOST}:{port}: {error.strerror}. Set PORT to a free one") from error
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    vllm = shutil.which("vllm", path=path)
    if vllm:
        command = [vllm, "serve", model, "--served-model-name", model]
    elif SERVER_PYTHON.is_file():
        command = [str(SERVER_PYTHON), "-P", "-m", "transformers.cli.transformers", "serve", model]
    else:
        raise SetupError("serve: found neither vllm nor .venv-serve. Run `make serve`, which creates it")
    command += ["--host", HOST, "--port", str(port), *shlex.split(arguments)]
    command += ["--trust-remote-code"] if plan.sections.model.trust_remote_code else []
    return Server(command, folder.path.resolve().parent, model, target, bool(vllm))


def run(server: Server) -> None:
    """Replace this process with the server."""
    os.chdir(server.directory)
    os.execvpe(server.command[0], server.command, server.environment)
