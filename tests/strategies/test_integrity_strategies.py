"""Under each strategy a run resumes bit for bit, and a bit flip on one rank is found. Slow."""

import pytest
from helpers.bit_flip import run_with_a_flip
from helpers.trajectories import data, follow
from helpers.workplace import needs_compiler

__all__ = ["data", "follow"]  # fixtures
pytestmark = needs_compiler

FLIP = """
import os

if os.environ.get("RANK") == "1":
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    flipped = []

    def flip(optimizer, *_):
        moments = [value["exp_avg"] for value in optimizer.state.values() if "exp_avg" in value]
        local = [moment.to_local() if hasattr(moment, "to_local") else moment for moment in moments]
        # Before it loads, torch takes a step with zero gradients (_init_optim_state), whose state is overwritten.
        stepped = [moment for moment in local if moment.any()]
        if stepped and not flipped:
            stepped[-1].view(torch.int32).view(-1)[0] ^= 1 << 3
            flipped.append(True)

    register_optimizer_step_post_hook(flip)
"""


@pytest.mark.parametrize(
    ("engine", "precision"),
    [
        ("zero3_offload", "fp32"),
        ("zero2", "bf16"),
        ("fsdp2", "bf16"),
    ],
)
def test_run_resumes_exactly(shared_workplace, follow, engine, precision):
    """In bf16 with packed rows, as other tests use these runs too. ZeRO-3: test_world_sizes.py; DDP:
    tests/integration/test_watchdog.py; ZeRO-1 has the optimizer of ZeRO-2."""
    run = follow(engine, 2, precision == "bf16", precision)
    done = shared_workplace.sft("verify-resume", run.name)
    assert done.returncode == 0 and "exact: bit for bit equal to the uninterrupted run" in done.stdout, (
        done.stdout + done.stderr
    )


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_verify_resume_names_the_rank_with_a_bit_flip(shared_workplace, follow, tmp_path, engine):
    run = follow(engine, 2)
    (tmp_path / "sitecustomize.py").write_text(FLIP)
    python_path = f"{tmp_path}:{shared_workplace.environment()['PYTHONPATH']}"
    done = shared_workplace.sft("verify-resume", run.name, PYTHONPATH=python_path)
    assert done.returncode == 1, done.stdout + done.stderr
    loaded = next(line for line in done.stdout.splitlines() if "(loaded)" in line)
    assert "not exact: " in done.stdout and "differs" not in loaded
    first = next(line for line in done.stdout.splitlines() if line.startswith("11  "))
    assert "differs (rank 1)" in first, first


def test_replica_check_names_the_rank_with_a_bit_flip_before_a_save(workplace, few_rows):
    line, saved = run_with_a_flip(workplace, few_rows, "trainer.save_steps=2")
    assert "step 4: the weights of rank 1 on " in line and "differ from those of the other 2 ranks" in line
    assert saved == [2]
