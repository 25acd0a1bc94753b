"""Bad input: one line on standard error, exit code 2, no traceback, nothing left behind."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from helpers.cli_errors import check_refused
from helpers.make_variables import VARIABLES
from helpers.workplace import REPOSITORY, SMALL_LLAMA


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "8bb"], "no recipe '8bb'.*did you mean 8b"),
        (["train", "../tiny"], "no recipe '"),
        (["train", "recipes/tiny.yaml"], "no recipe '"),
        (["train", "$(touch x)"], "no recipe '"),
        (["train", "tiny;ls"], "no recipe '"),
        (["train", "tiny", "--name", "../x"], "NAME: found .*expected at most 100 letters"),
        (["train", "tiny", "--name", "a b"], "NAME: found .*expected at most 100 letters"),
        (["train", "tiny", "--name", "$(id)"], "NAME: found .*expected at most 100 letters"),
        (["train", "tiny", "--name", ""], "NAME: found .*expected at most 100 letters"),
        (["train", "tiny", "--gpus", "8"], "GPUS: 8 requested, but this machine has none; "),
        (["train", "tiny", "--gpus", "eight"], "GPUS: found 'eight', expected an integer"),
        (["train", "tiny", "--gpus", "-1"], "GPUS: found '-1', expected an integer of at least 0"),
        (
            ["train", "tiny", "--gpus", "0", "--nodes", "2"],
            "NODES: found 2, and this process has no place among them.*sbatch --nodes=2.*PET_NNODES",
        ),
        (["train", "tiny", "--processes", "0"], "PROCESSES: found '0', expected an integer of at least 1"),
        (
            ["train", "tiny", "--gpus", "0", "--processes", "3"],
            "expected a multiple of 3 .* to one of 1, 2",
        ),
        (
            ["train", "tiny", "--nodes", "2"],
            "NODES: found 2, and this process has no place among them.*sbatch --nodes=2.*PET_NNODES",
        ),
        (["train", "tiny", "--resume"], "RESUME: no unfinished run of tiny"),
        (["train", "tiny", "data.train=missing.jsonl"], "data.train: no file or folder 'missing.jsonl'"),
        (["train", "tiny", "data.train=$(touch x)y"], r"data.train: no file or folder '\$\(touch x\)y'"),
        (["train", "tiny", "data.train=a;b"], "data.train: no file or folder 'a;b'"),
        (
            ["train", "tiny", "trainer.learning_rate=9"],
            "learning_rate of size class tiny: found 9.0, expected 0.0001 to 0.01",
        ),
        (
            ["train", "tiny", "trainer.learning_rate=fast"],
            "trainer.learning_rate: found 'fast', expected a valid number",
        ),
        (["train", "tiny", "trainer.lr=1e-3"], "unknown key trainer.lr"),
        (["train", "tiny", "trainer.output_dir=x"], "trainer.output_dir is set by the plan. Set NAME= instead"),
        (["train", "tiny", "parallelism=zero9"], "parallelism: found 'zero9', expected one of"),
        (["train", "tiny", "model.name_or_path=x"], "builds its model from scratch. Add model.from_scratch=false"),
        (
            ["train", "tiny", "trainer.num_train_epochs=.inf", "allow_out_of_range=[num_train_epochs]"],
            "expected a finite number",
        ),
        (["train", "tiny", "trainer.max_length="], "trainer.max_length: found None, expected a valid integer"),
        (["train", "tiny", "trainer.seed=-1"], "trainer.seed: found -1, expected greater than or equal to 0"),
        (
            ["train", "tiny", "data.max_dropped_fraction=5"],
            "data.max_dropped_fraction: found 5, expected less than or equal to 1",
        ),
        (["train", "tiny", "allow_out_of_range=[3]"], "allow_out_of_range: found 3, expected a valid string"),
        (["train", "tiny", "batch.effective_batch_size=1000000000"], "expected less than or equal to 100000"),
        (["train", "tiny", "model.architecture={hidden_size: a}"], "model.architecture.hidden_size: found 'a'"),
        (
            ["train", "tiny", "trainer.hub_token=secret"],
            r"trainer.hub_token is set by the plan \(fixed: runs upload nothing",
        ),
        (["train", "tiny", "data.train=a #b.jsonl"], "no file or folder 'a #b.jsonl'"),
        (["train", "tiny", "data.train=2024-01-01"], "no file or folder '2024-01-01'"),
        (["train", "tiny", "data.train=~nosuch/x"], "no file or folder '~nosuch/x'"),
        (["train", "tiny", "data.train=" + "x" * 5000], "File name too long"),
        (["generate", "x" * 300], "File name too long|no run"),
        (["train", "tiny", "--gups", "1"], "unknown argument '--gups'"),
        (["train"], "RECIPE: not set. Set RECIPE or MODEL"),
        (["trian", "tiny"], "invalid choice: 'trian'"),
        (["plan", "tiny", "--gpus", "1", "--gpu-type", "h1000"], "GPU_TYPE: unknown GPU type: found 'h1000'"),
        (["plan", "tiny", "--gpus", "8", "--nodes", "3"], "GPUS: found 8 on 3 nodes, expected a multiple of 3"),
        (["generate", "unknown"], "no run 'unknown'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_cli_rejects_before_start(workplace, in_process, arguments, message):
    check_refused(in_process(*arguments), message)
    assert not list(workplace.runs.glob("*/plan.json"))
    assert not (workplace.path / "x").exists()


def test_cli_imports_no_heavy_library():
    program = "import sys, sft_recipes.cli; print({'torch', 'transformers', 'numpy', 'datasets'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_train_rejects_unwritable_runs_dir(workplace, in_process):
    file = workplace.path / "file"
    file.write_text("")
    done = in_process("train", "tiny", RUNS_DIR=str(file / "runs"))
    check_refused(done, "is not writable .*RUNS_DIR")


def test_train_never_overwrites_other_folders(workplace, in_process):
    (workplace.runs / "mine").mkdir(parents=True)
    (workplace.runs / "mine" / "thesis.txt").write_text("years of work")
    check_refused(in_process("train", "tiny", "--name", "mine"), "exists and is not a run. Nothing is overwritten")
    assert (workplace.runs / "mine" / "thesis.txt").read_text() == "years of work"


def test_locked_run_is_rejected_by_name_and_skipped_without(workplace, in_process):
    import fcntl

    plan = in_process("plan", "tiny", "--json").stdout
    (workplace.runs / "tiny-1").mkdir(parents=True)
    (workplace.runs / "tiny-1" / "plan.json").write_text(plan)
    with (workplace.runs / "tiny-1" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 1 on elsewhere")
        lock.flush()
        check_refused(in_process("train", "tiny", "--name", "tiny-1"), "in use by process 1 on elsewhere")
        dry = in_process("train", "tiny", "--dry-run")
        assert dry.returncode == 0, dry.stderr
        assert "skipping tiny-1" in dry.stdout and "tiny-2" in dry.stdout


def test_resume_rejects_other_plan_and_names_the_fix(workplace, in_process):
    plan = in_process("plan", "tiny", "--json").stdout
    (workplace.runs / "tiny-1").mkdir(parents=True)
    (workplace.runs / "tiny-1" / "plan.json").write_text(plan)
    changed = ("trainer.learning_rate=1e-3", "trainer.seed=7")
    line = check_refused(
        in_process("train", "tiny", *changed), "run tiny-1 has another plan: learning_rate 0.002 -> 0.001"
    )
    assert "; trainer.seed 42 -> 7. Resume it with ALLOW_CHANGE=" in line and "NAME=" in line
    again = in_process("train", "tiny", *changed, "--allow-change", "learning_rate,seed", "--dry-run")
    assert again.returncode == 0, again.stderr


def test_dry_run_starts_nothing(workplace, in_process):
    done = in_process("train", "tiny", "--dry-run")
    assert done.returncode == 0
    command = shlex.split(done.stdout)
    assert "sft_recipes.training.main" in command and command[-1].endswith("tiny-1/plan.json")
    assert workplace.names() == []


def make(workplace, *arguments, **variables):
    return subprocess.run(
        ["make", "-s", *arguments],
        cwd=REPOSITORY,
        env=workplace.environment(VENV=os.environ.get("VENV", ".venv"), RUNTIME="local", **variables),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("variable", "value"),
    [("DATA", "$(touch x)y"), ("DATA", "a'b\"c d"), ("DATA", "`id`.jsonl"), ("DATA", "a;b|c"), ("RECIPE", "$(touch x)"),
     ("NAME", "a b;c"), ("INIT_FROM", "a b;c"), ("GPUS", "$HOME"), ("MODEL", "a b;c/$(id)")],
)  # fmt: skip
def test_make_passes_variables_verbatim(workplace, variable, value):
    done = make(workplace, "train", f"{variable}={value}")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and repr(value) in lines[0], done.stderr
    assert not (REPOSITORY / "x").exists()


def test_make_devices_selects_and_counts_gpus(workplace):
    smi = workplace.path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\nfor id in 0 1 2 3; do echo $id, 81559, NVIDIA H100 80GB HBM3; done\n")
    smi.chmod(0o755)
    path = f"{smi.parent}:{os.environ['PATH']}"
    done = make(workplace, "train", "RECIPE=8b", "DEVICES=0,7", PATH=path)
    assert "GPUS: 2 requested, but this machine has 1; CUDA_VISIBLE_DEVICES='0,7' leaves 1 of the 4" in done.stderr
    done = make(workplace, "train", "RECIPE=8b", "DEVICES=3,$(touch x)", PATH=path)
    assert "CUDA_VISIBLE_DEVICES='3,$(touch x)' leaves 1" in done.stderr and not (REPOSITORY / "x").exists()


def test_make_help_lists_targets_and_variables(workplace):
    done = make(workplace, "help")
    text = (REPOSITORY / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", text, re.M)[1].split())
    assert done.returncode == 0 and len(targets) >= 8
    assert {target for target in targets if not re.search(rf"^  {target} ", done.stdout, re.M)} == set()
    assert {variable for variable in VARIABLES if variable not in done.stdout} == set()


def test_make_plan_uses_its_variables(workplace):
    done = make(
        workplace,
        "plan",
        "RECIPE=tiny",
        "GPUS=0",
        "PROCESSES=2",
        "DATA=x y.jsonl",
        "OVERFIT=1",
        "ARGS=--json trainer.seed=7",
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["world_size"] == 2
    assert plan["sections"]["data"]["train"] == "x y.jsonl" and not plan["sections"]["data"]["validation"]
    assert plan["sections"]["trainer"]["seed"] == 7 and plan["sections"]["data"]["overfit_rows"] == 8


def test_small_model_matches_its_architecture(model_folder):
    from safetensors.torch import load_file

    from sft_recipes.config.architecture import parameter_count

    parameters = sum(tensor.numel() for tensor in load_file(model_folder / "model.safetensors").values())
    assert parameters == parameter_count(SMALL_LLAMA)
