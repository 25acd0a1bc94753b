"""Pickle bombs in the files that DeepSpeed and FSDP2 save; tests/integration/test_security.py has one process."""

import json
import shutil
import subprocess
import sys

import pytest
from helpers.checkpoints import find_checkpoint
from helpers.pickle_bomb import plant
from helpers.processes import ObservedCommand
from helpers.workplace import SHORT, manifest, needs_compiler

from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.training.checkpoint import checkpoint_format

# Files that are loaded with pickle (DeepSpeed's TorchCheckpointEngine), under FSDP2 with torch's weights_only.
FILES = {
    "zero2": [
        "global_step8/zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "global_step8/mp_rank_00_model_states.pt",
        "rng_state_1.pth",
    ],
    "zero3": [
        "global_step8/zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "global_step8/zero_pp_rank_0_mp_rank_00_model_states.pt",
        "latest_universal",
    ],
    "fsdp2": ["optimizer.bin", "pytorch_model_fsdp.bin", "optimizer_0/.metadata"],
}


def started(workplace, *arguments):
    """Run a command to its end; return the observed processes, and the output."""
    with (workplace.path / "output").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "sft_recipes", "train", "tiny", *arguments], cwd=workplace.path,
            env=workplace.environment(), stdout=output, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    seen = ObservedCommand(process)
    try:
        seen.watch(lambda: False)
    finally:
        process.kill()
        process.wait()
    return seen, (workplace.path / "output").read_text()


@needs_compiler
@pytest.mark.parametrize("engine", FILES)
def test_no_pickle_bomb_in_sharded_files_runs(workplace, few_rows, engine):
    """The checksum reveals each; the run resumes from the older checkpoint; with a forged commit marker FSDP2 runs none."""
    ran = workplace.path / "ran"
    words = ("--name", "bombed", "--gpus", "0", "--processes", "2", f"parallelism={engine}", *SHORT)
    words += (f"data.train={few_rows}", "data.validation=", "generation.show=0", "generation.score=0")
    run = RunDir(workplace.trained("tiny", *words))
    keep = workplace.path / "keep"
    shutil.copytree(run.path, keep)

    def bombed(name):
        shutil.rmtree(run.path)
        shutil.copytree(keep, run.path, ignore=shutil.ignore_patterns("final", "last", ".lock", "best-8"))
        run.manifest.write_text(json.dumps({**manifest(run.path), "state": "running"}))
        (run.checkpoint(8) / name).parent.mkdir(exist_ok=True)
        known = (run.checkpoint(8) / name).exists()
        plant(run.checkpoint(8) / name, ran)
        return known

    for name in FILES[engine]:
        known = bombed(name)
        assert known != (name in ("latest_universal", "optimizer_0/.metadata")), (
            "the strategy saves files with other names"
        )
        point, lines = find_checkpoint(run)
        assert point.step == 4 and lines[0].startswith("skipping checkpoint-8: ") and name in lines[0], lines

    bombed(FILES[engine][0])
    seen, output = started(workplace, *words)
    assert seen.process.returncode == 0, output
    assert (
        f"skipping checkpoint-8: size mismatch in {FILES[engine][0]}: " in output
        and "resuming from checkpoint-4" in output
    )
    assert {
        address for address, command in seen.reachable_from_outside if "training.rank_launcher" not in command
    } == set()

    if engine == "fsdp2":
        bombed("optimizer.bin")
        shutil.rmtree(run.checkpoint(8))  # of the last step: nothing of the training's state would be loaded
        four = run.checkpoint(4)
        plant(four / "optimizer.bin", ran)
        record = checkpoint_format.read_commit_marker(four)
        checkpoint_format.write_commit_marker(
            four, {**record, "files": checkpoint_format.compute_checksums(four, checkpoint_format.list_files(four))}
        )
        seen, output = started(workplace, *words)
        assert seen.process.returncode == 1 and "resuming from checkpoint-4" in output
        assert "Weights only load failed" in output
    assert not ran.exists()
