"""Lets a model answer held-out prompts, greedily, and counts how many answers are exactly right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_PROMPTS_A_BATCH = 64


@dataclass(frozen=True)
class Prompt:
    """A held-out conversation up to its last answer."""

    messages: list[dict[str, str]]
    answer: str
    answer_tokens: int
    input_ids: list[int]


@dataclass(frozen=True)
class Answered:
    """What a model said to held-out prompts; `exact_match` is None where no answers were to be compared."""

    prompts: list[Prompt]
    said: list[str]
    exact_match: float | None
    compared: int


def remembered(content: dict[str, Any] | None) -> Answered | None:
    """What `asdict` made of it."""
    if content is None:
        return None
    return Answered(**{**content, "prompts": [Prompt(**prompt) for prompt in content["prompts"]]})


def read_prompts(prepared: Path, show: int, exact_match: int) -> list[Prompt]:
    """As many held-out prompts as are to be shown or compared."""
    lines = (prepared / "prompts.jsonl").read_text(encoding="utf-8").split("\n")
    return [Prompt(**json.loads(line)) for line in lines[: max(show, exact_match)] if line]


def answer(
    model: Any, tokenizer: Any, prompts: list[Prompt], exact_match: int, max_new_tokens: int, stop: Sequence[int]
) -> Answered:
    """The model's greedy answers; `exact_match` is the share of the first so many that equal the data's, to the letter.

    White space at both ends is left out of the comparison, and so are answers longer than `max_new_tokens`.
    """
    was_training = model.training
    model.eval()
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index].input_ids))
    said = [""] * len(prompts)
    for first in range(0, len(by_length), _PROMPTS_A_BATCH):
        batch = by_length[first : first + _PROMPTS_A_BATCH]
        texts = generate(model, tokenizer, [prompts[index].input_ids for index in batch], max_new_tokens, stop)
        for index, text in zip(batch, texts, strict=True):
            said[index] = text
    model.train(was_training)
    pairs = list(zip(prompts, said, strict=True))[:exact_match]
    compared = [(prompt, text) for prompt, text in pairs if prompt.answer_tokens < max_new_tokens]
    right = sum(prompt.answer.strip() == text.strip() for prompt, text in compared)
    return Answered(prompts, said, right / len(compared) if compared else None, len(compared))


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int, stop: Sequence[int]
) -> list[str]:
    """Greedy answers to tokenized prompts, without special tokens.

    Args:
        prompts: token ids of each, of any lengths; padded on the left here.
        stop: ids that end an answer.
    """
    longest = max(map(len, prompts))
    padding = tokenizer.pad_token_id
    ids = torch.tensor([[padding] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    with torch.no_grad():
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=list(stop),
            pad_token_id=padding,
            use_cache=True,
        )
    return list(tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True))


def show(before: Answered | None, after: Answered, shown: int) -> str:
    """A few prompts with what was wanted and what was said before and after."""
    blocks = []
    for index, (prompt, said) in enumerate(zip(after.prompts[:shown], after.said, strict=False)):
        turns = [f"  {message['role']:<9} {short(message['content'])}" for message in prompt.messages]
        turns.append(f"  wanted    {short(prompt.answer)}")
        if before is not None:
            turns.append(f"  before    {short(before.said[index])}")
        turns.append(f"  after     {short(said)}")
        blocks.append("\n".join(turns))
    return "\n\n".join(blocks)


def short(text: str, most: int = 100) -> str:
    """A text in one line of at most so many characters, without what a terminal would obey."""
    line = " ".join("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text).split())
    return line if len(line) <= most else line[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"
