"""How a process brings in the heavy libraries: those alone that its plan uses, and no slower than it must."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from sft_recipes.planning import environment
from sft_recipes.planning.plan import Plan


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


def leave_out_what_is_not_used(plan: Plan) -> None:
    """transformers, trl and peft import W&B's client, bitsandbytes and each other, wherever they are installed.

    None in `sys.modules` is Python's word for a module that is not there, and `find_spec`, by which the libraries ask
    what is installed, knows it too (https://docs.python.org/3/reference/import.html#the-module-cache).
    """
    modules: dict[str, object] = sys.modules  # type: ignore[assignment]
    if "wandb" not in environment.reporters():
        modules.setdefault("wandb", None)
    if plan.method == "full":
        modules.setdefault("peft", None)
    if plan.method == "full" and plan.sections["trainer"].get("optim", "adamw_torch").startswith("adamw_torch"):
        modules.setdefault("bitsandbytes", None)
