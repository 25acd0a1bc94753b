"""Liger's Triton kernels under Triton's interpreter, on the CPU: prints as JSON what verification finds of them, what it
finds of wrong kernels, and the bytes that layers keep for the backward pass.

TRITON_INTERPRET=1 python tests/helpers/liger_interpreter.py
"""

import contextlib
import json
import logging
import sys

import numpy
import torch
import triton.language as tl
from transformers import AutoConfig, AutoModelForCausalLM
from triton.runtime import interpreter

logging.getLogger("liger_kernel").setLevel(logging.ERROR)
import liger_kernel.ops.rms_norm  # noqa: E402
import liger_kernel.ops.swiglu  # noqa: E402

from sft_recipes.config.architecture import DENSE_KEYS, DENSE_KINDS, linear_layers  # noqa: E402
from sft_recipes.training import fused_kernels  # noqa: E402

SHAPE = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = 16
to_tensor, convert = interpreter._implicit_cvt, interpreter._convert_float
compute = interpreter.InterpreterBuilder.binary_op


def convert_argument(argument):
    """Make a float argument a tensor, as Triton does on a GPU (triton 3.7.1's interpreter leaves it a float)."""
    if isinstance(argument, float):
        return tl.core.tensor(interpreter.TensorHandle(numpy.array([argument], numpy.float32), tl.float32), tl.float32)
    return to_tensor(argument)


def binary_operation(builder, left, right, operation):
    """Compute bf16 operands in fp32, as hardware does; the interpreter operates on their bits as integers."""
    if left.dtype.scalar != tl.bfloat16:
        return compute(builder, left, right, operation)
    wide = (builder.cast_impl(operand, tl.float32) for operand in (left, right))
    return builder.cast_impl(compute(builder, *wide, operation), tl.bfloat16)


def convert_float(values, source, target, rounding):
    """Round fp32 to the nearest bf16, as hardware does; the interpreter truncates."""
    if (source, target) != (tl.float32, tl.bfloat16):
        return convert(values, source, target, rounding)
    bits = numpy.ascontiguousarray(values).view(numpy.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(numpy.uint16)


def model_of(kind, layers=2):
    """Return class and configuration of a small model of this type."""
    heads = {"num_key_value_heads": 4} if kind == "olmo2" else {}
    sizes = {**SHAPE, **heads, "head_dim": 32, "vocab_size": 64, "num_hidden_layers": layers, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **sizes, bos_token_id=1, eos_token_id=2)
    return type(AutoModelForCausalLM.from_config(config)), config


def kept_bytes(kind, dtype, autocast):
    """Bytes per token that a layer keeps for its backward pass, the difference between three layers and one."""
    kept = []
    for layers in (1, 3):
        _, config = model_of(kind, layers)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        module = vars(sys.modules[type(model).__module__])
        before = dict(module)
        fused_kernels._replace_layers(model)
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        storages = {}

        def pack(tensor, storages=storages, weights=weights):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = (storage.nbytes(), tensor.detach())

        context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), context:
            model.base_model(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), use_cache=False)
        module.update(before)  # the next model is built of transformers' classes, as in a run
        kept.append(sum(size for size, _ in storages.values()))
    return (kept[1] - kept[0]) / 2 / TOKENS


def describe_kept(kind, dtype, autocast):
    """Return the kept bytes with what they are compared with: dimensions, linear layers, tokens."""
    architecture = {name: model_of(kind)[1].to_dict()[name] for name in (*DENSE_KEYS, *SHAPE, "model_type", "head_dim")}
    return kept_bytes(kind, dtype, autocast), architecture, linear_layers(architecture), TOKENS


def main() -> None:
    """Verify every type that the memory forecast knows, right kernels and wrong ones, and count what layers keep."""
    interpreter._implicit_cvt = convert_argument
    interpreter.InterpreterBuilder.binary_op = binary_operation
    interpreter._convert_float = convert_float
    liger_kernel.ops.rms_norm.rsqrt = lambda value: tl.rsqrt(value)  # libdevice's has no interpretation
    fused_kernels._LENGTHS = (18, 1, 13)
    launches = []
    for kernel in (liger_kernel.ops.rms_norm._rms_norm_forward_kernel, liger_kernel.ops.swiglu._swiglu_backward_kernel):
        kernel.add_pre_run_hook(lambda *_, name=kernel.__name__, **__: launches.append(name))
    problems = {
        f"{kind}, {dtype}": fused_kernels.find_problem(*model_of(kind), "cpu", getattr(torch, dtype))
        for kind in DENSE_KINDS
        for dtype in ("bfloat16", "float32")
    }
    right = liger_kernel.ops.rms_norm.rsqrt
    liger_kernel.ops.rms_norm.rsqrt = lambda value: tl.rsqrt(value) * 1.05
    wrong = fused_kernels.find_problem(*model_of("llama"), "cpu", torch.bfloat16)
    liger_kernel.ops.rms_norm.rsqrt = right
    restored = sys.modules[model_of("llama")[0].__module__].apply_rotary_pos_emb.__module__
    kept = {
        f"{kind}, {case}": describe_kept(kind, *arguments)
        for kind in DENSE_KINDS
        for case, arguments in {"zero2": (torch.bfloat16, False), "ddp": (torch.float32, True)}.items()
    }
    result = {"problems": problems, "wrong": wrong, "restored": restored, "kept": kept}
    print(json.dumps({**result, "launches": sorted(set(launches))}))


if __name__ == "__main__":
    main()
