"""TRL's Triton kernels under Triton's interpreter, compared with float64; prints each case's largest errors as JSON.

TRITON_INTERPRET=1 python tests/helpers/triton_interpreter.py
"""

import json

import torch
import trl.trainer.utils  # noqa: F401  chunked_logprob imports from it, and it from chunked_logprob
from trl.kernels import chunked_logprob

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
WIDTH, VOCABULARY, TOKENS, CHUNK = 64, 3000, 37, 1024  # no size is a multiple of the kernels' block of 1,024


def by_definition(hidden, weight, targets, temperature, softcap):
    """Log-probability, entropy, log of the sum of squared probabilities, mean logit and whether the target is largest."""
    logits = hidden @ weight.t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    logs = torch.log_softmax(logits, -1)
    return (
        logs.gather(1, targets[:, None])[:, 0], -(logs.exp() * logs).sum(-1), torch.logsumexp(2 * logs, -1),
        logits.mean(-1), logits.argmax(-1) == targets,
    )  # fmt: skip


def compare(dtype: torch.dtype, both_gradients: bool, softcap: float | None) -> dict[str, float]:
    """Return the largest error of each output, and of each gradient relative to its largest element."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(TOKENS, WIDTH).to(dtype), (torch.randn(VOCABULARY, WIDTH) * 0.2).to(dtype)
    targets = torch.randint(0, VOCABULARY, (TOKENS,))
    targets[:5] = (hidden[:5].double() @ weight.double().t()).argmax(-1)  # is_top1 is true somewhere
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    outputs = chunked_logprob.ChunkedLogProbFunction.apply(*leaves, None, targets, 0.7, CHUNK, softcap, 1.0, OUTPUTS)
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    expected = by_definition(*exact, targets, 0.7, softcap)
    upstream = torch.randn(2, TOKENS)
    kept = 2 if both_gradients else 1
    torch.autograd.backward(outputs[:kept], tuple(upstream[:kept]))
    torch.autograd.backward(expected[:kept], tuple(upstream[:kept].double()))
    pairs = zip(OUTPUTS, outputs, expected, strict=True)
    errors = {name: float((a.detach().double() - b.detach().double()).abs().max()) for name, a, b in pairs}
    for name, leaf, reference in zip(("gradient of hidden", "gradient of weight"), leaves, exact, strict=True):
        errors[name] = float((leaf.grad.double() - reference.grad).abs().max() / reference.grad.abs().max())
    return errors


def main() -> None:
    """Compare every case, and count the kernels' launches: without Triton, TRL computes with torch's own operations."""
    launches: list[str] = []
    for name in ("_forward_kernel", "_backward_kernel"):
        getattr(chunked_logprob, name).add_pre_run_hook(lambda *_, name=name, **__: launches.append(name))
    chunked_logprob._use_triton = lambda device: True
    results = {}
    for dtype, softcap in (("float32", None), ("float32", 30.0), ("bfloat16", None)):
        for both_gradients in (False, True):
            launches.clear()
            errors = compare(getattr(torch, dtype), both_gradients, softcap)
            counts = {name: launches.count(name) for name in launches}
            results[f"{dtype}, softcap {softcap}, {1 + both_gradients} gradients"] = {
                "launches": counts,
                "errors": errors,
            }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
