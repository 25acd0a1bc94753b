"""Simulates a device (SIMULATED_DEVICE), and has a server run programs that import large libraries (PRELOAD_SERVER).

Python imports this module at the start of each process whose PYTHONPATH has this folder. One of these programs sends its
arguments, environment and open files to the server (`helpers/preload_server.py`), which forks a process that runs the same
program with its libraries imported; this one forwards signals to it, and ends as it ends.
"""

import os
import sys

PROGRAMS = ("sft_recipes.data.prepare", "sft_recipes.training.rank_launcher", "sft_recipes.training.layer_trace")


def machine():
    """What a fork cannot change: limits, namespaces, the interpreter and the package that it has found."""
    import resource

    limits = (resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE)
    namespaces = [os.readlink(f"/proc/self/ns/{name}") for name in ("mnt", "net", "pid", "user")]  # noqa: PTH115
    package = next((path for path in sys.path if os.path.isdir(f"{path}/sft_recipes")), None)  # noqa: PTH112
    start = [os.environ.get(name) for name in ("LD_PRELOAD", "LD_LIBRARY_PATH", "GLIBC_TUNABLES")]
    return [
        [resource.getrlimit(name) for name in limits], sorted(os.sched_getaffinity(0)), os.getuid(), namespaces,
        sys.executable, package, start,
    ]  # fmt: skip


def run_in_server(address):
    """Exit as the program does in the server; return if it cannot run there."""
    import contextlib
    import json
    import signal
    import socket

    umask = os.umask(0o22)
    os.umask(umask)
    request = {
        "program": sys.orig_argv[2], "arguments": sys.orig_argv[3:], "environment": dict(os.environ),
        "folder": os.getcwd(), "umask": umask, "machine": machine(),  # noqa: PTH109
    }  # fmt: skip
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(address)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
        if server.recv(64) == b"other machine":
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            return

        def forward(number, _frame):
            with contextlib.suppress(OSError):  # it has just ended
                server.send(bytes([number]))

        for number in signals:
            signal.signal(number, forward)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            code = int(server.recv(64))
        except ConnectionResetError:  # it ended before it had read a forwarded signal; its exit code follows
            code = int(server.recv(64))
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    if code < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [-code])
        os.kill(os.getpid(), -code)
    os._exit(code)


if os.environ.get("PRELOAD_SERVER") and sys.orig_argv[1:2] == ["-m"] and sys.orig_argv[2] in PROGRAMS:
    try:
        run_in_server(os.environ["PRELOAD_SERVER"])
    except BaseException as error:
        print(f"{__file__}: {type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)  # Python would print a traceback and continue without the server

if os.environ.get("SIMULATED_DEVICE"):
    import simulated_device  # noqa: F401  next to this file
