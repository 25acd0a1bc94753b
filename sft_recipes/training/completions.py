"""Greedy completions of held-out prompts, before and after training, and their scores."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sft_recipes.data import held_out_metrics
from sft_recipes.runtime.errors import ConfigError
from sft_recipes.runtime.run_dir import read_json, write_json
from sft_recipes.runtime.text import escape_unprintable

log = logging.getLogger(__name__)

_PROMPTS_PER_BATCH = 64


@dataclass(frozen=True)
class Prompt:
    """A held-out conversation up to its last assistant turn; `answer` is that turn, the reference."""

    messages: list[dict[str, Any]]
    answer: str
    answer_tokens: int
    input_ids: list[int]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Completions:
    """A model's completions of prompts, with `mean` and `prompts` of each held-out metric."""

    prompts: list[Prompt]
    texts: list[str]
    metrics: dict[str, dict[str, float | int]]


def complete_before_training(trainer: Any) -> dict[str, Any] | None:
    """Complete the held-out prompts before the first step, and return the stored `Completions`; a resume reads them.

    Under DeepSpeed and FSDP2 the model is not on its device before the first step.
    """
    if not trainer.accelerator.is_main_process or not trainer.plan.strategy.replicated:
        return None
    if not trainer.folder.generations.is_file():
        _store(trainer, "before", complete(trainer, trainer.plan.sections.generation.score))
    return read_json(trainer.folder.generations).get("before")


def complete_after_training(trainer: Any) -> Completions | None:
    """Complete the held-out prompts with the published weights; a metric that fails now does not fail the run."""
    if not trainer.plan.strategy.shards_parameters:
        trainer.load_weights(trainer.folder.final)
    try:
        completed = complete(trainer, trainer.plan.sections.generation.score)
    except ConfigError as error:
        log.warning("%s", error)
        completed = complete(trainer)
    _store(trainer, "after", completed)
    return completed


def _store(trainer: Any, key: str, completed: Completions | None) -> None:
    stored = read_json(trainer.folder.generations)
    write_json(trainer.folder.generations, {**stored, key: asdict(completed) if completed else None})


def complete(trainer: Any, score: int = 0) -> Completions | None:
    """Complete the held-out prompts that are shown or scored; None without prompts, or if parameters are sharded.

    Raises:
        ConfigError: a metric fails.
    """
    section = trainer.plan.sections.generation
    prompts = read_prompts(trainer.prepared, max(section.show, score))
    if not prompts or trainer.plan.strategy.shards_parameters:
        return None
    texts = complete_prompts(trainer, prompts, section.max_new_tokens)
    # Completions cannot reach a longer reference.
    scored = [
        (prompt.messages, prompt.answer, text)
        for prompt, text in zip(prompts[:score], texts[:score], strict=True)
        if prompt.answer_tokens < section.max_new_tokens
    ]
    return Completions(prompts, texts, held_out_metrics.evaluate(held_out_metrics.load(section), scored))


def read_prompts(prepared: Path, count: int) -> list[Prompt]:
    """Read the first held-out prompts."""
    lines = (prepared / "prompts.jsonl").read_text(encoding="utf-8").split("\n")
    return [Prompt(**json.loads(line)) for line in lines[:count] if line]


def complete_prompts(trainer: Any, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
    """Complete prompts greedily, so that no random number of the training is used."""
    model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
    was_training, texts = model.training, []
    model.eval()
    with trainer.compute_loss_context_manager():  # fp32 weights compute in bf16: flash attention takes no fp32
        for first in range(0, len(prompts), _PROMPTS_PER_BATCH):
            batch = [prompt.input_ids for prompt in prompts[first : first + _PROMPTS_PER_BATCH]]
            ids = generate_ids(model, tokenizer, batch, max_new_tokens, trainer.end_of_turn_ids)
            texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    model.train(was_training)
    return texts


def generate_ids(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int, stop: Sequence[int]
) -> torch.Tensor:
    """Return the token ids, [prompts, at most max_new_tokens], of greedy completions of tokenized prompts.

    Args:
        prompts: token ids of each, of any lengths; padded on the left here.
        stop: token ids that end a completion.
    """
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    options = {"eos_token_id": list(stop), "pad_token_id": tokenizer.pad_token_id, "use_cache": True}
    with torch.no_grad():
        output = model.generate(**batch, **options, max_new_tokens=max_new_tokens, do_sample=False)
    return output[:, batch["input_ids"].shape[1] :]


def format_examples(before: dict[str, Any] | None, after: Completions, count: int) -> str:
    """Format the first prompts with their reference and the completions before and after training."""
    blocks = []
    for index, (prompt, text) in enumerate(zip(after.prompts[:count], after.texts, strict=False)):
        lines = [f"  {message['role']:<9}  {excerpt(message['content'])}" for message in prompt.messages]
        lines.append(f"  reference  {excerpt(prompt.answer)}")
        if before is not None:
            lines.append(f"  before     {excerpt(before['texts'][index])}")
        lines.append(f"  after      {excerpt(text)}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def excerpt(text: str, max_length: int = 100) -> str:
    """Return a text on one line of at most `max_length` characters, without terminal control characters."""
    line = escape_unprintable(" ".join(text.split()))
    return line if len(line) <= max_length else line[: max_length - 1] + "\N{HORIZONTAL ELLIPSIS}"
