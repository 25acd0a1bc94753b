"""Sees on the real model, engine and attention that packed examples do not see each other.

Isolation rests on what a model's code makes of `position_ids`. Models that mix tokens in other ways than attention (a
convolution, a recurrent state), or whose attention does not read them, let one example see another, and say nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import send_to_device

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import SetupError

_TOKENS = 8  # of each of two examples
# Logits of the second example when the first is another: the same computation on the same shapes, so the same numbers
# but for a kernel that sums in another order. A leak moves them by about their own size.
_TOLERANCE = 1e-2


def check(plan: Plan, trainer: Any) -> float:
    """How much the second example's logits move when the first example changes, as a share of their size.

    All ranks take part: sharded weights are gathered from each.

    Raises:
        SetupError: they move, so packed examples see each other.
    """
    vocabulary = trainer.model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    first, other, second = torch.randint(0, vocabulary, (3, _TOKENS), generator=generator)
    logits = _logits(trainer, first, second)
    moved = (logits - _logits(trainer, other, second)).abs().max()
    share = float(moved / logits.abs().max().clamp(min=1e-6))
    if not share < _TOLERANCE:
        raise SetupError(
            f"model.name_or_path: packed examples see each other in {plan.model} ({type(trainer.model).__name__} does "
            f"not keep them apart by position_ids: logits move by {share:.0%}); say trainer.packing=false"
        )
    return share


def _logits(trainer: Any, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Logits of `second` behind `first` in one row, [tokens, vocabulary], fp32."""
    collated = trainer.data_collator(
        [
            {
                "input_ids": torch.cat([first, second]).tolist(),
                "labels": torch.cat([first, second]).tolist(),
                "seq_lengths": [len(first), len(second)],
            }
        ]
    )
    device = trainer.args.device
    inputs = send_to_device({name: value for name, value in collated.items() if name != "labels"}, device)
    model = trainer.model_wrapped
    training = model.training
    model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        logits = model(**inputs, use_cache=False).logits
    model.train(training)
    found: torch.Tensor = logits[0, -len(second) :].float()
    return found
