"""How a process brings in the heavy libraries: those alone that its plan uses, and no slower than it must."""

from __future__ import annotations

import functools
import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sft_recipes.runtime import env


@contextmanager
def swiftly() -> Iterator[None]:
    """Has Python not look for garbage while modules are imported, which leave none, and never among them again.

    What this spares at the start and at the end of a process: benchmarks/results/start-2-cores.json.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def leave_out_what_is_not_used(plan: Any) -> None:
    """transformers, trl and peft import W&B's client, bitsandbytes and each other, wherever they are installed.

    None in `sys.modules` is Python's word for a module that is not there, and `find_spec`, by which the libraries ask
    what is installed, knows it too (https://docs.python.org/3/reference/import.html#the-module-cache).
    """
    modules: dict[str, object] = sys.modules  # type: ignore[assignment]
    if "wandb" not in env.reporters():
        modules.setdefault("wandb", None)
    if plan.method == "full":
        modules.setdefault("peft", None)
    if plan.method == "full" and plan.sections.trainer.get("optim", "adamw_torch").startswith("adamw_torch"):
        modules.setdefault("bitsandbytes", None)


def deepspeed() -> None:
    """Brings DeepSpeed in, and its Muon, which every ZeRO optimizer imports to ask whether it is one.

    Functions of Muon are compiled as they are defined, and that imports torch's compiler: a second and more of each
    rank. Here they are compiled when somebody calls them.
    """
    compiler: Any = importlib.import_module("deepspeed.runtime.compiler")
    at_once = compiler.compile
    compiler.compile = lambda: _compiled_when_called
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = at_once


def _compiled_when_called(function: Callable[..., Any]) -> Callable[..., Any]:
    torch: Any = importlib.import_module("torch")

    @functools.cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(function)  # type: ignore[no-any-return]

    @functools.wraps(function)
    def call(*words: Any, **keys: Any) -> Any:
        return compiled()(*words, **keys)

    return call
