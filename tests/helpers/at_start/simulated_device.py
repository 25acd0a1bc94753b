"""A simulated device for the ranks of the sanity check: counts live tensor storages, and refuses what would not fit.

Imported at the start of each process that has SIMULATED_DEVICE, a file (`sitecustomize.py`). Each rank appends a JSON line to
it whenever it is about to build a trainer, and when it exits. With SIMULATED_DEVICE_SIZE=F an
allocation raises torch.OutOfMemoryError above F times what the rank's first trainer held at its peak.
"""

import functools
import gc
import importlib.abc
import importlib.machinery
import json
import os
import sys
import weakref
from pathlib import Path

PROGRAM = "sft_recipes.training.main"


def simulate(run):
    """Counts from where a rank of the sanity check has its libraries."""
    device = None

    def begin(begin, *arguments):
        nonlocal device
        begun = begin(*arguments)
        if sys.modules["__main__"].__spec__.name.startswith("sft_recipes.sanity."):
            device = new_device()
            device.__enter__()
        return begun

    def build(build, *arguments):
        device.write("build")
        return build(*arguments)

    def exit_process(exit_process):
        device.write("exit")
        exit_process()

    for wrapper in (begin, build, exit_process):
        original = getattr(run, wrapper.__name__)
        setattr(run, wrapper.__name__, functools.partial(wrapper, original))


def new_device():
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    def tensors(item):
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, tuple | list):
            for part in item:
                yield from tensors(part)

    class Device(TorchDispatchMode):
        """Storages of all tensors that an operator took or gave."""

        @classmethod
        def _should_skip_dynamo(cls):
            return False  # nothing here is compiled, and skipping imports the compiler: 2 s per process

        def __init__(self):
            super().__init__()
            self.storages = {}
            self.bound = self.peak = self.operators = 0
            self.size = float("inf")
            self.log = Path(os.environ["SIMULATED_DEVICE"])
            self.rank = int(os.environ.get("RANK", "0"))
            self.factor = float(os.environ.get("SIMULATED_DEVICE_SIZE", "inf"))
            self.limit()

        def limit(self):
            """From what this rank has written since it was about to build its first trainer."""
            lines = [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []
            peaks = [line["peak"] for line in lines if line["rank"] == self.rank][1:]
            self.size = self.factor * max(peaks) if peaks else float("inf")

        def write(self, event):
            self.see(item for item in gc.get_objects() if issubclass(type(item), torch.Tensor))
            held = self.held()
            line = {"event": event, "process": os.getpid(), "rank": self.rank, "held": held, "peak": self.peak}
            with self.log.open("a") as log:
                log.write(json.dumps(line) + "\n")
            self.limit()

        def see(self, tensors):
            new = 0
            for tensor in tensors:
                tensor = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
                if tensor.is_meta or tensor.layout != torch.strided:
                    continue
                storage = tensor.untyped_storage()
                key = id(storage)
                if key not in self.storages:
                    self.storages[key] = weakref.ref(storage, lambda _, key=key: self.storages.pop(key, None))
                    new += storage.nbytes()
            return new

        def held(self):
            storages = [reference() for reference in list(self.storages.values())]
            return sum(storage.nbytes() for storage in storages if storage is not None)

        def __torch_dispatch__(self, operator, types, arguments=(), named=None):
            result = operator(*arguments, **(named or {}))
            self.bound += self.see(tensors((arguments, result)))
            self.operators += 1
            if self.bound > self.peak or self.operators % 1000 == 0:  # a storage may also grow, without an operator
                self.bound = self.held()
                self.peak = max(self.peak, self.bound)
                if self.bound > self.size:
                    raise torch.OutOfMemoryError(f"simulated device: {self.bound} bytes, it has {self.size:.0f}")
            return result

    return Device()


class Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module):
        super().exec_module(module)
        simulate(module)


class Finder(importlib.abc.MetaPathFinder):
    """Lets `simulate` change the module that every rank begins with, as soon as it is imported."""

    def find_spec(self, name, path, target=None):
        if name != PROGRAM:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        spec.loader = Loader(name, spec.origin)
        return spec


sys.meta_path.insert(0, Finder())
