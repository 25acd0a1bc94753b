"""Faster imports of large libraries: without garbage collection, and without those that a plan cannot use."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Disable garbage collection during imports, which create no garbage, and exclude imported objects from later ones.

    Saves 1.2 s at start and 1.2 s at exit of a process (benchmarks/results/start-2-cores.json).
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def skip_unused_libraries(
    method: str, optimizer: str, trackers: list[str], deepspeed: bool, trust_remote_code: bool
) -> None:
    """Keep transformers, TRL and peft from importing each installed library.

    peft, bitsandbytes, DeepSpeed and the W&B client cost 4 s of CPU time per process, used or not. None in
    `sys.modules` is a module that cannot be imported (https://docs.python.org/3/reference/import.html#the-module-cache).
    Nothing is skipped for a model with remote code, which may import any library.
    """
    unused = {
        "wandb": "wandb" not in trackers,
        "peft": method == "full",
        "deepspeed": not deepspeed,
        "bitsandbytes": method != "qlora" and optimizer.startswith("adamw_torch"),
    }
    for name, is_unused in unused.items():
        if is_unused and not trust_remote_code:
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]
