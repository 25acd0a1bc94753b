"""Low-rank adapters: how the frozen model is loaded, what is added to it, and how the two become one model again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sft_recipes.planning import plan as plans
from sft_recipes.planning.plan import Plan
from sft_recipes.planning.run_folder import RunFolder, read_json
from sft_recipes.planning.schema import RecipeError
from sft_recipes.training.quiet import quiet

# Of the largest logit: what rounding explains when an adapter is added to weights of that precision.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


def quantization(plan: Plan) -> Any:
    """How the frozen weights are loaded: 4-bit NormalFloat with quantized scales (QLoRA), or None for whole ones."""
    lora = plan.sections["lora"]
    if not lora.get("quantize"):
        return None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=lora["quantize"],
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if plan.precision == "bf16" else torch.float32,
    )


def configuration(plan: Plan) -> Any:
    """peft's LoraConfig of the plan; None for full fine-tuning."""
    lora = plan.sections["lora"]
    if not lora:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=lora["r"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=lora["target_modules"],
        bias="none",
        task_type="CAUSAL_LM",
        revision=plan.sections["model"]["revision"],
    )


def hold_in_fp32(model: Any, plan: Plan) -> None:
    """Puts the adapters in the plan's dtype; TRL makes them bf16 over 4-bit weights, without a master copy.

    DeepSpeed casts them itself, and keeps the fp32 master.
    """
    if plan.method != "full" and plan.dtypes["weights"] == "fp32":
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def keep_the_trained_layout(model: Any) -> None:
    """Has bitsandbytes leave 4-bit weights on a CPU as they are.

    On CPUs with AVX512-BF16 its Linear4bit repacks them at the first evaluation (0.50, nn/modules.py, `forward`, since
    https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1804), and no gradient passes through them in any later
    step: adapters below the last layers then train on what comes round by the residual stream, in silence.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def merge(folder: RunFolder) -> Path:
    """Writes `merged/`, the best adapters added to the weights that they were trained on, as one plain model.

    4-bit weights are dequantized first: the adapters have learned beside those, not beside the originals.

    Raises:
        RecipeError: the run trained no adapters or has no final model, or the merged model says something else.
    """
    quiet()
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from sft_recipes.training import checkpoint

    plan = plans.read(folder.plan)
    if plan.method == "full":
        raise RecipeError(f"RUN: {folder.name} trained the whole model, which {folder.final} already is")
    if not (folder.final / "adapter_config.json").is_file():
        raise RecipeError(
            f"RUN: {folder.path} has no final adapters yet ({folder.state()}); `make train` goes on with it"
        )
    if folder.merged.is_dir():
        return folder.merged
    dtype = torch.bfloat16 if plan.precision == "bf16" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(
        read_json(folder.prepared)["model"],
        dtype=dtype,
        quantization_config=quantization(plan),
        trust_remote_code=plan.sections["model"]["trust_remote_code"],
    )
    if plan.method == "qlora":
        base = base.dequantize(dtype)
    adapted = PeftModel.from_pretrained(base, folder.final, autocast_adapter_dtype=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(
        folder.final, trust_remote_code=plan.sections["model"]["trust_remote_code"]
    )
    probe = torch.tensor([list(range(min(64, base.config.vocab_size)))], device=base.device)
    with torch.no_grad():
        before = adapted(input_ids=probe).logits.float()
        merged = adapted.merge_and_unload()
        after = merged(input_ids=probe).logits.float()
    difference, largest = float((after - before).abs().max()), float(before.abs().max())
    if not difference <= _TOLERANCE[merged.dtype] * largest:
        raise RecipeError(
            f"RUN: the merged model's logits differ from the adapted one's by {difference:.2g} of {largest:.2g}; "
            f"nothing was written"
        )
    merged.generation_config = GenerationConfig.from_pretrained(folder.final)
    partial = folder.saving / folder.merged.name
    merged.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    sealed = {"run_id": plan.run_id, "files": checkpoint.checksums(partial, checkpoint.names(partial))}
    checkpoint.seal(partial, sealed)
    checkpoint.publish(partial, folder.merged, folder.removing)
    print(f"merged     {folder.merged} (largest logit {largest:.3g}, largest difference by merging {difference:.2g})")
    return folder.merged
