"""Run other programs for their output."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping


def run_program(*command: str, timeout: float, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Return exit code and output of a program, with its errors after a failure; 127 if it is not installed, 124 if it
    does not end within `timeout` seconds."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=timeout, env=environment
        )
    except OSError:
        return 127, ""
    except subprocess.TimeoutExpired:
        return 124, f"no answer within {timeout:.0f} s"
    return done.returncode, done.stdout + (done.stderr if done.returncode else "")
