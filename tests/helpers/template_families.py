"""Chat templates of common model families, each with a small tokenizer that has its special tokens.

Templates that TRL ships are read from its folder. The others are written here in the form that the model cards publish.
"""

# ruff: noqa: RUF001  DeepSeek writes its special tokens with a wide bar

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from sft_recipes.data.toy.toy_model import CHAT_TEMPLATE

# Text families whose templates TRL ships: (beginning of text, end of turn).
SHIPPED = {
    "cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "cohere2": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "deepseek_r1_distill": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "deepseekv3": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "diffusion_gemma": ("<bos>", "<turn|>"),
    "gemma": ("<bos>", "<end_of_turn>"),
    "gemma3": ("<bos>", "<end_of_turn>"),
    "gemma4": ("<bos>", "<turn|>"),
    "gemma4_v2": ("<bos>", "<turn|>"),
    "gemma4_v3": ("<bos>", "<turn|>"),
    "gemma4_v4": ("<bos>", "<turn|>"),
    "gemma4_v5": ("<bos>", "<turn|>"),
    "glm4moe": (None, "<|user|>"),
    "gptoss": ("<|startoftext|>", "<|return|>"),
    "lfm2": ("<|startoftext|>", "<|im_end|>"),
    "lfm2_2_5": ("<|startoftext|>", "<|im_end|>"),
    "lfm2_2_5_v2": ("<|startoftext|>", "<|im_end|>"),
    "lfm2_v2": ("<|startoftext|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "llama3_1": ("<|begin_of_text|>", "<|eot_id|>"),
    "llama3_2": ("<|begin_of_text|>", "<|eot_id|>"),
    "muse_glimmer": ("<|begin_of_text|>", "<|eot|>"),
    "nemotron_3_5_lightning": (None, "<|im_end|>"),
    "nemotron_3_nano": (None, "<|im_end|>"),
    "nemotron_3_super": (None, "<|im_end|>"),
    "nemotron_3_ultra": (None, "<|im_end|>"),
    "phi3": (None, "<|endoftext|>"),
    "phi3_5": (None, "<|endoftext|>"),
    "qwen2_5": (None, "<|im_end|>"),
    "qwen3": (None, "<|im_end|>"),
    "qwen3_5_nothink": (None, "<|im_end|>"),
    "qwen3_5_think": (None, "<|im_end|>"),
    "qwen3_6": (None, "<|im_end|>"),
    "qwen3_8": (None, "<|im_end|>"),
    "qwen3_instruct_2507": (None, "<|im_end|>"),
}
WITH_IMAGES = ("idefics3", "lfm2_2_5_vl", "llava_next", "qwen2_5_vl", "qwen3_vl", "smolvlm")

_HEADER = "'<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
WRITTEN: dict[str, tuple[str | None, str, str]] = {
    "ChatML": (None, "<|im_end|>", CHAT_TEMPLATE),
    "Llama 3.1, without tools": (
        "<|begin_of_text|>",
        "<|eot_id|>",
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n' + system + '<|eot_id|>' }}"
        "{% for m in messages %}{{ " + _HEADER + " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    ),
    "Llama 3.2, with today's date": (
        "<|begin_of_text|>",
        "<|eot_id|>",
        "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + system + '<|eot_id|>' }}"
        "{% for m in messages %}{{ " + _HEADER + " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    ),
    "Llama 2": (
        "<s>",
        "</s>",
        "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for m in messages %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    ),
    "Mistral": (
        "<s>",
        "</s>",
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for m in messages %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + (system if loop.last or loop.index == messages|length - 1 else '') + m['content'] + '[/INST]' }}"
        "{% elif m['tool_calls'] %}{{ '[TOOL_CALLS] [' }}{% for call in m['tool_calls'] %}{{ call['function'] | tojson }}"
        "{% if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}{{ ']' + eos_token }}"
        "{% elif m['role'] == 'tool' %}{{ '[TOOL_RESULTS] {\"content\": ' + m['content'] | tojson + '}[/TOOL_RESULTS]' }}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
    ),
    "OLMo 2": (
        "<|endoftext|>",
        "<|endoftext|>",
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>\n' + m['content'] + eos_token }}"
        "{% if not loop.last %}{{ '\n' }}{% endif %}{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
    ),
    "Zephyr": (
        "<s>",
        "</s>",
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    ),
    "SmolLM 3, with generation blocks": (
        None,
        "<|im_end|>",
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
        "{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ),
}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather of a town.",
            "parameters": {"type": "object", "properties": {"town": {"type": "string", "description": "its name"}}},
        },
    }
]
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"town": "Zagreb"}}}]


def _turns(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "one turn": (_turns(("user", "alpha 1?"), ("assistant", "bravo 2.")), None),
    "several": (
        _turns(("user", "alpha 1?"), ("assistant", "bravo 2."), ("user", " charlie\n"), ("assistant", "delta 4")),
        None,
    ),
    "system": (_turns(("system", "echo 5."), ("user", "alpha 1?"), ("assistant", "bravo 2.")), None),
    "tools": (
        [
            *_turns(("user", "alpha 1?")),
            {"role": "assistant", "content": "", "tool_calls": CALL},
            {"role": "tool", "name": "weather", "content": '{"sky": "foxtrot"}'},
            *_turns(("assistant", "bravo 2.")),
        ],
        TOOLS,
    ),
    "thinking": (
        [*_turns(("user", "alpha 1?")), {"role": "assistant", "content": "bravo 2.", "reasoning_content": "golf 7"}],
        None,
    ),
}


def templates_folder() -> Path:
    spec = importlib.util.find_spec("trl")
    assert spec and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "chat_templates"


def families() -> dict[str, tuple[str | None, str, str]]:
    """Return beginning of text, end of turn and template per family."""
    shipped = {
        name: (*tokens, (templates_folder() / f"{name}.jinja").read_text(encoding="utf-8"))
        for name, tokens in SHIPPED.items()
    }
    return {**shipped, **WRITTEN}


def tokenizer_of(family: str) -> Any:
    """Return a byte-level tokenizer with the special tokens of a family's template."""
    from sft_recipes.data.toy.toy_model import train_tokenizer

    bos, eos, template = families()[family]
    special = set(re.findall(r"<[|｜][^<>{}'\s]{1,40}[|｜]>|<\|[a-z_\"]{1,20}>|<[a-z_]{1,20}\|>", template))
    special |= set(re.findall(r"<(?:start|end)_of_turn>|\[[A-Z_]{2,}\]|\[/[A-Z_]{2,}\]|<sop>|\[gMASK\]", template))
    special_tokens = sorted({*special, *filter(None, (bos, eos))})
    tokenizer = train_tokenizer(["alpha bravo charlie delta echo foxtrot golf 1234567890"] * 20, 400)
    tokenizer.add_special_tokens({"additional_special_tokens": special_tokens})
    added = [tag for tag in ("<think>", "</think>", "<tool_call>", "</tool_call>") if tag in template]
    tokenizer.add_tokens(added)  # added but not special, as in the families that have them
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template = bos, eos, template
    return tokenizer
