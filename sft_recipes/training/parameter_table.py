"""Counts a model's parameters by kind of module, trained and frozen, and finds fused experts."""

import re
from typing import Any

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import SetupError

# The first pattern that a parameter's name matches decides its kind; names as in transformers 5.
_KINDS = (
    ("norms", r"(norm|ln_)\w*\.(weight|bias)$"),
    ("embeddings", r"embed|\bw[tp]e\b|lm_head"),
    ("router", r"\.(router|gate|gating|shared_expert_gate)\."),
    ("mlp", r"shared_(expert|mlp)"),  # every token passes them
    ("experts", r"expert"),
    ("recurrent", r"mamba|conv|linear_attn|ssm|recurrent|A_log|dt_bias"),
    ("attention", r"attn|attention"),
    ("mlp", r"mlp|feed_forward|ffn"),
)

Table = dict[str, dict[str, int]]


def count(model: Any) -> Table:
    """Return the numbers of `trained` and `frozen` parameters by kind; tied weights count once, sharded ones whole."""
    table: Table = {}
    for name, parameter in model.named_parameters():
        numbers = table.setdefault(_kind(name, parameter), {"trained": 0, "frozen": 0})
        numbers["trained" if parameter.requires_grad else "frozen"] += _size(parameter)
    return table


def lines(plan: Plan, table: Table) -> list[str]:
    """Return the table as lines of the log, and one about experts that adapters leave frozen."""
    described, experts = [], table.get("experts")
    for state in ("trained", "frozen"):
        kinds = sorted(((numbers[state], kind) for kind, numbers in table.items() if numbers[state]), reverse=True)
        if kinds:
            by_size = ", ".join(f"{kind} {number:,}" for number, kind in kinds)
            described.append(f"{state} parameters: {sum(number for number, _ in kinds):,} ({by_size})")
    if plan.method != "full" and experts and not experts["trained"]:
        share = experts["frozen"] / sum(numbers["frozen"] for numbers in table.values())
        frozen = f"{experts['frozen']:,} parameters, {share:.0%} of the model"
        described.append(f"experts stay frozen: {frozen}. Set lora.experts=true to adapt them")
    return described


def fused_experts(model: Any) -> list[str]:
    """Return the parameters that hold the weights of all experts of a layer, by `module.name`.

    They are no linear layers: neither peft's `all-linear` nor bitsandbytes sees them.
    """
    parameters = model.named_parameters()
    fused = (name for name, value in parameters if len(_shape(value)) == 3 and _kind(name, value) == "experts")
    return sorted({".".join(name.split(".")[-2:]) for name in fused})


def check_optimizer(model: Any, optimizer: Any) -> None:
    """Check that the optimizer, before it is sharded, has every trained parameter.

    Raises:
        SetupError: it lacks some.
    """
    received = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    missing = [name for name, parameter in trained if id(parameter) not in received]
    if missing:
        lacking = f"the optimizer lacks trained parameters: {len(missing)} of {len(trained)} (first: {missing[0]})"
        raise SetupError(f"trainer.optim: {lacking}. Set trainer.optim=adamw_torch_fused")


def _kind(name: str, parameter: Any) -> str:
    shape = _shape(parameter)
    if len(shape) == 3 and shape[1] > 1:  # a depthwise convolution has one channel
        return "experts"
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name)), "other")


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _size(parameter: Any) -> int:
    """Return the number of elements, also of a weight that ZeRO-3 shards or bitsandbytes packs."""
    size = int(getattr(parameter, "ds_numel", parameter.numel()))
    return size * 2 * parameter.element_size() if type(parameter).__name__ == "Params4bit" else size
