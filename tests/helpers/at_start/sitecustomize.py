"""Simulates a device (SIMULATED_DEVICE), and has a server run programs that import large libraries (PRELOAD_SERVER).

Python imports this module at the start of each process whose PYTHONPATH has this folder. One of these programs sends its
arguments, environment and open files to the server (`helpers/preload_server.py`), which forks a process that runs the same
program with its libraries imported; this one forwards signals to it, and ends as it ends.
"""

import os
import sys

PROGRAMS = ("sft_recipes.training.rank_launcher", "sft_recipes.training.layer_trace")


def machine():
    """What a fork cannot change, or should not."""
    import resource

    limits = (resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE)
    namespaces = [os.readlink(f"/proc/self/ns/{name}") for name in ("mnt", "net", "pid", "user")]  # noqa: PTH115
    return [[resource.getrlimit(name) for name in limits], sorted(os.sched_getaffinity(0)), os.getuid(), namespaces]


def run_in_server(address):
    import json
    import signal
    import socket

    umask = os.umask(0o22)
    os.umask(umask)
    request = {
        "program": sys.orig_argv[2], "arguments": sys.orig_argv[3:], "environment": dict(os.environ),
        "folder": os.getcwd(), "umask": umask, "machine": machine(),  # noqa: PTH109
    }  # fmt: skip
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(address)

        def forward(number, _frame):
            server.send(bytes([number]))

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, forward)
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
        answer = server.recv(64).decode()
    if answer == "other machine":  # other limits or namespaces than the server's: start as usual
        return
    code = int(answer)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
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
