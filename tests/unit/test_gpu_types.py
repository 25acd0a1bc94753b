"""The table of GPU types: equal to TRL's and to docs/models.md; errors."""

import pytest
from helpers.workplace import REPOSITORY
from trl.trainer.utils import get_peak_flops

from sft_recipes.config import gpu_types
from sft_recipes.runtime.errors import UserError

# Product names that nvidia-smi and torch report.
PRODUCTS = {
    "gb300-288g": "NVIDIA GB300",
    "gb200-186g": "NVIDIA GB200",
    "b300-288g": "NVIDIA B300 SXM6 AC",
    "b200-180g": "NVIDIA B200",
    "gh200-144g": "NVIDIA GH200 144G HBM3e",
    "gh200-96g": "NVIDIA GH200 480GB",
    "h200-nvl-141g": "NVIDIA H200 NVL",
    "h200-141g": "NVIDIA H200",
    "h100-nvl-94g": "NVIDIA H100 NVL",
    "h100-pcie-80g": "NVIDIA H100 PCIe",
    "h100-80g": "NVIDIA H100 80GB HBM3",
    "a100-80g": "NVIDIA A100-SXM4-80GB",
    "a100-40g": "NVIDIA A100-PCIE-40GB",
    "a40-48g": "NVIDIA A40",
    "a30-24g": "NVIDIA A30",
    "a10g-24g": "NVIDIA A10G",
    "a10-24g": "NVIDIA A10",
    "l40s-48g": "NVIDIA L40S",
    "l40-48g": "NVIDIA L40",
    "l4-24g": "NVIDIA L4",
    "rtx-pro-6000-96g": "NVIDIA RTX PRO 6000 Blackwell Server Edition",
    "rtx-6000-ada-48g": "NVIDIA RTX 6000 Ada Generation",
    "rtx-a6000-48g": "NVIDIA RTX A6000",
    "rtx5090-32g": "NVIDIA GeForce RTX 5090",
    "rtx5080-16g": "NVIDIA GeForce RTX 5080",
    "rtx4090-24g": "NVIDIA GeForce RTX 4090",
    "rtx4080-16g": "NVIDIA GeForce RTX 4080",
    "rtx3090-24g": "NVIDIA GeForce RTX 3090",
}
DIFFERS_FROM_TRL = {"a10g-24g"}  # TRL takes the A10's 125 TFLOP/s; the A10G's data sheet has 70


def test_every_gpu_type_has_a_product_name():
    assert list(PRODUCTS) == list(gpu_types.gpu_types())


@pytest.mark.parametrize("gpu", gpu_types.gpu_types().values(), ids=lambda gpu: gpu.name)
def test_gpu_is_identified_by_name_and_memory(gpu):
    product = PRODUCTS[gpu.name]
    for reported in (gpu.memory_mib, 0.975 * gpu.memory_mib):  # reported by nvidia-smi and by torch
        assert gpu_types.identify(product, reported) is gpu
    assert gpu_types.identify(product, gpu.memory_mib / 2) is not gpu, "a slice of it"


@pytest.mark.parametrize("gpu", gpu_types.gpu_types().values(), ids=lambda gpu: gpu.name)
def test_peak_flops_equal_trl(gpu):
    expected = get_peak_flops(PRODUCTS[gpu.name], "bfloat16")
    if expected is not None and gpu.name not in DIFFERS_FROM_TRL:
        assert gpu.peak_flops == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("gpu", gpu_types.gpu_types().values(), ids=lambda gpu: gpu.name)
def test_docs_list_the_gpu_types(gpu):
    page = (REPOSITORY / "docs" / "models.md").read_text()
    assert f"| `{gpu.name}` | {gpu.memory_mib / 1024:.1f} | {gpu.tflops:g} | {gpu.source} |" in page


def test_gpu_type_is_a_name_or_gib():
    assert gpu_types.memory_bytes("h100-80g") == 81_559 * 2**20 and gpu_types.memory_bytes("80") == 80 * 2**30
    assert gpu_types.peak_flops("h100-80g") == 989e12 and gpu_types.peak_flops("h100-pcie-80g") == 756e12
    assert gpu_types.memory_bytes(None) is gpu_types.peak_flops(None) is gpu_types.peak_flops("80") is None
    with pytest.raises(UserError, match="unknown GPU type: found 'h100-80gb', .* did you mean h100-80g") as error:
        gpu_types.memory_bytes("h100-80gb")
    assert len(str(error.value)) < 200
