"""Pickle bombs in the files that DeepSpeed and FSDP2 save; tests/integration/test_security.py has one process."""

import json
import shutil
import subprocess
import sys

import pytest
from helpers.checkpoints import find_checkpoint
from helpers.pickle_bomb import plant
from helpers.processes import ObservedCommand
from helpers.trajectories import arguments, data, follow
from helpers.workplace import REPOSITORY, manifest, needs_compiler

from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.training.checkpoint import checkpoint_format

__all__ = ["data", "follow"]  # fixtures

# Files that are loaded with pickle (DeepSpeed's TorchCheckpointEngine), under FSDP2 with torch's weights_only.
FILES = {
    "zero2": [
        "global_step20/zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "global_step20/mp_rank_00_model_states.pt",
        "rng_state_1.pth",
    ],
    "zero3": [
        "global_step20/zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "global_step20/zero_pp_rank_0_mp_rank_00_model_states.pt",
        "latest_universal",
    ],
    "fsdp2": ["optimizer.bin", "pytorch_model_fsdp.bin", "optimizer_0/.metadata"],
}


def started(workplace, output, *options):
    """Run a command to its end; return the observed processes, and the output."""
    with output.open("w") as written:
        process = subprocess.Popen(
            [sys.executable, "-m", "sft_recipes", "train", "tiny", *options], cwd=workplace.path,
            env=workplace.environment(PYTHONPATH=str(REPOSITORY)),  # forked ranks are no children of the command
            stdout=written, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    seen = ObservedCommand(process)
    try:
        seen.watch(lambda: False)
    finally:
        process.kill()
        process.wait()
    return seen, output.read_text()


@needs_compiler
@pytest.mark.parametrize("engine", FILES)
def test_no_pickle_bomb_in_sharded_files_runs(shared_workplace, follow, data, tmp_path, engine):
    """The checksum reveals each; the run resumes from the older checkpoint; with a forged commit marker FSDP2 runs none."""
    ran, trained = tmp_path / "ran", follow(engine, 2)
    run = RunDir(shared_workplace.runs / f"bombed-{engine}")
    options = ("--name", run.name, *arguments(data, engine, 2, False, "fp32"))

    def bombed(name):
        shutil.rmtree(run.path, ignore_errors=True)
        shutil.copytree(trained, run.path, ignore=shutil.ignore_patterns("final", "last", ".lock", "best-20"))
        run.manifest.write_text(json.dumps({**manifest(run.path), "state": "running"}))
        (run.checkpoint(20) / name).parent.mkdir(exist_ok=True)
        known = (run.checkpoint(20) / name).exists()
        plant(run.checkpoint(20) / name, ran)
        return known

    for name in FILES[engine]:
        known = bombed(name)
        assert known != (name in ("latest_universal", "optimizer_0/.metadata")), (
            "the strategy saves files with other names"
        )
        point, lines = find_checkpoint(run)
        assert point.step == 10 and lines[0].startswith("skipping checkpoint-20: ") and name in lines[0], lines

    bombed(FILES[engine][0])
    seen, output = started(shared_workplace, tmp_path / "output", *options)
    assert seen.process.returncode == 0, output
    assert (
        f"skipping checkpoint-20: size mismatch in {FILES[engine][0]}: " in output
        and "resuming from checkpoint-10" in output
    )
    assert {
        address for address, command in seen.reachable_from_outside if "training.rank_launcher" not in command
    } == set()

    if engine == "fsdp2":
        bombed("optimizer.bin")
        shutil.rmtree(run.checkpoint(20))  # of the last step: nothing of the training's state would be loaded
        ten = run.checkpoint(10)
        plant(ten / "optimizer.bin", ran)
        record = checkpoint_format.read_commit_marker(ten)
        checkpoint_format.write_commit_marker(
            ten, {**record, "files": checkpoint_format.compute_checksums(ten, checkpoint_format.list_files(ten))}
        )
        done = shared_workplace.sft("train", "tiny", *options)
        assert done.returncode == 1 and "resuming from checkpoint-10" in done.stdout
        assert "Weights only load failed" in done.stdout + done.stderr
    assert not ran.exists()
