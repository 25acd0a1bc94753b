"""A run on three ranks in which one bit of one weight flips in the memory of rank 1."""

import json

from sft_recipes.runtime.run_dir import RunDir

FLIP = """
import os

if os.environ.get("RANK") == "1":
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    steps = 0

    def flip(optimizer, *_):
        global steps
        steps += 1
        if steps == 3:
            optimizer.param_groups[0]["params"][0].data.view(torch.int32).view(-1)[7] ^= 1 << 3

    register_optimizer_step_post_hook(flip)
"""


def run_with_a_flip(workplace, rows, *overrides):
    """A real run; after step 3 one bit of one weight flips in the memory of rank 1."""
    (workplace.path / "sitecustomize.py").write_text(FLIP)
    python_path = f"{workplace.path}:{workplace.environment()['PYTHONPATH']}"
    done = workplace.sft(
        "train", "tiny", "--gpus", "0", "--processes", "3", "batch.effective_batch_size=6",
        "batch.max_per_device_batch_size=2", "trainer.max_steps=8", "trainer.eval_steps=8", "trainer.logging_steps=8",
        "generation.show=0", "generation.score=0", "trainer.max_length=64", f"data.train={rows}", *overrides,
        PYTHONPATH=python_path,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    (run,) = [path.parent for path in workplace.runs.glob("*/manifest.json")]
    found = json.loads((run / "manifest.json").read_text())
    assert (found["state"], found["exit_code"]) == ("failed", 1)
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert found["error"] in line
    return line, RunDir(run).numbered("checkpoint")
