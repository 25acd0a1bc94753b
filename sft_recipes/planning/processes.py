"""Ties the life of a process to its parent's, so that a killed launcher leaves no rank behind."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Has the kernel kill this process when its parent dies, however it dies; Linux alone can.

    Called by a process for itself, also between fork and exec. Killed, not asked: a rank that went on saving would
    meet the next start of its run in the same folder.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call took effect
        os.kill(os.getpid(), signal.SIGKILL)
