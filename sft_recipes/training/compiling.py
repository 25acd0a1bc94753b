"""Keeps a rank that is killed while DeepSpeed compiles an operator from blocking every later start.

torch guards a build by a file that is there; whoever is killed leaves it, and all others wait for its end for ever
(https://github.com/pytorch/pytorch/issues/189245). The kernel's own lock, which torch takes from its next release on
(https://github.com/pytorch/pytorch/pull/190543), goes with the process that held it.
"""

from __future__ import annotations

import fcntl
import os


class HeldByTheKernel:
    """In place of torch.utils.file_baton.FileBaton: whoever has it builds, the others wait."""

    def __init__(self, lock_file_path: str, *_: object, **__: object):
        self._file = os.open(f"{lock_file_path}.held", os.O_RDWR | os.O_CREAT, 0o600)

    def try_acquire(self) -> bool:
        """Whether this process builds."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def wait(self) -> None:
        """Until the process that builds has ended its build, or itself."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self.release()

    def release(self) -> None:
        """Lets the others go on."""
        os.close(self._file)


def let_no_build_outlive_its_process() -> None:
    """Has torch build extensions under such a lock, in this process."""
    import torch.utils.cpp_extension

    torch.utils.cpp_extension.FileBaton = HeldByTheKernel
