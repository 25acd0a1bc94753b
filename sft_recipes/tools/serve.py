"""Serve a run's model with an OpenAI-compatible API: by vLLM where it is installed, else by `transformers serve`."""

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
from sft_recipes.tools import generate

_SERVER_PYTHON = REPOSITORY / ".venv-serve" / "bin" / "python"  # `make serve` creates it


@dataclass(frozen=True)
class Server:
    """A server of a run's model.

    Attributes:
        folder: of the model.
        model: its name in requests, `RUN/final`: relative to `directory`, since `transformers serve` would take what
            follows an `@` in a whole path for a revision.
        environment: its environment variables: nothing is requested from the Hub or PyPI.
    """

    command: list[str]
    directory: Path
    environment: dict[str, str]
    url: str
    folder: Path
    model: str
    is_vllm: bool


def configure(folder: RunDir, port: int, arguments: str = "") -> Server:
    """Return the server of a finished run's model, of the merged one if it trained adapters.

    Args:
        port: 0 for a free one.
        arguments: more arguments of the server, as in a shell.

    Raises:
        SetupError: the run is not finished, its adapters are not merged, the port is in use, or there is no server.
    """
    plan = plans.read(folder.plan)
    target = generate.find_model(folder, merged=plan.method != "full")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise SetupError(f"PORT: {port}: {str(error).rstrip('.')}. Set PORT to a free port") from error
        port = probe.getsockname()[1]
    model = "/".join(target.resolve().parts[-2:])
    vllm = shutil.which("vllm", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if vllm:
        command = [vllm, "serve", model, "--served-model-name", model]
    elif _SERVER_PYTHON.is_file():
        command = [str(_SERVER_PYTHON), "-P", "-m", "transformers.cli.transformers", "serve", model]
    else:
        raise SetupError("serve: found neither vllm nor .venv-serve. Run `make serve`, which creates .venv-serve")
    trust = ["--trust-remote-code"] if plan.sections.model.trust_remote_code else []
    command += ["--host", "127.0.0.1", "--port", str(port), *trust, *shlex.split(arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    url, directory = f"http://127.0.0.1:{port}", target.resolve().parents[1]
    return Server(command, directory, environment, url, target, model, bool(vllm))


def run(server: Server) -> None:
    """Replace this process with the server."""
    os.chdir(server.directory)
    os.execvpe(server.command[0], server.command, server.environment)
