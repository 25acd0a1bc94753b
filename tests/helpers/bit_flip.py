"""A run in which one bit of one weight flips in the memory of rank 1."""

import json

from sft_recipes.runtime.run_dir import RunDir

FLIP = """
import os

if os.environ.get("RANK") == "1":
    import torch
    from torch.nn.modules.module import register_module_forward_pre_hook
    from torch.optim.optimizer import register_optimizer_step_post_hook

    steps = 0

    def count(optimizer, *_):
        global steps, weight
        steps, weight = steps + 1, optimizer.param_groups[0]["params"][0]
        if steps == {after_step}:
            flip()

    def flip():
        weight.data.view(torch.int32).view(-1)[7] ^= 1 << 3

    def before_a_forward_pass(*_):
        global steps
        if steps == {before_step} - 1:
            steps += 100
            flip()

    register_optimizer_step_post_hook(count)
    register_module_forward_pre_hook(before_a_forward_pass)
"""


def run_with_a_flip(workplace, rows, processes, *overrides, after_step=-1, before_step=-1):
    """A real run; one bit of one weight flips in the memory of rank 1."""
    (workplace.path / "sitecustomize.py").write_text(FLIP.format(after_step=after_step, before_step=before_step))
    python_path = f"{workplace.path}:{workplace.environment()['PYTHONPATH']}"
    done = workplace.sft(
        "train", "tiny", "--gpus", "0", "--processes", str(processes), "batch.effective_batch_size=6",
        "batch.max_per_device_batch_size=2", "trainer.max_steps=8", "trainer.eval_steps=8", "trainer.logging_steps=8",
        "generation.show=0", "generation.exact_match=0", "trainer.max_length=64", f"data.train={rows}", *overrides,
        PYTHONPATH=python_path,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    (run,) = [path.parent for path in workplace.runs.glob("*/manifest.json")]
    found = json.loads((run / "manifest.json").read_text())
    assert (found["state"], found["exit_code"]) == ("failed", 1)
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert found["error"] in line and "model.embed_tokens.weight" in line
    return line, RunDir(run).numbered("checkpoint")
