"""The plan's memory against peaks that others have published, for runs whose configuration is stated well enough.

    .venv/bin/python benchmarks/published.py

Nothing is measured here. The published runs used other software, so each row says what differs from a run of this
project; what a source does not state, and is assumed, is marked so. `readme.py` writes the table into README.md.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sft_recipes.config.schema import Lora
from sft_recipes.planner import memory
from sft_recipes.runtime import units

_QWEN3 = {"model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151_936}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Qwen3-4B": {
        **_QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "Qwen3-14B": {
        **_QWEN3, "hidden_size": 5120, "intermediate_size": 17_408, "num_hidden_layers": 40, "num_attention_heads": 40,
    },
    "Qwen3-32B": {
        **_QWEN3, "hidden_size": 5120, "intermediate_size": 25_600, "num_hidden_layers": 64, "num_attention_heads": 64,
    },
    "Llama 3.1 8B": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
    },
    "Qwen-7B": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 151_936,
    },
    "Qwen-14B": {
        "model_type": "llama", "hidden_size": 5120, "intermediate_size": 13_696, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 152_064,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One published peak per GPU, in GiB, and the run it is of."""

    model: str
    engine: str
    gpus: int
    tokens: int
    gib: float
    source: str
    differs: str
    lora: Lora | None = None
    accumulation: int = 1

    @property
    def planned(self) -> dict[str, int]:
        """What the plan says of the same model, strategy and tokens."""
        load = memory.MemoryInputs(
            ARCHITECTURES[self.model], self.engine, "bf16", self.gpus, self.tokens, gradient_checkpointing=True,
            lora=self.lora, accumulation=self.accumulation,
        )  # fmt: skip
        return memory.bytes_per_gpu(load)


_TRL = "[TRL v1.4](https://github.com/huggingface/trl/releases/tag/v1.4.0)"
_TRL_SAYS = "one row and checkpointing assumed; GB taken as GiB, since 16 bytes per parameter of the 4B are 64.4 GB"
_TITAN = "[torchtitan 1690](https://github.com/pytorch/torchtitan/pull/1690)"
_TITAN_SAYS = (
    "logits of all tokens at once, in bf16, in fp32 and their gradient, 11.6 GiB; reserved, not allocated memory; "
    "torch.compile; two rows of 4,096 assumed"
)
_TUNE = "[torchtune](https://github.com/pytorch/torchtune/blob/0031bfb/README.md#memory-and-training-speed)"
_QWEN = "[Qwen](https://github.com/QwenLM/Qwen/blob/03cd81f/README.md#profiling-of-memory-and-speed)"
_QWEN_SAYS = (
    "logits of all tokens at once; the CUDA context is probably counted; if G means 10^9 bytes, these and 0.6 GiB of "
    "context explain the difference, if GiB, 1 to 3 GiB stay unexplained"
)
ROWS = (
    Row("Qwen3-4B", "single", 1, 16_384, 63.8, _TRL, _TRL_SAYS),
    Row("Qwen3-14B", "fsdp2", 8, 16_384, 38.9, _TRL, _TRL_SAYS),
    Row("Qwen3-32B", "fsdp2", 8, 8192, 71.2, _TRL, _TRL_SAYS),
    Row("Qwen3-32B", "fsdp2", 8, 8192, 81.85, _TITAN, _TITAN_SAYS),
    Row("Llama 3.1 8B", "single", 1, 4096, 7.4, _TUNE, "bf16 adapters; torch.compile", Lora(8, quantize="nf4")),
    Row(
        "Qwen-7B",
        "zero3",
        2,
        256,
        69.6,
        _QWEN,
        "logits of all tokens at once; buckets not stated",
        accumulation=2,
    ),
    Row("Qwen-7B", "single", 1, 512, 20.4, _QWEN, _QWEN_SAYS, Lora(64), 2),
    Row("Qwen-14B", "single", 1, 512, 35.1, _QWEN, _QWEN_SAYS, Lora(64), 2),
)


def table() -> str:
    """The rows as a table."""
    lines = [
        "| run | published, GiB | planned | published / planned | with the reserve | source, and what differs |",
        "|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        parts = row.planned
        planned, reserved = parts["total"] / units.GIB, (parts["total"] + parts["reserve"]) / units.GIB
        method = "full" if row.lora is None else "QLoRA" if row.lora.quantize else "LoRA"
        lines.append(
            f"| {row.model}, {method}, {row.engine} on {row.gpus}, {row.tokens:,} tokens | {row.gib:g} | {planned:.1f} "
            f"| {row.gib / planned:.2f} | {reserved:.1f} | {row.source}: {row.differs} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
