"""Judges a trial of the sanity gate: one check a question, each PASS or FAIL with figures and what to do."""

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

_NOTHING_TO_LEARN = 0.05  # nats a token
_SURE = 3.0  # standard errors that the fall of the loss must exceed
_DEVICE_SHARE = 0.95  # of the device's memory: what is left is for what the trial did not meet
MEMORY = "peak memory"  # the parent, which knows the recipe, says what would take less


@dataclass(frozen=True)
class Check:
    """One part of the verdict: `passed` is None where it was left out, which `said` gives the reason of; `way_out` is
    what to do where it failed."""

    name: str
    passed: bool | None
    said: str
    way_out: str = ""


def rows_are_right(sft: Any, ends_of_turn: Sequence[int]) -> Check:
    """What the loss looks at, in batches as the model gets them: labels are the tokens themselves, some are supervised,
    and ends of turn are among them (not in each row: one that was cut has lost its own). All ranks judge alike."""
    import torch

    from sft_recipes.data.tokenize import IGNORED
    from sft_recipes.training.completions import short

    ends = torch.tensor(list(ends_of_turn), device=sft.args.device)
    counts = torch.zeros(4, dtype=torch.int64, device=sft.args.device)
    shown = ""
    for batch in sft.get_train_dataloader():
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
        shown = shown or short(sft.processing_class.decode(ids[0][supervised[0]].tolist()))
    many, of, others, ended = sft.accelerator.reduce(counts, "sum").tolist()
    way_out = "see the rows with `make inspect`; look at the data's roles and at model.chat_template"
    if not many:
        return Check("rows and masks", False, f"all {of:,} labels are masked: nothing would be learned", way_out)
    if others:
        return Check("rows and masks", False, f"{others:,} labels are other tokens than their row's own", way_out)
    if not ended:
        names = ", ".join(sft.processing_class.convert_ids_to_tokens(list(ends_of_turn)))
        said = f"no end of turn ({names}) is supervised: the model would never learn to stop"
        return Check("rows and masks", False, said, way_out)
    return Check("rows and masks", True, f"{many:,} of {of:,} tokens are supervised, {ended:,} ends of turn: {shown}")


def first_loss_is_plausible(plan: Plan, record: Any, vocabulary: int) -> Check:
    """The loss before the first step against chance, ln(vocabulary): what a model that knows nothing has, and what one
    whose tokens or weights are not its own exceeds."""
    first, chance = mean_loss(record.rows[0]), math.log(vocabulary)
    said = f"{first:.3f} before the first step; chance over {vocabulary:,} tokens is {chance:.2f}"
    if not 1e-4 < first < 1.5 * chance:
        way_out = "is model.name_or_path's tokenizer its own, and are its weights whole? is the data already in it?"
        return Check("first loss", False, said, way_out)
    if not knows_more_than_chance(first, vocabulary) and not plan.sections.model.from_scratch:
        said += ", so the weights know no more than chance: are they a trained model's?"
    return Check("first loss", True, said)


def mean_loss(passes: Any) -> float:
    """Over the tokens of all passes on all ranks, [ranks, passes, 2]."""
    return float(passes[..., 0].sum() / passes[..., 1].sum())


def knows_more_than_chance(loss: float, vocabulary: int) -> bool:
    """Whether a loss is a trained model's: random weights have ln(vocabulary), or little less by luck."""
    return loss <= 0.95 * math.log(vocabulary)


def loss_falls(plan: Plan, record: Any) -> Check:
    """On the very rows that were trained on, before and after: each pass is its own measure, so what differs between
    rows is no noise."""
    before, after = (passes[..., 0] / passes[..., 1].clamp(min=1) for passes in (record.rows[0], record.rows[-1]))
    falls = [
        fall
        for fall, tokens in zip(
            (before - after).flatten().tolist(), record.rows[0][..., 1].flatten().tolist(), strict=True
        )
        if tokens
    ]
    mean = statistics.fmean(falls)
    error = statistics.stdev(falls) / math.sqrt(len(falls)) if len(falls) > 1 else 0.0
    said = (
        f"{mean_loss(record.rows[0]):.4f} -> {mean_loss(record.rows[-1]):.4f} on the same rows in "
        f"{len(record.losses)} steps at {plan.learning_rate:.1e}; the fall is {mean:.2g}, its standard error "
        f"{error:.1g}"
    )
    if mean > _SURE * error and mean > 0:
        return Check("loss falls", True, said)
    if mean_loss(record.rows[0]) < _NOTHING_TO_LEARN and mean > -_SURE * error:
        return Check("loss falls", None, f"not judged, the model knows these rows already: {said}")
    rises = mean < -_SURE * error
    way_out = (
        f"it rises: lower the rate, {another_rate(plan, 1 / 3)}"
        if rises
        else f"raise the rate, {another_rate(plan, 2)}"
    )
    return Check("loss falls", False, said, way_out)


def another_rate(plan: Plan, factor: float) -> str:
    """Another learning rate; where this one is outside its row of the table, the one that the row starts from."""
    entry = sizes.table()[plan.size].cells["learning_rate"]
    if entry.range is None or not entry.allows(plan.learning_rate):
        return f"row {plan.size} starts from {sizes.line(plan.size, 'learning_rate', entry.start)}"
    return sizes.line(plan.size, "learning_rate", plan.learning_rate * factor)


def evaluation_is_a_number(record: Any, rows: int) -> Check:
    """Of the held-out rows, behind the last step."""
    loss = record.evaluated[-1]
    way_out = "look at the rows of data.validation with `make inspect`"
    return Check("evaluation", math.isfinite(loss), f"loss {loss:.4f} over {rows} held-out rows", way_out)


def gradients_are_in_range(plan: Plan, record: Any) -> Check:
    """Behind the warm-up, against the documents' bounds."""
    limits, norms = plan.sections.monitor, record.norms[trial.WARMUP_STEPS :]
    middle = statistics.median(norms)
    least, most = limits.grad_norm_below, limits.grad_norm_above
    said = f"{middle:.3g} (median), {max(norms):.3g} at most; wanted {least:g} to {most:g}"
    if least <= middle <= most:
        return Check("gradient norm", True, said)
    way_out = (
        f"lower trainer.learning_rate, or look for rows that are no text; where this model's norms are larger by "
        f"nature, monitor.grad_norm_above={2 * middle:.0f}"
        if middle > most
        else "see that weights are trained and rows supervised (make inspect)"
    )
    return Check("gradient norm", False, said, way_out)


def memory_is_enough(plan: Plan, sft: Any) -> Check:
    """The most that a rank held, against its device; and what its tensors took, against the plan's total, which has no
    allocator's reserve in it."""
    import torch
    from accelerate.utils import gather

    on_gpu = torch.cuda.is_available() and plan.uses_gpu
    here = host_memory_bytes() // plan.world_size
    device = torch.cuda.get_device_properties(sft.args.device).total_memory if on_gpu else here
    reserved = torch.cuda.max_memory_reserved() if on_gpu else out_of_memory.peak_of_the_host()
    mine = [reserved, torch.cuda.max_memory_allocated() if on_gpu else 0]
    ranks = gather(torch.tensor([mine], dtype=torch.float64, device=sft.args.device)).reshape(-1, 2)
    peak, allocated = (int(number) for number in ranks.max(0).values)
    said = f"{peak / GIB:.2f} GiB at the peak of {device / GIB:.1f} per rank"
    planned = (plan.memory_bytes_per_gpu or {}).get("total")
    if planned and on_gpu:
        said += f"; {allocated / GIB:.2f} GiB allocated, {allocated / planned:.2f} times the plan's {planned / GIB:.2f}"
    return Check(MEMORY, peak <= _DEVICE_SHARE * device, said)


def garbled(text: str) -> str | None:
    """What is wrong with an answer as text; None where nothing is.

    Three signs, each far from what any language or code has: nothing at all; more than a tenth of the characters
    unprintable or undecodable; in a text of 20 words or more, one word making up more than half of them; in one of 100
    characters or more, ten times less information than its length (zlib).
    """
    if not text.strip():
        return "nothing is said"
    odd = sum(map(_is_no_text, text))
    if odd > 0.1 * len(text):
        return "characters that are no text"
    words = text.split()
    if len(words) >= 20 and Counter(words).most_common(1)[0][1] > 0.5 * len(words):
        return "one word again and again"
    encoded = text.encode()
    commonest = Counter(text).most_common(1)[0][1]
    if len(text) >= 40 and commonest > 0.8 * len(text):
        return "the same again and again"
    if len(encoded) >= 100 and len(zlib.compress(encoded, 9)) < 0.1 * len(encoded) + 12:
        return "the same again and again"
    return None


def _is_no_text(character: str) -> bool:
    """Control characters, private and unassigned ones, and what could not be decoded; not line ends and joiners."""
    if character in "\n\r\t":
        return False
    return unicodedata.category(character) in ("Cc", "Cn", "Co", "Cs") or character == "\N{REPLACEMENT CHARACTER}"
