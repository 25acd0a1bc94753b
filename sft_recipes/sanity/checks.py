"""The checks of a trial: each passes, fails with a fix, or is skipped with a reason."""

from __future__ import annotations

import math
import statistics
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sft_recipes.config import sizes
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.env import host_memory_bytes
from sft_recipes.runtime.units import GIB
from sft_recipes.sanity import trial
from sft_recipes.training import out_of_memory

_ALREADY_LEARNED = 0.05  # nats per token
_MIN_STANDARD_ERRORS = 3.0  # by which the loss must fall
_MAX_MEMORY_FRACTION = 0.95  # of the device: the rest is for batches that the trial did not contain
MEMORY = "peak memory"  # the launcher, which has the recipe, adds the fix


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


def check_loss_mask(trainer: Any, end_of_turn_ids: Sequence[int]) -> Check:
    """Check the batches that the model gets: labels equal their tokens, some are supervised, and end-of-turn tokens are
    among them (not in each row: a truncated one has lost its own). Collective: same result on every rank."""
    import torch

    from sft_recipes.data.tokenize import IGNORED
    from sft_recipes.training.completions import excerpt

    ends = torch.tensor(list(end_of_turn_ids), device=trainer.args.device)
    counts = torch.zeros(4, dtype=torch.int64, device=trainer.args.device)
    shown = ""
    for batch in trainer.get_train_dataloader():
        ids, labels = batch["input_ids"].to(ends.device), batch["labels"].to(ends.device)
        supervised = labels != IGNORED
        counts += torch.stack(
            [
                supervised.sum(),
                supervised.new_tensor(labels.numel(), dtype=torch.int64),
                (supervised & (labels != ids)).sum(),
                torch.isin(labels, ends).sum(),
            ]
        )
        shown = shown or excerpt(trainer.processing_class.decode(ids[0][supervised[0]].tolist()))
    n_supervised, n_labels, n_wrong, n_ends = trainer.accelerator.reduce(counts, "sum").tolist()
    name, fix = "loss mask", "see the rows with `make inspect`; check the roles of the data and model.chat_template"
    if not n_supervised:
        return Check(name, False, f"all {n_labels:,} labels are masked: nothing to learn", fix)
    if n_wrong:
        return Check(name, False, f"{n_wrong:,} labels differ from the tokens of their row", fix)
    if not n_ends:
        ends_of_turn = ", ".join(trainer.processing_class.convert_ids_to_tokens(list(end_of_turn_ids)))
        detail = f"no end-of-turn token ({ends_of_turn}) is supervised: the model would never learn to stop"
        return Check(name, False, detail, fix)
    detail = f"{n_supervised:,} of {n_labels:,} tokens supervised, {n_ends:,} end-of-turn tokens: {shown}"
    return Check(name, True, detail)


def check_initial_loss(plan: Plan, record: Any, vocabulary_size: int) -> Check:
    """Check the loss before the first step against chance, ln(vocabulary size): random weights have it, and a model
    with the wrong tokenizer or weights exceeds it."""
    loss, chance = mean_loss(record.losses_per_pass[0]), math.log(vocabulary_size)
    detail = f"{loss:.3f} before the first step; chance over {vocabulary_size:,} tokens is {chance:.2f}"
    if not 1e-4 < loss < 1.5 * chance:
        fix = "check that model.name_or_path has its own tokenizer and complete weights, and has not seen this data"
        return Check("initial loss", False, detail, fix)
    if not is_better_than_chance(loss, vocabulary_size) and not plan.sections.model.from_scratch:
        detail += "; no better than chance: check that the weights are those of a trained model"
    return Check("initial loss", True, detail)


def mean_loss(passes: Any) -> float:
    """Mean per token over all passes on all ranks, of a tensor [ranks, passes, 2] (sum of losses, tokens)."""
    return float(passes[..., 0].sum() / passes[..., 1].sum())


def is_better_than_chance(loss: float, vocabulary_size: int) -> bool:
    """Whether a loss is that of a trained model: random weights have ln(vocabulary size), or slightly less."""
    return loss <= 0.95 * math.log(vocabulary_size)


def check_loss_falls(plan: Plan, record: Any) -> Check:
    """Check that the loss falls on the rows that were trained on. Passes are compared pairwise, so differences between
    rows are not noise."""
    first, last = record.losses_per_pass[0], record.losses_per_pass[-1]
    before, after = (passes[..., 0] / passes[..., 1].clamp(min=1) for passes in (first, last))
    pairs = zip((before - after).flatten().tolist(), first[..., 1].flatten().tolist(), strict=True)
    falls = [fall for fall, tokens in pairs if tokens]
    mean = statistics.fmean(falls)
    error = statistics.stdev(falls) / math.sqrt(len(falls)) if len(falls) > 1 else 0.0
    detail = (
        f"{mean_loss(first):.3f} -> {mean_loss(last):.3f} in {len(record.losses)} steps at learning rate "
        f"{plan.learning_rate:.1e} (fall {mean:.2g}, standard error {error:.1g}, same rows)"
    )
    if mean > _MIN_STANDARD_ERRORS * error and mean > 0:
        return Check("loss falls", True, detail)
    rises = mean < -_MIN_STANDARD_ERRORS * error
    if mean_loss(first) < _ALREADY_LEARNED and not rises:
        return Check("loss falls", None, f"the model has already learned these rows: {detail}")
    fix = (
        f"lower the learning rate: {suggest_learning_rate(plan, 1 / 3)}"
        if rises
        else f"raise the learning rate: {suggest_learning_rate(plan, 2)}"
    )
    return Check("loss falls", False, detail, fix)


def suggest_learning_rate(plan: Plan, factor: float) -> str:
    """The learning rate times a factor; outside the range of the size class, the start value of that class."""
    entry = sizes.size_classes()[plan.size].ranges["learning_rate"]
    if entry.range is None or not entry.allows(plan.learning_rate):
        return f"{sizes.override_line(plan.size, 'learning_rate', entry.start)} (start value of size class {plan.size})"
    return sizes.override_line(plan.size, "learning_rate", plan.learning_rate * factor)


def check_evaluation(record: Any, rows: int) -> Check:
    """Check that the loss on the held-out rows is finite after the last step."""
    loss = record.eval_losses[-1]
    fix = "see the rows of data.validation with `make inspect`"
    return Check("evaluation", math.isfinite(loss), f"loss {loss:.4f} on {rows} held-out rows", fix)


def check_gradient_norm(plan: Plan, record: Any) -> Check:
    """Check gradient norms after the warmup against the bounds of the SFT guide."""
    limits, norms = plan.sections.monitor, record.grad_norms[trial.WARMUP_STEPS :]
    median = statistics.median(norms)
    least, most = limits.grad_norm_below, limits.grad_norm_above
    detail = f"median {median:.3g}, max {max(norms):.3g}; expected {least:g} to {most:g}"
    if least <= median <= most:
        return Check("gradient norm", True, detail)
    fix = (
        f"lower trainer.learning_rate, or remove rows that are not text; if norms of this model are always this large, "
        f"set monitor.grad_norm_above={2 * median:.0f}"
        if median > most
        else "check that weights are trainable and rows supervised (make inspect)"
    )
    return Check("gradient norm", False, detail, fix)


def check_memory(plan: Plan, trainer: Any) -> Check:
    """Check the peak memory of the ranks against their device, and compare what tensors took with the plan's total,
    which excludes memory that the allocator reserves."""
    import torch
    from accelerate.utils import gather

    device = trainer.args.device
    on_gpu = torch.cuda.is_available() and plan.uses_gpu
    host_share = host_memory_bytes() // plan.world_size
    total = torch.cuda.get_device_properties(device).total_memory if on_gpu else host_share
    reserved = torch.cuda.max_memory_reserved() if on_gpu else out_of_memory.peak_host_memory_bytes()
    local = [reserved, torch.cuda.max_memory_allocated() if on_gpu else 0]
    ranks = gather(torch.tensor([local], dtype=torch.float64, device=device)).reshape(-1, 2)
    peak, allocated = (int(number) for number in ranks.max(0).values)
    detail = f"{peak / GIB:.2f} of {total / GIB:.1f} GiB per rank"
    planned = (plan.memory_bytes_per_gpu or {}).get("total")
    if planned and on_gpu:
        detail += f"; {allocated / GIB:.2f} GiB allocated, {allocated / planned:.2f} x the plan's {planned / GIB:.2f}"
    return Check(MEMORY, peak <= _MAX_MEMORY_FRACTION * total, detail)


def find_garbled(text: str) -> str | None:
    """Return why a completion is not text; None if it is.

    Four signs, each far from any language or code: empty; more than a tenth of the characters unprintable or
    undecodable; one word making up more than half of 20 words or more, or one character more than 80% of 40 characters
    or more; in 100 bytes or more, ten times less information than its length (zlib).
    """
    if not text.strip():
        return "empty"
    unprintable = sum(map(_is_unprintable, text))
    if unprintable > 0.1 * len(text):
        return "unprintable characters"
    words = text.split()
    if len(words) >= 20 and Counter(words).most_common(1)[0][1] > 0.5 * len(words):
        return "one word repeated"
    encoded = text.encode()
    commonest = Counter(text).most_common(1)[0][1]
    if len(text) >= 40 and commonest > 0.8 * len(text):
        return "repetition"
    if len(encoded) >= 100 and len(zlib.compress(encoded, 9)) < 0.1 * len(encoded) + 12:
        return "repetition"
    return None


def _is_unprintable(character: str) -> bool:
    """Control, private, unassigned and undecodable characters; line ends and joiners are printable."""
    if character in "\n\r\t":
        return False
    return unicodedata.category(character) in ("Cc", "Cn", "Co", "Cs") or character == "\N{REPLACEMENT CHARACTER}"
