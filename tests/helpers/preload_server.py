"""Starts ranks, data preparation and traces of layers from processes that have imported their libraries, which takes longer
than they run.

The server imports torch. One fork of it per set of libraries and environment imports what the first program that asks for
it imports, and each program is a fork of that, with the arguments, environment and open files of the process that asked
(`at_start/sitecustomize.py`). The launcher of a run forks its ranks where it would start Python. Python's `multiprocessing` has the same as `forkserver` with `set_forkserver_preload`.

`python -m helpers.preload_server ADDRESS PADDING`, see `run`
"""

import atexit
import contextlib
import ctypes
import json
import os
import re
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback

import sitecustomize
from helpers.make_variables import GIVEN_BY_MAKE

from sft_recipes.config import strategies
from sft_recipes.runtime.heartbeat import die_with_parent

HELD = 8  # sets of libraries that are held, about 0.4 GB each; the one that was asked for longest ago is dropped
# Variables that libraries do not read when they are imported, and those that the libraries or the command line set.
OF_A_RUN = (GIVEN_BY_MAKE - {"REPORT_TO"}) | {
    "PWD", "OLDPWD", "PYTEST_CURRENT_TEST", "PYTEST_XDIST_WORKER", "RUNS_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR",
    "PET_SHUTDOWN_TIMEOUT", "STRATEGIES_REPORT", "SIMULATED_DEVICE", "SIMULATED_DEVICE_SIZE", "TOKENIZERS_PARALLELISM",
    "PYTHONSAFEPATH", "PYTORCH_NVML_BASED_CUDA_CHECK", "PET_SIGNALS_TO_HANDLE", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME",
    "CLEARML_LOG_MODEL",
}  # fmt: skip
# Variables that do not change what data preparation and traces import, unless a model has its own code.
OF_RANKS = re.compile("PATH|ACCELERATE_USE_CPU|DS_ACCELERATOR|DEEPSPEED_.*|REPORT_TO|WANDB_.*")
TRACE, PREPARE = "sft_recipes.training.layer_trace", "sft_recipes.data.prepare"


def main(address):
    die_with_parent(os.getppid())
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # of children that no one waits for
    channels = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen(64)
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            with connection:
                data, files, *_ = socket.recv_fds(connection, 1 << 20, 3)
                try:
                    pass_on(data, files, connection, listener, channels)
                except Exception:  # this program fails, and the next one does not
                    traceback.print_exc()
                for file in files:
                    os.close(file)


def pass_on(data, files, connection, listener, channels):
    """Send a request to the process that has its libraries, which is started first where there is none."""
    request = json.loads(data)
    if request["machine"] != json.loads(json.dumps(sitecustomize.machine())):
        connection.send(b"other machine")
        return
    key = key_of(request)
    channel = channels.pop(key, None) or start(request, files, [connection, listener, *channels.values()])
    connection.send(b"accepted")
    socket.send_fds(channel, [data], [connection.fileno(), *files])
    channels[key] = channel  # the latest at the end
    for dropped in list(channels)[:-HELD]:
        channels.pop(dropped).close()


def key_of(request):
    """What decides which libraries are imported, and how."""
    environment = {name: value for name, value in request["environment"].items() if name not in OF_A_RUN}
    others = {name: value for name, value in environment.items() if not OF_RANKS.fullmatch(name)}
    if request["program"] == TRACE:
        return json.dumps([TRACE, others], sort_keys=True)
    plan_file = os.path.join(request["folder"], request["arguments"][-1])  # noqa: PTH118
    with open(plan_file, encoding="utf-8") as file:  # noqa: PTH123
        plan = json.load(file)
    if request["program"] == PREPARE:
        trusted = plan["sections"]["model"]["trust_remote_code"]
        return json.dumps([PREPARE, trusted, environment if trusted else others], sort_keys=True)
    sections, deepspeed = plan["sections"], strategies.STRATEGIES[plan["parallelism"]].deepspeed
    if not deepspeed:
        environment.pop("DEEPSPEED_LOG_LEVEL", None)
    of_torch = sections["trainer"].get("optim", "adamw_torch").startswith("adamw_torch")
    chosen = [plan["method"], deepspeed, of_torch, sections["model"]["trust_remote_code"]]
    simulated = "SIMULATED_DEVICE" in request["environment"]
    return json.dumps([chosen, simulated, environment], sort_keys=True)


def start(request, files, inherited):
    """Start a process that imports libraries, and return the socket on which it gets requests."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server = os.getpid()
    import_torch()
    if os.fork() == 0:
        with run_and_exit():
            die_with_parent(server)
            for file in (*files, *(other.fileno() for other in (ours, *inherited))):
                os.close(file)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # imports may run programs and wait for them
            import_libraries(request)
            assert threading.active_count() == 1, threading.enumerate()
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            while answer_to(theirs):
                pass
    theirs.close()
    return ours


def import_torch():
    """Import what every set of libraries contains, once, and which reads none of the variables that tests set."""
    from sft_recipes.runtime import library_imports

    with library_imports.without_garbage_collection():
        import pandas
        import torch._dynamo
        import torch.distributed.tensor
    _ = pandas, torch


def import_libraries(request):
    enter(request)
    if request["program"] == TRACE:
        from sft_recipes.runtime import library_imports

        with library_imports.without_garbage_collection():
            library_imports.skip_unused_libraries("lora", "adamw_torch", [], False, trust_remote_code=False)
            import peft

            from sft_recipes.training import layer_trace
        _ = peft, layer_trace
        return
    if request["program"] == PREPARE:
        with open(request["arguments"][-1], encoding="utf-8") as file:  # noqa: PTH123
            trusted = json.load(file)["sections"]["model"]["trust_remote_code"]
        from sft_recipes.runtime import library_imports

        with library_imports.without_garbage_collection():
            library_imports.skip_unused_libraries("full", "adamw_torch", [], False, trusted)
            import datasets
            from transformers.models.auto import modeling_auto, tokenization_auto
            from transformers.models.llama import modeling_llama

            from sft_recipes.data import prepare
        _ = datasets, modeling_auto, tokenization_auto, modeling_llama, prepare
        return
    if "SIMULATED_DEVICE" in os.environ:
        import simulated_device  # noqa: F401  from at_start/, before the module that it changes
    subprocess.Popen = ForkingPopen  # before modules import the name
    from accelerate.commands import launch  # noqa: F401

    from sft_recipes.planner import plan as plans
    from sft_recipes.runtime.run_dir import Path
    from sft_recipes.training import main as rank

    plan = plans.read(Path(request["arguments"][-1]))
    rank.import_libraries(plan)
    from transformers.models.auto import modeling_auto
    from transformers.models.llama import modeling_llama

    from sft_recipes.training import completions, deepspeed_ops, sft_config, weight_files

    _ = modeling_auto, modeling_llama, completions, deepspeed_ops, sft_config, weight_files
    if plan.strategy.deepspeed:
        # Imports torch's compiler, which takes longest, when the first optimizer is made.
        from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401


def answer_to(channel):
    """Start the run of the next request; return False when the server has closed the channel."""
    data, files, *_ = socket.recv_fds(channel, 1 << 20, 4)
    if data and os.fork() == 0:
        with run_and_exit():
            channel.close()
            supervise(json.loads(data), socket.socket(fileno=files[0]), files[1:])
    for file in files:
        os.close(file)
    return bool(data)


def supervise(request, connection, files):
    """Run a program; forward signals to it, kill it if the process that asked is gone, and send its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    supervisor = os.getpid()
    child = os.fork()
    if child == 0:
        with run_and_exit():
            connection.close()
            die_with_parent(supervisor)
            os.setsid()
            for number, file in enumerate(files):
                os.dup2(file, number)
                os.close(file)
            enter(request)
            run(request["program"], request["arguments"])
    ended = os.pidfd_open(child)
    while True:
        ready, _, _ = select.select([connection, ended], [], [])
        if ended in ready:
            break
        number = connection.recv(64)
        os.kill(child, number[0] if number else signal.SIGKILL)
        if not number:
            break
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        connection.send(str(code).encode())


def run(program, arguments):
    """Run a module as `python -m` does; /proc/PID/cmdline shows it in the place of the server's command line, which ends
    with enough padding."""
    command = "\0".join([sys.executable, "-m", program, *arguments, ""]).encode()
    with open("/proc/self/stat", encoding="utf-8") as file:  # noqa: PTH123
        first, end = map(int, file.read().rpartition(")")[2].split()[45:47])  # arg_start, arg_end of proc(5)
    assert len(command) < end - first
    ctypes.memset(first, 0, end - first)
    ctypes.memmove(first, command, len(command))
    sys.argv[1:] = arguments
    sys.modules.pop(program, None)  # it was imported before
    runpy.run_module(program, run_name="__main__", alter_sys=True)


def enter(request):
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    os.umask(request["umask"])


@contextlib.contextmanager
def run_and_exit():
    """Run a block of a fork and exit as Python would at its end, instead of returning into the code of its parent."""
    code = 0
    try:
        yield
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if code != error.code and error.code is not None:
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class ForkingPopen(subprocess.Popen):
    """Forks this process to run a program of sft_recipes, where Popen would start Python for it."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        program = [str(argument) for argument in args if argument != "-u"]
        pipes = [file for file in rest[3:9] if file != -1]
        if (
            program[:2] != [sys.executable, "-m"]
            or not program[2].startswith("sft_recipes.")
            or cwd
            or preexec_fn
            or pipes
        ):
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
            return
        self.pid = os.fork()
        self._child_created = True
        if self.pid == 0:
            with run_and_exit():
                os.setsid()  # as torch's agent asks for
                for number in signal.valid_signals():
                    if callable(signal.getsignal(number)):
                        signal.signal(number, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                os.environ.clear()
                os.environ.update(env)
                run(program[2], program[3:])


if __name__ == "__main__":
    main(sys.argv[1])
