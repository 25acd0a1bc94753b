"""Starts accelerate's own command line, on machines that cannot resolve `localhost` too.

Before it starts several ranks, accelerate asks `localhost` whether the port is in use, and dies where there is no
`/etc/hosts` that says what that is (a minimal container). The launcher has chosen a free port, so the question is moot.
"""

from __future__ import annotations

import socket


def main() -> None:
    """`accelerate …` with the arguments that this process got."""
    import accelerate.utils.launch
    from accelerate.commands import accelerate_cli

    try:
        socket.getaddrinfo("localhost", None)
    except socket.gaierror:
        accelerate.utils.launch.is_port_in_use = lambda _port: False
    accelerate_cli.main()


if __name__ == "__main__":
    main()
