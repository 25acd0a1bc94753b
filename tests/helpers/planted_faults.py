"""Faults planted in a simulated run, each with the rule that must find it."""

from __future__ import annotations

import math

from helpers.simulated_runs import GIB

from sft_recipes.planner.lr_schedule import Schedule


def nan_loss(run):
    """The loss is NaN at a step, and the run stops there."""
    run.state, run.until = "diverged", 0.401
    run.manifest["diverged"] = {
        "step": 400,
        "reason": "NaN/Inf loss",
        "loss": "NaN",
        "grad_norm": 3.1,
        "rows": ["my.jsonl:17", "my.jsonl:18"],
    }
    return run.change("loss", lambda loss, share: math.nan if share >= 0.4 else loss)


def infinite_gradient(run):
    return run.change("grad_norm", lambda norm, share: math.inf if share >= 0.9 else norm)


def rising_permanently(run):
    """Learning rate too high: the training and validation loss fall, then rise and stay there."""
    for key in ("loss", "eval_loss"):
        run.change(key, lambda loss, share: loss + 2.5 * min(1, max(0, share - 0.3) * 10))
    return run.change("grad_norm", lambda norm, share: norm * (20 if share > 0.3 else 1))


def above_first_loss(run):
    return run.change("loss", lambda loss, share: loss * (5 if share > 1 / run.steps else 1))


def too_low_learning_rate(run):
    run.begin, run.end, run.noise = 2.5, 2.49, min(run.noise, 0.05)
    return run


def learning_rate_out_of_range(run):
    """No curve shows it."""
    run.overrides = (*run.overrides, "trainer.learning_rate=0.2", "allow_out_of_range=[learning_rate]")
    return run


def stuck_after_warmup(run):
    """From scratch: token frequencies are learned during warm-up, nothing after it."""
    run.loss = lambda share: 7.2 - 1.2 * min(1, share * 12)
    return run


def memorizing(run):
    """Tiny data, many epochs: training loss falls to zero, validation loss turns and rises."""
    run.change("loss", lambda loss, share: loss * (1 - 0.75 * max(0, share - 0.3)))
    return run.change("eval_loss", lambda loss, share: loss * (1 + 0.6 * max(0, share - 0.4)))


def spiking(run):
    high, half = [0.25, 0.4, 0.55, 0.7, 0.85], 0.5 / run.lines
    return run.change("loss", lambda loss, share: loss * (3 if any(abs(share - at) < half for at in high) else 1))


def recorded_spikes(run):
    """Log lines are means of many steps and hide spikes; live alerts cover each step."""
    run.warnings = [{"step": step, "rule": "loss_spike", "evidence": "x"} for step in (210, 211, 480, 770)]
    return run


def loss_hump(run):
    return run.change("loss", lambda loss, share: loss * (1 + 1.2 * max(0, 1 - abs(share - 0.4) / 0.12)))


def exploding_gradients(run):
    return run.change("grad_norm", lambda norm, share: 12 + 40 * (share - 0.6) if share > 0.6 else norm)


def vanishing_gradients(run):
    run.begin = run.end = 1.4
    return run.change("grad_norm", lambda *_: 2e-8)


def forgetting(run):
    run.retain = True
    return run.change("eval_retention_loss", lambda loss, share: loss * (1 + 0.3 * share))


def gpu_memory_leak(run):
    run.gpu = True
    return run.change("memory_allocated_bytes", lambda held, share: held + int(12 * GIB * share))


def host_memory_leak(run):
    run.gpu = False
    return run.change("host_memory_bytes", lambda held, share: int(held * (1 + 0.4 * share)))


def slow_data_loader(run):
    return run.change("data_wait_fraction", lambda *_: 0.35)


def throughput_drop(run):
    return run.change("tokens_per_second", lambda speed, share: speed * (0.4 if share > 0.7 else 1))


def schedule(peak=1.0, warmup=1.0, total=1.0):
    """Log another schedule than the plan's."""

    def plant(run):
        plan = run.plan()
        warmup_steps, steps = round(plan.warmup_steps * warmup), round(run.steps * total)

        def scheduled(_, share):
            step = round(share * run.steps) - 1
            return Schedule(plan.lr_scheduler_type, plan.learning_rate * peak, warmup_steps, steps).learning_rate(step)

        return run.change("learning_rate", scheduled)

    return plant


def out_of_memory(run):
    run.state, run.until = "failed", 0.6
    run.manifest = {"error": "rank 0 ran out of memory: 70.0 GiB allocated", "takes_less": ["parallelism=zero3"]}
    return run


FAULTS = {
    "out of memory": (out_of_memory, "failure"),
    "NaN loss": (nan_loss, "divergence"),
    "infinite gradient": (infinite_gradient, "divergence"),
    "loss rises permanently": (rising_permanently, "divergence"),
    "loss above its first value": (above_first_loss, "divergence"),
    "learning rate too low": (too_low_learning_rate, "plateau"),
    "learning rate out of range": (learning_rate_out_of_range, "learning_rate"),
    "stuck after warm-up": (stuck_after_warmup, "plateau"),
    "tiny data for many epochs": (memorizing, "overfitting"),
    "spikes in log lines": (spiking, "loss_spike"),
    "spikes recorded live": (recorded_spikes, "loss_spike"),
    "hump": (loss_hump, "instability"),
    "exploding gradients": (exploding_gradients, "exploding_gradients"),
    "vanishing gradients": (vanishing_gradients, "vanishing_gradients"),
    "forgetting": (forgetting, "forgetting"),
    "GPU memory leak": (gpu_memory_leak, "memory_growth"),
    "host memory leak": (host_memory_leak, "memory_growth"),
    "slow data loader": (slow_data_loader, "input_bound"),
    "throughput drop": (throughput_drop, "throughput_drop"),
    "peak three times too high": (schedule(peak=3), "schedule"),
    "no warm-up": (schedule(warmup=0), "schedule"),
    "schedule over twice the steps": (schedule(total=2), "schedule"),
}


def unchanged(run):
    return run


def from_scratch(run):
    run.begin, run.end, run.gap = 7.2, 0.01, 0.005
    return run.change("mean_token_accuracy", lambda _, share: min(0.99, 1.4 * share))
