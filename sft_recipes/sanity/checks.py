"""The checks of a trial: each passes, fails with a fix, or is skipped with a reason."""

import math
import statistics
import unicodedata
import zlib
from dataclasses import dataclass
from typing import Any

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.units import GIB
from sft_recipes.sanity import trial
from sft_recipes.training import out_of_memory

_ALREADY_LEARNED = 0.05  # nats per token
_MIN_STANDARD_ERRORS = 3.0  # by which the loss must fall
_MAX_MEMORY_FRACTION = 0.95  # of the device: the rest is for batches that the trial did not contain
MEMORY = "peak memory"  # the launcher, which has the recipe, adds the fix
_PROMPTS, _MAX_NEW_TOKENS = 3, 48


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        passed: None if it was skipped; `detail` has the reason.
        fix: of a failed check.
    """

    name: str
    passed: bool | None
    detail: str
    fix: str = ""


def check_loss_mask(trainer: Any) -> Check:
    """Check the batches that the model gets: labels equal their tokens, some are supervised, and end-of-turn tokens are
    among them (not in each row: a truncated one has lost its own). Collective: same result on every rank."""
    import torch

    from sft_recipes.data.tokenize import IGNORED
    from sft_recipes.training.completions import excerpt

    tokenizer, device = trainer.processing_class, trainer.args.device
    ends = torch.tensor(trainer.end_of_turn_ids, device=device)
    counts, shown = torch.zeros(4, dtype=torch.int64, device=device), ""
    for batch in trainer.get_train_dataloader():
        ids, labels = batch["input_ids"].to(device), batch["labels"].to(device)
        supervised, size = labels != IGNORED, torch.tensor(labels.numel(), device=device)
        wrong, is_end = (supervised & (labels != ids)).sum(), torch.isin(labels, ends).sum()
        counts += torch.stack([supervised.sum(), size, wrong, is_end])
        shown = shown or excerpt(tokenizer.decode(ids[0][supervised[0]].tolist()))
    n_supervised, n_labels, n_wrong, n_ends = trainer.accelerator.reduce(counts, "sum").tolist()
    problem = ""
    if not n_supervised:
        problem = f"all {n_labels:,} labels are masked: nothing to learn"
    elif n_wrong:
        problem = f"{n_wrong:,} labels differ from the tokens of their row"
    elif not n_ends:
        names = ", ".join(tokenizer.convert_ids_to_tokens(trainer.end_of_turn_ids))
        problem = f"no end-of-turn token ({names}) is supervised: the model would never learn to stop"
    detail = f"{n_supervised:,} of {n_labels:,} tokens supervised, {n_ends:,} end-of-turn tokens: {shown}"
    fix = "see the rows with `make inspect`; check the roles of the data and model.chat_template"
    return Check("loss mask", not problem, problem or detail, fix)


def check_initial_loss(plan: Plan, loss: float, vocabulary_size: int) -> Check:
    """Check the loss before the first step against chance, ln(vocabulary size): random weights have it, and a model
    with the wrong tokenizer or weights exceeds it."""
    chance = math.log(vocabulary_size)
    detail = f"{loss:.3f} before the first step; chance over {vocabulary_size:,} tokens is {chance:.2f}"
    if not is_better_than_chance(loss, vocabulary_size) and not plan.sections.model.from_scratch:
        detail += "; no better than chance: check that the weights are those of a trained model"
    fix = "check that model.name_or_path has its own tokenizer and complete weights, and has not seen this data"
    return Check("initial loss", 1e-4 < loss < 1.5 * chance, detail, fix)


def is_better_than_chance(loss: float, vocabulary_size: int) -> bool:
    """Whether a loss is that of a trained model: random weights have ln(vocabulary size), or slightly less."""
    return loss <= 0.95 * math.log(vocabulary_size)


def check_loss_falls(plan: Plan, first: Any, last: Any) -> Check:
    """Check that the loss falls on the rows that were trained on. Passes are compared pairwise, so differences between
    rows are not noise.

    Args:
        first: evaluation before the first step, [ranks, passes, 2]: sum of losses and number of tokens.
        last: evaluation after the last step.
    """
    from sft_recipes.training.trainer import mean_loss

    falls = [
        ((before - after) / tokens).item()
        for (before, tokens), (after, _) in zip(first.flatten(0, 1), last.flatten(0, 1), strict=True)
        if tokens
    ]
    mean = statistics.fmean(falls)
    error = statistics.stdev(falls) / math.sqrt(len(falls)) if len(falls) > 1 else 0.0
    losses = f"{mean_loss(first):.3f} -> {mean_loss(last):.3f}"
    steps = f"{trial.STEPS} steps at learning rate {plan.learning_rate:.1e}"
    detail = f"{losses} in {steps} (fall {mean:.2g}, standard error {error:.1g}, same rows)"
    rises = mean < -_MIN_STANDARD_ERRORS * error
    passed = mean > _MIN_STANDARD_ERRORS * error and mean > 0
    if not passed and not rises and mean_loss(first) < _ALREADY_LEARNED:
        return Check("loss falls", None, f"the model has already learned these rows: {detail}")
    return Check("loss falls", passed, detail, f"{'lower' if rises else 'raise'} trainer.learning_rate")


def check_gradient_norm(plan: Plan, grad_norms: list[float]) -> Check:
    """Check gradient norms after the warmup against the bounds of the SFT guide."""
    limits, norms = plan.sections.monitor, grad_norms[trial.WARMUP_STEPS :]
    median, least, most = statistics.median(norms), limits.grad_norm_below, limits.grad_norm_above
    fix = "check that weights are trainable and rows supervised (make inspect)"
    if median > most:
        fix = "lower trainer.learning_rate, remove rows that are not text, or set monitor.grad_norm_above"
    detail = f"median {median:.3g}, max {max(norms):.3g}; expected {least:g} to {most:g}"
    return Check("gradient norm", least <= median <= most, detail, fix)


def check_memory(plan: Plan, trainer: Any) -> Check:
    """Check the peak memory of the ranks against their device, and compare what tensors took with the plan's total,
    which excludes memory that the allocator reserves."""
    import torch
    from accelerate.utils import gather

    local = torch.tensor([out_of_memory.peak_memory(plan)], dtype=torch.float64, device=trainer.args.device)
    peak, allocated, total = gather(local).reshape(-1, 3).max(0).values.tolist()
    detail = f"{peak / GIB:.2f} of {total / GIB:.1f} GiB per rank"
    planned = (plan.memory_bytes_per_gpu or {}).get("total")
    if planned and plan.uses_gpu:
        detail += f"; {allocated / GIB:.2f} GiB allocated, {allocated / planned:.2f} x the plan's {planned / GIB:.2f}"
    return Check(MEMORY, peak <= _MAX_MEMORY_FRACTION * total, detail)


def check_completions(plan: Plan, trainer: Any, better_than_chance: bool) -> Check:
    """Check greedy completions of held-out prompts. Collective: parameters may be sharded, so every rank generates.

    Args:
        better_than_chance: whether the model was, before the first step; the completions are only shown otherwise.
    """
    from sft_recipes.training import completions

    if plan.strategy.shards_parameters and not trial.checks_resume(plan):
        detail = f"each token gathers all parameters under {plan.parallelism}: minutes above 13B parameters"
        return Check("completions", None, detail)
    prompts = completions.read_prompts(trainer.prepared, _PROMPTS)
    if not prompts:
        return Check("completions", None, "no held-out prompts")
    max_new_tokens = min(plan.sections.generation.max_new_tokens, _MAX_NEW_TOKENS)
    texts = completions.complete_prompts(trainer, prompts, max_new_tokens)
    excerpts = " | ".join(completions.excerpt(text, 40) or "(empty)" for text in texts)
    if not better_than_chance:
        return Check("completions", None, f"the initial weights were no better than chance: {excerpts}")
    reasons = [reason for text in texts if (reason := find_garbled(text))]
    fix = "lower trainer.learning_rate, or check that model.chat_template is the model's own"
    passed = len(reasons) * 2 <= len(texts)
    return Check("completions", passed, excerpts if passed else f"{reasons[0]}: {excerpts}", fix)


def find_garbled(text: str) -> str | None:
    """Return why a completion is not text; None if it is: empty; more than a tenth of the characters unprintable or
    undecodable; or, in 40 bytes or more, ten times less information than its length (zlib)."""
    if not text.strip():
        return "empty"
    unprintable = [c for c in text if c not in "\n\r\t" and unicodedata.category(c) in ("Cc", "Cn", "Co", "Cs")]
    if len(unprintable) + text.count("\N{REPLACEMENT CHARACTER}") > 0.1 * len(text):
        return "unprintable characters"
    encoded = text.encode()
    repeats = len(encoded) >= 40 and len(zlib.compress(encoded, 9)) < 0.1 * len(encoded) + 12
    return "repetition" if repeats else None
