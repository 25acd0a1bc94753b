"""The table of GPU types: memory and dense bf16 peak FLOP/s of each, with the source."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sft_recipes.config.schema import did_you_mean
from sft_recipes.runtime.errors import ConfigError
from sft_recipes.runtime.units import GIB

_MIB = 1024**2

# Drivers and torch report a few percent less memory than the table, a GPU with ECC off 6.7% more. Editions with other
# memory have the same product name and are outside of this range.
_SMALLEST, _LARGEST = 0.96, 1.07


@dataclass(frozen=True)
class GpuType:
    """One row of the table.

    Attributes:
        name: value of GPU_TYPE and `hardware.gpu_type`.
        pattern: regular expression for the product name that nvidia-smi and torch report, matched without case.
        memory_mib: `memory.total` of nvidia-smi, ECC on where the type has it.
        tflops: dense bf16 matrix multiplication with fp32 accumulation, in 1e12 FLOP/s, without sparsity.
        link_gbs: to another GPU of the node, in 1e9 bytes/s and direction: NVLink where every GPU of a usual server
            has it (450 for NVLink 4, 900 for NVLink 5), else PCIe x16 (32 for generation 4, 64 for generation 5).
        source: where FLOP/s and links are published.
    """

    name: str
    pattern: str
    memory_mib: int
    tflops: float
    link_gbs: float
    source: str

    @property
    def peak_flops(self) -> float:
        """FLOP/s."""
        return self.tflops * 1e12


_GA102 = "NVIDIA Ampere GA102 architecture whitepaper, appendix A"
_ADA = "NVIDIA Ada GPU architecture whitepaper, appendix A"
_RTX_BLACKWELL = "NVIDIA RTX Blackwell GPU architecture whitepaper, appendix A"

# Rows with overlapping patterns are ordered from specific to general: the first match is used. Memory is what
# nvidia-smi prints on such machines. FLOP/s of data sheets that count sparsity are halved.
GPU_TYPES: tuple[GpuType, ...] = (
    GpuType("gb300-288g", r"\bGB300\b", 284_208, 2500, 900, "NVIDIA GB300 NVL72 data sheet, over 72 GPUs; TRL's table"),
    GpuType("gb200-186g", r"\bGB200\b", 189_471, 2500, 900, "NVIDIA GB200 NVL72 data sheet, over 72 GPUs; TRL's table"),
    GpuType("b300-288g", r"\bB300\b", 275_040, 2250, 900, "NVIDIA HGX B300 data sheet, over 8 GPUs; TRL's table"),
    GpuType("b200-180g", r"\bB200\b", 183_359, 2250, 900, "NVIDIA HGX B200 data sheet, over 8 GPUs; torchtitan, TRL"),
    GpuType("gh200-144g", r"\bGH200\b", 146_831, 990, 450, "NVIDIA GH200 Grace Hopper Superchip data sheet"),
    GpuType("gh200-96g", r"\bGH200\b", 97_871, 990, 450, "NVIDIA GH200 Grace Hopper Superchip data sheet"),
    GpuType("h200-nvl-141g", r"\bH200 NVL\b", 143_771, 835, 64, "NVIDIA H200 data sheet, column NVL; TRL's table"),
    GpuType("h200-141g", r"\bH200\b", 143_771, 989, 450, "NVIDIA H200 data sheet, column SXM; torchtitan, TRL"),
    GpuType("h100-nvl-94g", r"\bH100 NVL\b", 95_830, 835, 64, "NVIDIA H100 data sheet, column NVL; torchtitan, TRL"),
    GpuType("h100-pcie-80g", r"\bH100 PCIe\b", 81_559, 756, 64, "NVIDIA H100 PCIe data sheet; torchtitan, TRL"),
    GpuType("h100-80g", r"\bH100\b", 81_559, 989, 450, "NVIDIA H100 data sheet, column SXM; torchtitan, TRL"),
    GpuType("a100-80g", r"\bA100\b", 81_920, 312, 300, "NVIDIA A100 data sheet, PCIe and SXM; torchtitan, TRL"),
    GpuType("a100-40g", r"\bA100\b", 40_960, 312, 300, "NVIDIA A100 data sheet, PCIe and SXM; torchtitan, TRL"),
    GpuType("a40-48g", r"\bA40\b", 46_068, 149.7, 32, "NVIDIA A40 data sheet"),
    GpuType("a30-24g", r"\bA30\b", 24_576, 165, 32, "NVIDIA A30 data sheet"),
    # TRL's table has the A10's 125 for the A10G too, whose tensor cores are slower.
    GpuType("a10g-24g", r"\bA10G\b", 23_028, 70, 32, "NVIDIA A10G data sheet (AWS)"),
    GpuType("a10-24g", r"\bA10\b", 23_028, 125, 32, "NVIDIA A10 data sheet; TRL's table"),
    GpuType("l40s-48g", r"\bL40S\b", 46_068, 362, 32, "NVIDIA L40S data sheet; torchtitan, TRL"),
    GpuType("l40-48g", r"\bL40\b", 46_068, 181, 32, "NVIDIA L40 data sheet"),
    GpuType("l4-24g", r"\bL4\b", 23_034, 121, 32, "NVIDIA L4 data sheet; TRL's table"),
    GpuType("rtx-pro-6000-96g", r"\bRTX PRO 6000\b(?!.*Max-Q)", 97_887, 500, 64, "TRL's table"),
    GpuType("rtx-6000-ada-48g", r"\bRTX 6000 Ada\b", 49_140, 364, 32, "NVIDIA RTX 6000 Ada data sheet"),
    GpuType("rtx-a6000-48g", r"\bRTX A6000\b", 49_140, 154.8, 32, f"{_GA102}; TRL's table"),
    GpuType("rtx5090-32g", r"\bRTX 5090\b(?! Laptop| D\b)", 32_607, 209.5, 64, _RTX_BLACKWELL),
    GpuType("rtx5080-16g", r"\bRTX 5080\b(?! Laptop)", 16_303, 112.6, 64, _RTX_BLACKWELL),
    GpuType("rtx4090-24g", r"\bRTX 4090\b(?! Laptop| D\b)", 24_564, 165.2, 32, _ADA),
    GpuType("rtx4080-16g", r"\bRTX 4080\b(?! Laptop| SUPER)", 16_376, 97.5, 32, _ADA),
    GpuType("rtx3090-24g", r"\bRTX 3090\b(?! Ti)", 24_576, 71, 32, _GA102),
)
_BY_NAME = {gpu.name: gpu for gpu in GPU_TYPES}


def find_gpu_type(name: str | None) -> GpuType | None:
    """Return the GPU type of this name; None for a number of GiB or no name.

    Raises:
        ConfigError: neither a name in the table nor a number of GiB.
    """
    if name is None or re.fullmatch(r"\d+(\.\d+)?", name):
        return None
    if name not in _BY_NAME:
        raise ConfigError(
            f"GPU_TYPE: unknown GPU type: found {name!r}, expected a name such as h100-80g, a100-80g, l40s-48g (all: "
            f"docs/models.md), or GiB of memory, such as 80{did_you_mean(name, _BY_NAME)}"
        )
    return _BY_NAME[name]


def identify(product: str, memory_mib: float) -> GpuType | None:
    """Return the type of a GPU that nvidia-smi or torch reports; None if not in the table, or a MIG slice."""
    for gpu in GPU_TYPES if not re.search(r"\bMIG\b", product) else ():
        in_range = _SMALLEST * gpu.memory_mib <= memory_mib <= _LARGEST * gpu.memory_mib
        if in_range and re.search(gpu.pattern, product, re.IGNORECASE):
            return gpu
    return None


def memory_bytes(name: str | None) -> int | None:
    """Return the memory of a GPU type or a number of GiB, as nvidia-smi counts it; None if no GPU is named.

    Raises:
        ConfigError: neither a name in the table nor a number of GiB.
    """
    gpu = find_gpu_type(name)
    return gpu.memory_mib * _MIB if gpu else int(float(name) * GIB) if name else None


def peak_flops(name: str | None) -> float | None:
    """Return the dense bf16 FLOP/s of a GPU type; None if only its memory is known."""
    gpu = find_gpu_type(name)
    return gpu.peak_flops if gpu else None
