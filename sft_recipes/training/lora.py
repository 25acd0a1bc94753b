"""Low-rank adapters: loading and quantizing the base model, and the adapter configuration."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from sft_recipes.config.schema import Lora
from sft_recipes.data import hub, model_files, model_layers
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import RunDir, read_json
from sft_recipes.training import parameter_table

LINEAR = (torch.nn.Linear, Conv1D)
# Types with mamba kernels that read a layer's weight themselves (peft 0.21, `_check_lora_target_modules_mamba`).
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


def loading_arguments(plan: Plan) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that the method decides: 4-bit NormalFloat weights with quantized
    scales for QLoRA."""
    arguments: dict[str, Any] = {"trust_remote_code": plan.sections.model.trust_remote_code}
    if plan.method == "qlora":
        from transformers import BitsAndBytesConfig

        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=plan.sections.lora.quantize,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if plan.precision == "bf16" else torch.float32,
        )
    return arguments


def loaded_dtype(plan: Plan) -> torch.dtype:
    """Return the dtype of the model's weights when loaded, except quantized ones."""
    dtype = plan.dtypes.get("frozen", plan.dtypes["weights"])
    return torch.float32 if dtype == "fp32" else torch.bfloat16


def make_lora_config(plan: Plan, base: Path, model: Any) -> Any:
    """Return peft's LoraConfig with the base model's commit; None for full fine-tuning.

    Args:
        base: folder of the base model.
        model: the loaded model.

    Raises:
        SetupError: `lora.experts`, and the model has no fused experts.
    """
    lora = plan.sections.lora
    if not lora:
        return None
    if lora.experts and not parameter_table.fused_experts(model):
        raise SetupError(f"lora.experts: {plan.model} has no fused experts. Remove lora.experts")
    return adapter_config(lora, model, hub.commit_of(base) or plan.sections.model.revision)


def linear_layers(model: Any) -> Counter[str]:
    """Return inputs + outputs of the linear layers by name, without the output layer: what adapters of rank 1 have."""
    sizes, head = Counter[str](), model.get_output_embeddings()
    for name, layer in model.named_modules():
        if isinstance(layer, LINEAR) and layer is not head:
            sizes[name.rpartition(".")[2]] += sum(layer.weight.shape)
    return sizes


def adapter_config(lora: Lora, model: Any, revision: str | None) -> Any:
    """Return peft's LoraConfig for a loaded model.

    Raises:
        SetupError: the model has none of the linear layers to adapt.
    """
    from peft import LoraConfig

    linear, fused, targets = set(linear_layers(model)), parameter_table.fused_experts(model), lora.target_modules
    if not (linear if targets == "all-linear" else linear & set(targets)):
        known = f"the linear layers of this model are {', '.join(sorted(linear)) or 'none'}"
        fix = "Set lora.target_modules=all-linear, or remove lora"
        raise SetupError(f"lora.target_modules: found {targets}, and {known}. {fix}")
    # peft would add the experts and routers of some models, and rejects this layer of some.
    rejected = {"out_proj"} if model.config.model_type in _MAMBA else set()
    if targets == "all-linear" and (fused or rejected):
        targets = sorted(linear - rejected)
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        target_parameters=fused if lora.experts else None,
        task_type="CAUSAL_LM",
        revision=revision,
    )


def cast_trainable_to_fp32(model: Any, plan: Plan) -> None:
    """Cast the adapters to fp32 if the plan says so; TRL makes them bf16 over 4-bit weights, without master weights.

    DeepSpeed casts them itself, and keeps fp32 master weights.
    """
    if plan.method != "full" and plan.dtypes["weights"] == "fp32":
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def find_base_folder(plan: Plan, folder: RunDir) -> Path:
    """Return the folder of the base model of a run's adapters: the recorded one, else the Hub's at that commit.

    Raises:
        SetupError: the recorded folder does not exist, and the model is neither on the Hub nor in its cache.
    """
    recorded, model = Path(read_json(folder.prepared).get("model", "")), plan.sections.model
    if (recorded / "config.json").is_file():
        return recorded
    if model.from_scratch:
        raise SetupError(f"RUN: the base model of {folder.name} is gone: found no {recorded}. Repeat its recipe")
    commit = read_json(folder.final / "adapter_config.json").get("revision") or model.revision
    return model_files.check_model(dataclasses.replace(model, revision=commit))


def load_base(plan: Plan, folder: Path, dtype: torch.dtype, device_map: Any) -> Any:
    """Load the base model in a folder, quantized as in training.

    Args:
        device_map: passed to `from_pretrained`.
    """
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device_map, **loading_arguments(plan))


def check_quantizable(plan: Plan, folder: Path) -> None:
    """Check that 4-bit weights are what the memory forecast counts: bitsandbytes quantizes linear layers only.

    Raises:
        SetupError: QLoRA of a model with fused experts, or weights that bitsandbytes has quantized before.
    """
    trusted = plan.sections.model.trust_remote_code
    if (read_json(folder / "config.json").get("quantization_config") or {}).get("quant_method") == "bitsandbytes":
        fix = "Name the unquantized model; lora.quantize: nf4 quantizes it while loading"
        raise SetupError(f"model.name_or_path: {plan.model} has weights quantized by bitsandbytes. {fix}")
    config = model_layers.load_config(folder, trusted) if plan.method == "qlora" else None
    if config and parameter_table.fused_experts(model_layers.build_on_meta(config, trusted)):
        raise SetupError(f"lora.quantize: fused experts of {plan.model} would stay in 16 bits. Remove lora.quantize")
