"""The SFT guide's training script, with the changes that current libraries require.

    python sft_guide.py MODEL ROWS OUTPUT KEY=VALUE …

Kept: bf16 weights, packing, activation checkpointing, a loss over all tokens, the best model at the end. Changed: the
names of removed arguments (`max_seq_length`, `warmup_ratio`, `torch_dtype`), TensorBoard for W&B, which needs an
account; torch's attention if flash-attn is not installed, and the CPU if there is no GPU.
"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_flash_attn_2_available
from trl import SFTConfig, SFTTrainer

model_folder, rows, output, *arguments = sys.argv[1:]
values = {
    key: float(value) if "." in value or "e" in value else int(value)
    for key, value in (argument.split("=") for argument in arguments)
}
rank, alpha = values.pop("lora_r", None), values.pop("lora_alpha", None)
tokenizer = AutoTokenizer.from_pretrained(model_folder)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(
    model_folder,
    dtype=torch.bfloat16,
    device_map="auto",
    attn_implementation="flash_attention_2" if is_flash_attn_2_available() else "sdpa",
)
files = {split: f"{rows}/{split}.jsonl" for split in ("train", "validation")}
dataset = load_dataset("json", data_files=files)
config = SFTConfig(
    output_dir=f"{output}/checkpoints",
    packing=True,
    bf16=True,
    use_cpu=not torch.cuda.is_available(),
    gradient_checkpointing=True,
    gradient_checkpointing_kwargs={"use_reentrant": False},
    lr_scheduler_type="cosine",
    eval_strategy="steps",
    save_strategy="steps",
    save_total_limit=3,
    load_best_model_at_end=True,
    metric_for_best_model="eval_loss",
    report_to="tensorboard",
    seed=42,
    data_seed=42,
    **values,
)
trainer = SFTTrainer(
    model=model,
    args=config,
    train_dataset=dataset["train"],
    eval_dataset=dataset["validation"],
    processing_class=tokenizer,
    peft_config=LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear") if rank else None,
)
trainer.train()
trainer.save_model(f"{output}/final")
tokenizer.save_pretrained(f"{output}/final")
