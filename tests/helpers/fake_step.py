"""Tracks the memory of one optimizer step of a plan with real shapes, without a GPU and without that memory.

The model is transformers' own, with the plan's adapters or FSDP2 units and TRL's scoring. Its tensors are fake: they
have shapes, dtypes and storages of the right size, and no data (torch._subclasses.fake_tensor). torch's MemTracker sums
the storages, rounded up to 512 bytes as CUDA's caching allocator does. Context, NCCL and fragmentation are excluded.

Fake tensors are on the device "cpu", since "cuda" needs a CUDA build. `simulate_cuda` and `_InPlace` compensate for
differences in allocation between CPU and GPU; each names its source.
"""

import functools
import types
from pathlib import Path

import peft
import torch
import transformers
import trl.trainer.utils
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils
from transformers.integrations import moe
from trl.kernels import chunked_logprob

from sft_recipes.training import attention, lora


class _TritonKernel:
    """TRL's Triton kernels read and write in place, and allocate nothing (trl/kernels/chunked_logprob.py)."""

    def __getitem__(self, _grid):
        return lambda *_, **__: None


class _Scoring:
    """Scores the supervised positions (all of them), selected from the hidden states as on a GPU.

    A GPU computes `hidden_states[mask]` (trl/trainer/utils.py, `_fused_forward`), whose size depends on data, which fake
    tensors do not have. Selecting by index copies as much, forward and backward.
    """

    @staticmethod
    def apply(hidden, *rest):
        picked = hidden.index_select(0, torch.arange(hidden.shape[0]))
        return chunked_logprob.ChunkedLogProbFunction.apply(picked, *rest)


class _Tracker(MemTracker):
    """MemTracker without the hooks that identify gradients, which fail on frozen weights, and without the peaks of modules:
    it would visit all modules at every operator."""

    def _track_module_params_and_buffers(self, module, install_grad_hooks=True):
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)

    def _update_peak_stats(self, peak_state):
        modules, self.memory_tracking = self.memory_tracking, {}
        super()._update_peak_stats(peak_state)
        self.memory_tracking = modules


class _InPlace(TorchDispatchMode):
    """Adds the two gradients of tied embeddings in place, as autograd does with plain tensors.

    For tensor subclasses, fake ones too, it allocates the sum (torch/csrc/autograd/input_buffer.cpp,
    `can_accumulate_inplace`).
    """

    def __init__(self, shape):
        super().__init__()
        self._shape = shape

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        if func is torch.ops.aten.add.Tensor and args[0].shape == self._shape and not torch.is_grad_enabled():
            return args[0].add_(args[1])
        return func(*args, **(kwargs or {}))


def simulate_cuda(monkeypatch):
    """Have TRL and the attention take their GPU code paths."""
    monkeypatch.setattr(chunked_logprob, "_use_triton", lambda _device: True)
    monkeypatch.setattr(chunked_logprob, "_forward_kernel", _TritonKernel())
    monkeypatch.setattr(chunked_logprob, "_backward_kernel", _TritonKernel())
    monkeypatch.setattr(chunked_logprob, "triton", types.SimpleNamespace(cdiv=lambda a, b: -(-a // b)), raising=False)
    # A GPU multiplies 16 bits into an fp32 sum in place: torch.addmm(…, out_dtype=torch.float32, out=…).
    monkeypatch.setattr(chunked_logprob, "_addmm_fp32", lambda *_: None)
    monkeypatch.setattr(trl.trainer.utils, "_use_triton", lambda _device: False)  # see _Scoring
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", _Scoring)
    # torch's kernel for rows of several examples registers what it allocates (torch/nn/attention/varlen.py).
    monkeypatch.setattr(attention, "varlen", _varlen)
    # Masked attention gets a mask, as rows with padding or several examples do.
    mask = functools.partial(_full_mask, dtype=torch.bool)
    monkeypatch.setitem(transformers.AttentionMaskInterface._global_mapping, "sdpa", mask)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda _positions: None)  # it reads data
    # torch's shape function of grouped products takes 16 bits only; transformers registers one for other dtypes.
    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda _tokens, weight, _offsets: weight.dtype == torch.bfloat16)


def _varlen(queries, keys, values, boundaries, longest, scale=None):
    grouped = queries.shape[1] != keys.shape[1]
    return varlen_attn(
        queries, keys, values, boundaries, boundaries, longest, longest,
        scale=scale, window_size=(-1, 0), enable_gqa=grouped,
    )  # fmt: skip


def _full_mask(batch_size, q_length, kv_length, dtype, **_):
    return torch.ones(batch_size, 1, q_length, kv_length, dtype=dtype)


def peak_bytes(plan, architecture, implementation="varlen"):
    """Return the peak allocation of one rank in an optimizer step; call `simulate_cuda` before.

    Under FSDP2 until the end of the last backward pass: in the optimizer's step, which allocates nothing on a GPU,
    DTensor's sharding propagation would count tensors of global shapes.
    """
    mesh = _mesh(plan.world_size) if plan.parallelism == "fsdp2" else None
    tokens = plan.per_device_train_batch_size * plan.max_length
    model = _without_storage(plan, architecture)
    output_layer = (architecture["vocab_size"], architecture["hidden_size"])
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = _prepared(model, plan, mesh, implementation)
            trained = [weight for weight in model.parameters() if weight.requires_grad]
            optimizer = torch.optim.AdamW(trained, fused=True)
            for weight in trained:  # Adam's moments exist from the second step on
                weight.grad = torch.zeros_like(weight)
            optimizer.step()
            optimizer.zero_grad()
            ids = torch.zeros(1, tokens, dtype=torch.long)
            boundaries = torch.zeros(plan.per_device_train_batch_size + 1, dtype=torch.int32)
            batch = {"input_ids": ids, "labels": ids, "position_ids": ids, "cu_seq_lens_q": boundaries}
            batch |= {"cu_seq_lens_k": boundaries, "max_length_q": plan.max_length, "max_length_k": plan.max_length}
            if implementation != "varlen":
                batch = dict.fromkeys(("input_ids", "labels"), ids.reshape(-1, plan.max_length))
            tracker = _Tracker()
            tracker.track_external(model, optimizer)
            with tracker, _InPlace(output_layer):
                for _ in range(min(plan.gradient_accumulation_steps, 2)):
                    tracker.reset_mod_stats()
                    with torch.autocast("cpu", torch.bfloat16):
                        loss = model(**batch, fused_lm_head=True).loss
                    loss.backward()
                if mesh is None:
                    torch.nn.utils.clip_grad_norm_(trained, 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
            return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    finally:
        if mesh is not None:
            torch.distributed.destroy_process_group()


def _without_storage(plan, architecture):
    """Return the model with the plan's adapters, on the device "meta"."""
    frozen = plan.method != "full"
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(**architecture)
        dtype = torch.bfloat16 if frozen else torch.float32
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        if frozen:
            model = peft.get_peft_model(model, lora.make_lora_config(plan, Path("model"), model))
    return model


def _prepared(model, plan, mesh, implementation):
    """Return the model with storage of fake tensors, as the trainer prepares it."""
    body = model.get_base_model() if plan.method != "full" else model
    model.to_empty(device="cpu")
    body.tie_weights()
    lora.cast_trainable_to_fp32(model, plan)
    body.config._attn_implementation = implementation
    model.train()
    if interval := plan.sections.trainer["gradient_checkpointing"]:
        model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=int(interval))
    elif plan.method != "full":
        model.enable_input_require_grads()
    trl.trainer.utils.add_fused_lm_head(body, outputs=("log_probs", "entropy", "is_top1"))
    return model if mesh is None else _sharded(model, mesh)


def _mesh(ranks):
    """Return a mesh of ranks of which only this one exists; collectives do nothing."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    return init_device_mesh("cpu", (ranks,), mesh_dim_names=("ranks",))


def _sharded(model, mesh):
    """Return the model in accelerate's FSDP2 units, by accelerate_configs/fsdp2.yaml and training/patches.py."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
        mixed_precision_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    )
    accelerator = types.SimpleNamespace(
        state=types.SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=mesh,
        parallelism_config=types.SimpleNamespace(fsdp_dim_names=["ranks"]),
        mixed_precision="bf16",
        is_main_process=False,
        device=torch.device("cpu"),
    )
    return fsdp2_prepare_model(accelerator, model)
