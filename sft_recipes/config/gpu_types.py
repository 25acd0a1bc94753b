"""The table of GPU types: memory and dense bf16 peak FLOP/s of each, with the source."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from sft_recipes.config.schema import did_you_mean, read_table
from sft_recipes.runtime.errors import ConfigError
from sft_recipes.runtime.units import GIB

# Drivers and torch report a few percent less memory than the table, a GPU with ECC off 6.7% more. Editions with other
# memory have the same product name and are outside of this range.
_SMALLEST, _LARGEST = 0.96, 1.07


@dataclass(frozen=True)
class GpuType:
    """One row of the table, whose head describes the columns."""

    name: str
    product: str
    memory_mib: int
    tflops: float
    link_gbs: float
    source: str

    @property
    def peak_flops(self) -> float:
        """FLOP/s."""
        return self.tflops * 1e12


@cache
def gpu_types() -> dict[str, GpuType]:
    """Return the table (gpu_types.yaml) by name."""
    return {name: GpuType(name, **row) for name, row in read_table("gpu_types.yaml").items()}


def find_gpu_type(name: str | None) -> GpuType | None:
    """Return the GPU type of this name; None for a number of GiB or no name.

    Raises:
        ConfigError: neither a name in the table nor a number of GiB.
    """
    if name is None or re.fullmatch(r"\d+(\.\d+)?", name):
        return None
    if name not in gpu_types():
        raise ConfigError(
            f"GPU_TYPE: unknown GPU type: found {name!r}, expected one of docs/models.md, such as h100-80g, or GiB "
            f"of memory, such as 80{did_you_mean(name, gpu_types())}"
        )
    return gpu_types()[name]


def identify(product: str, memory_mib: float) -> GpuType | None:
    """Return the type of a GPU that nvidia-smi or torch reports; None if not in the table, or a MIG slice."""
    for gpu in gpu_types().values() if not re.search(r"\bMIG\b", product) else ():
        in_range = _SMALLEST * gpu.memory_mib <= memory_mib <= _LARGEST * gpu.memory_mib
        if in_range and re.search(gpu.product, product, re.IGNORECASE):
            return gpu
    return None


def memory_bytes(name: str | None) -> int | None:
    """Return the memory of a GPU type or a number of GiB, as nvidia-smi counts it; None if no GPU is named.

    Raises:
        ConfigError: neither a name in the table nor a number of GiB.
    """
    gpu = find_gpu_type(name)
    return gpu.memory_mib * 1024**2 if gpu else int(float(name) * GIB) if name else None


def peak_flops(name: str | None) -> float | None:
    """Return the dense bf16 FLOP/s of a GPU type; None if only its memory is known."""
    gpu = find_gpu_type(name)
    return gpu.peak_flops if gpu else None
