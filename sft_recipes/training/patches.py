"""Every change to a library's code or private state, with its reason and the condition for its removal.

`apply` patches the process, `apply_to_trainer` what exists only later; `rank_launcher` applies one.
tests/unit/test_patches.py fails once a library no longer needs its patch. Heavy libraries are imported inside the
functions: the launcher imports this module before torch.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime import timeouts

_LOGITS_CHUNK = 32_768  # TRL's default, in columns


def apply(plan: Plan) -> None:
    """Patch this process for a plan; call after the process group exists and before the trainer is built."""
    if plan.strategy.deepspeed:
        save_deepspeed_checkpoints_without_extra_files()
    if plan.strategy.fsdp and not plan.uses_gpu:
        enable_fsdp2_on_cpu()


def apply_to_trainer(plan: Plan, trainer: Any) -> None:
    """Patch TRL for a trainer's model, the model itself and accelerate's FSDP plugin."""
    score_supervised_positions_only(trainer.model.config.get_text_config().vocab_size)
    disable_cpu_repack(trainer.model)
    if plan.method != "full":
        save_adapters_without_embeddings(trainer.model)
    if plan.strategy.zero_stage == 3:
        gather_output_layer_with_model(trainer.model)
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plan.precision == "bf16":
        reduce_gradients_in_fp32(plugin)


def score_supervised_positions_only(vocabulary_size: int) -> None:
    """Have TRL compute logits at supervised positions only on a CPU too, as it does on CUDA, and allocate a chunk of
    them no wider than the vocabulary.

    Changes: `trl.trainer.utils._use_triton`, used there to choose the positions only (the kernels use their own), and
        `_CHUNKED_LOGPROB_CHUNK_SIZE`.
    Source: trl/trainer/utils.py, `_fused_forward` ("Elsewhere … every position is scored instead");
        trl/kernels/chunked_logprob.py, which allocates [positions, chunk size] for any vocabulary.
    Versions: trl 1.16. Without it scoring takes a quarter of a step of the tiny recipe.
    Remove when: `_fused_forward` scores only valid positions on a CPU, and the kernel limits the chunk.
    """
    import trl.trainer.utils

    trl.trainer.utils._use_triton = lambda _device: True
    trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = min(_LOGITS_CHUNK, vocabulary_size)


def gather_output_layer_with_model(model: Any) -> None:
    """Under ZeRO-3 have DeepSpeed gather the output layer for the forward and the backward pass of the whole model.

    TRL's loss reads its weight without calling the layer. DeepSpeed notices that only if the weight is not available,
    so with prefetching it fails in the first step: "Cannot partition a param in flight" with any model larger than
    DeepSpeed's reuse distance, a billion weights, "size of tensor a (0)" with smaller ones (trl 1.16, trainer/utils.py,
    `maybe_gather_lm_head_ctx`; deepspeed 0.19.8, zero/parameter_offload.py, `ZeROOrderedDict`). The call is
    DeepSpeed's own for such weights (https://deepspeed.readthedocs.io/en/latest/zero3.html). Remove it when
    tests/strategies/test_zero3_large_models.py says that it is not needed.
    """
    import deepspeed

    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    for parameter in model.get_output_embeddings().parameters():
        deepspeed.zero.register_external_parameter(model, parameter)


def enable_fsdp2_on_cpu() -> None:
    """Have accelerate use FSDP2 over gloo; torch's `fully_shard` supports it.

    accelerate reads the FSDP settings only for MULTI_GPU, and silently uses DDP for MULTI_CPU.
    Changes: `accelerate.PartialState._shared_state["distributed_type"]`.
    Source: accelerate/state.py, `AcceleratorState.__init__`.
    Versions: accelerate 1.15.
    Remove when: `AcceleratorState` reads ACCELERATE_USE_FSDP for MULTI_CPU too.
    """
    from accelerate import DistributedType, PartialState

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def reduce_gradients_in_fp32(plugin: Any) -> None:
    """Have FSDP2 compute in bf16 and reduce gradients in fp32.

    Changes: `mixed_precision_policy` of accelerate's FSDP plugin, after accelerate has set it.
    Source: accelerate/utils/dataclasses.py, `FullyShardedDataParallelPlugin.set_mixed_precision`: reduces in bf16 too.
    Versions: accelerate 1.15.
    Remove when: accelerate's configuration files can set the reduce dtype.
    """
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


@contextmanager
def keep_model_config(config: Any) -> Iterator[None]:
    """Undo the trainers' changes to a model's configuration, which is saved with it; name its experts for TRL.

    Changes: `use_cache`, `output_router_logits` and `router_aux_loss_coef` get their values back; `num_experts` becomes
        an alias of `num_local_experts` in the configuration's class.
    Source: transformers/trainer.py and trl/trainer/sft_trainer.py (`__init__`), which also pass the first two to every
        forward pass; trl/trainer/utils.py, `_fused_forward`, reads `num_experts`, which Granite and Phi have not.
    Versions: transformers 5.23, trl 1.16.
    Remove when: a trainer leaves the configuration alone, and Granite's has `num_experts`.
    """
    text = config.get_text_config()
    names = ("use_cache", "output_router_logits", "router_aux_loss_coef")
    kept = [(part, name, getattr(part, name)) for part in (config, text) for name in names if hasattr(part, name)]
    if hasattr(text, "num_local_experts") and not hasattr(text, "num_experts"):
        type(text).attribute_map = {**type(text).attribute_map, "num_experts": "num_local_experts"}
    yield
    for part, name, value in kept:
        setattr(part, name, value)


def disable_cpu_repack(model: Any) -> None:
    """Have bitsandbytes keep the layout of 4-bit weights on a CPU.

    On CPUs with AVX512-BF16, Linear4bit repacks them at the first evaluation, and no gradient passes through them in
    any later step: adapters below the last layers then silently train on the gradient of the residual stream only.
    Changes: `support_avx512bf16_for_cpu` of the model's Linear4bit modules.
    Source: bitsandbytes/nn/modules.py, `Linear4bit.forward`, since
        https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1804
    Versions: bitsandbytes 0.50.
    Remove when: a gradient passes through Linear4bit on such a CPU after an evaluation.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def save_adapters_without_embeddings(model: Any) -> None:
    """Keep the frozen embeddings out of saved adapters, and every save off the network.

    peft looks up the base model's vocabulary on the Hub, at `main`, at each save. It would also save embeddings that a
    new padding token enlarged, which then fit no base model.
    Changes: `save_pretrained` of this model: `save_embedding_layers=False` instead of "auto".
    Source: peft/utils/save_and_load.py, `get_peft_model_state_dict`.
    Versions: peft 0.21.
    Remove when: the Trainer passes `save_embedding_layers`, or peft's "auto" asks no Hub.
    """
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)


def save_deepspeed_checkpoints_without_extra_files() -> None:
    """Have DeepSpeed save no `latest` and no `zero_to_fp32.py`: a failed write there leaves the other ranks waiting.

    The checkpoint has the model's weights already; `latest` is written with the other files.
    Changes: `save_checkpoint` and `_copy_recovery_script` of `DeepSpeedEngine`.
    Source: deepspeed/runtime/engine.py, `save_checkpoint` and `_save_zero_checkpoint`.
    Versions: deepspeed 0.19.
    Remove when: the Trainer passes `save_latest`, and DeepSpeed synchronizes the ranks after a failed write.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine

    DeepSpeedEngine.save_checkpoint = functools.partialmethod(DeepSpeedEngine.save_checkpoint, save_latest=False)
    DeepSpeedEngine._copy_recovery_script = lambda _engine, _path: None


@contextmanager
def collect_errors_of_torch_save(collect: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Have `torch.save` continue after an error that `collect` catches.

    The Trainer, accelerate and DeepSpeed wait for all ranks between the files of a checkpoint, so a rank that raises
    leaves the others waiting.
    Changes: `torch.save`, while a checkpoint is written.
    Source: transformers/trainer.py (`_save_checkpoint`), accelerate/utils/fsdp_utils.py,
        deepspeed/runtime/checkpoint_engine/torch_checkpoint_engine.py.
    Versions: transformers 5.23, accelerate 1.15, deepspeed 0.19.
    Remove when: they synchronize the ranks after a failed write.
    """
    import torch

    original = torch.save

    def save(*arguments: Any, **named: Any) -> None:
        with collect():
            original(*arguments, **named)

    with mock.patch.object(torch, "save", save):
        yield


def shorten_wait_for_other_ranks() -> None:
    """Have torch's agent wait `timeouts.OTHER_RANKS_EXIT` for the other ranks after one has died.

    They wait in a collective for the dead rank.
    Changes: the default `timeout` of `PContext.close` (30 seconds).
    Source: torch/distributed/elastic/multiprocessing/api.py; the agent does not pass the argument.
    Versions: torch 2.13.
    Remove when: torchrun has an option for it.
    """
    from torch.distributed.elastic.multiprocessing.api import PContext

    PContext.close.__defaults__ = (None, timeouts.OTHER_RANKS_EXIT)
