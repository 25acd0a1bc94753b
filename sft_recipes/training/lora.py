"""Low-rank adapters: how the frozen model is loaded, and what is added to it."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sft_recipes.data import hub, model_files
from sft_recipes.planner.memory import NF4_BYTES
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import RunDir, read_json
from sft_recipes.runtime.units import GIB

_LIBRARIES_BYTES = GIB  # of a process that has imported torch, transformers and peft; an estimate


def quantization(plan: Plan) -> Any:
    """How the frozen weights are loaded: 4-bit NormalFloat with quantized scales (QLoRA), or None for whole ones."""
    lora = plan.sections.lora
    if lora is None or not lora.quantize:
        return None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=lora.quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if plan.precision == "bf16" else torch.float32,
    )


def loaded_dtype(plan: Plan) -> torch.dtype:
    """The dtype that the model's weights are loaded in, apart from quantized ones."""
    held = plan.dtypes.get("frozen", plan.dtypes["weights"])
    return torch.float32 if held == "fp32" else torch.bfloat16


def configuration(plan: Plan, base: Path) -> Any:
    """peft's LoraConfig of the plan, with the commit of the base model; None for full fine-tuning.

    Args:
        base: the folder that the base model is loaded from.
    """
    lora = plan.sections.lora
    if not lora:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        bias="none",
        task_type="CAUSAL_LM",
        revision=hub.commit_of(base) or plan.sections.model.revision,
    )


def cast_trainable_to_fp32(model: Any, plan: Plan) -> None:
    """Puts the adapters in the plan's dtype; TRL makes them bf16 over 4-bit weights, without a master copy.

    DeepSpeed casts them itself, and keeps the fp32 master.
    """
    if plan.method != "full" and plan.dtypes["weights"] == "fp32":
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def save_adapters_alone(model: Any, plan: Plan) -> None:
    """Keeps the frozen embeddings out of saved adapters, and every save off the network.

    peft (0.21, utils/save_and_load.py, `save_embedding_layers="auto"`) looks up the base model's vocabulary on the Hub
    at `main` at each save. Embeddings that a new padding token made larger would be saved too, and then fit no base.
    """
    if plan.method != "full":
        model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)


def disable_cpu_repack(model: Any) -> None:
    """Has bitsandbytes leave 4-bit weights on a CPU as they are.

    On CPUs with AVX512-BF16 its Linear4bit repacks them at the first evaluation (0.50, nn/modules.py, `forward`, since
    https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1804), and no gradient passes through them in any later
    step: adapters below the last layers then train on what comes round by the residual stream, in silence.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def base_folder(plan: Plan, folder: RunDir) -> Path:
    """The folder of the model that a run's adapters were trained on: the recorded one, else the Hub's at that commit.

    Raises:
        SetupError: the recorded folder is gone, and the model is neither on the Hub nor in its cache.
    """
    recorded, model = Path(read_json(folder.prepared).get("model", "")), plan.sections.model
    if (recorded / "config.json").is_file():
        return recorded
    if model.from_scratch:
        raise SetupError(
            f"RUN: the base model of {folder.name} is gone: found no {recorded}. Start the same recipe with the same "
            f"data again: it builds the same model there"
        )
    commit = read_json(folder.final / "adapter_config.json").get("revision") or model.revision
    return model_files.check_model(dataclasses.replace(model, revision=commit))


def load_base(plan: Plan, folder: Path, dtype: torch.dtype, device_map: Any) -> Any:
    """The base model in a folder, quantized as it was in training.

    Args:
        device_map: as `from_pretrained` takes it.
    """
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        quantization_config=quantization(plan),
        trust_remote_code=plan.sections.model.trust_remote_code,
        device_map=device_map,
    )


@dataclass(frozen=True)
class BaseSize:
    """Numbers of weights of a base model: all, those of its linear layers, and those of the largest of these."""

    weights: int
    linear: int
    largest: int

    def loaded_bytes(self, plan: Plan) -> int:
        """Bytes of the model as `load_base` holds it."""
        width = loaded_dtype(plan).itemsize
        quantized = self.linear if plan.method == "qlora" else 0
        return int(width * (self.weights - quantized) + NF4_BYTES * quantized)

    def merging_bytes(self, plan: Plan) -> int:
        """Peak host memory of `merge`, in bytes.

        The merged model, and with QLoRA the 4-bit weights, which transformers keeps until all are dequantized; three
        fp32 tensors of the largest layer, in which adapters are multiplied out; the libraries. Weight files are mapped,
        and their pages reclaimed; saving copies nothing.
        """
        width = 2 if plan.precision == "bf16" else 4
        quantized = NF4_BYTES * self.linear if plan.method == "qlora" else 0
        return int(width * self.weights + quantized + 3 * 4 * self.largest + _LIBRARIES_BYTES)


def base_size(folder: Path, trust_remote_code: bool) -> BaseSize:
    """Counts the weights of the model in a folder without loading them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    adapted = [layer.weight.numel() for layer in layers if layer is not model.get_output_embeddings()]
    return BaseSize(model.num_parameters(), sum(adapted), max(adapted))
