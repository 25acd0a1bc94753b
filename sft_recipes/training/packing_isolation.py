"""Verifies on the loaded model that packing does not leak attention across examples.

Isolation depends on how a model's code uses `position_ids`. Models whose attention ignores them leak one example into
another silently. Data preparation does not pack rows for known layers with a state (data/model_layers.py).
"""

from typing import Any

import torch
from accelerate.utils import send_to_device

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import SetupError

_TOKENS = 8  # per example
# Relative change of the second example's logits when the first example changes: near the noise of the dtype. The same
# computation gives the same numbers, up to the order of summation (experts get batches of other sizes); a convolution
# over the boundary changed them by 4e-4 to 1e-2 in untrained models.
_TOLERANCES = {"fp32": 1e-4, "bf16": 1e-2}


def check(plan: Plan, trainer: Any) -> float:
    """Return the relative change of the second example's logits when the first example changes.

    Collective: call on every rank, since parameters may be sharded.

    Raises:
        SetupError: they change, so packed examples attend to each other.
    """
    vocabulary = trainer.model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    first, other, second = torch.randint(0, vocabulary, (3, _TOKENS), generator=generator)
    fix = "trainer.packing=false" if plan.packing else "model.attention=sdpa"
    try:
        logits, others = _logits(trainer, first, second), _logits(trainer, other, second)
    except ValueError as error:  # of a layer that needs a kernel for sequence boundaries
        reason = str(error).splitlines()[0][:120]
        raise SetupError(f"model.name_or_path: {plan.model} mixes packed examples ({reason}). Set {fix}") from error
    change = float((logits - others).abs().max() / logits.abs().max().clamp(min=1e-6))
    if not change < _TOLERANCES[plan.precision]:
        cause = f"{type(trainer.model).__name__} changes a logit by {change:.1e}"
        raise SetupError(f"model.name_or_path: packing leaks across examples in {plan.model} ({cause}). Set {fix}")
    return change


def _logits(trainer: Any, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the logits of `second` after `first` in one row, [tokens, vocabulary], fp32."""
    tokens = torch.cat([first, second]).tolist()
    row = {"input_ids": tokens, "labels": tokens, "seq_lengths": [len(first), len(second)]}
    inputs = send_to_device(trainer.data_collator([row]), trainer.args.device)
    del inputs["labels"]
    model = trainer.model_wrapped
    training = model.training
    model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
    model.train(training)
    return logits[0, -len(second) :].float()
