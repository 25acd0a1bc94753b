"""Small real runs of the tiny recipe: files of a run, names, interruption and resume."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers.processes import commands
from helpers.saved_weights import same, weights
from helpers.workplace import (
    HANG_SECONDS,
    LONG,
    LONG_STEPS,
    REPOSITORY,
    SHORT,
    SMALL_ARCHITECTURE,
    manifest,
    metrics,
)

from sft_recipes.runtime import library_imports, run_dir


def test_run_directory_is_complete(short_run):
    expected = [
        "plan.json", "manifest.json", "metrics.jsonl", "log.txt", "sft_config.json", "accelerate.yaml", "generations.json",
        "outcome.json", "final", "last", "best-4", "best-8", "checkpoint-4", "checkpoint-8",
    ]  # fmt: skip
    assert [name for name in expected if not (short_run / name).exists()] == []
    assert not list(short_run.rglob("*.partial"))


def test_manifest_describes_the_run(short_run):
    content = manifest(short_run)
    assert (content["state"], content["exit_code"], content["steps"]) == ("finished", 0, 8)
    assert content["starts"][0]["versions"]["torch"].startswith("2.13")
    assert set(content["starts"][0]["code"]) == {"commit", "dirty"}
    assert content["data"]["fingerprint"] and content["wall_seconds"] > 0
    assert content["supervised_tokens_seen"] == metrics(short_run)[-1]["supervised_tokens_seen"] > 0
    assert content["best_eval_loss"] == min(line["eval_loss"] for line in metrics(short_run) if "eval_loss" in line)


def test_plan_equals_trainer_configuration(short_run):
    plan = json.loads((short_run / "plan.json").read_text())
    config = json.loads((short_run / "sft_config.json").read_text())
    assert plan["data_prepared"] and plan["data_fingerprint"]
    for key in ("learning_rate", "gradient_accumulation_steps", "weight_decay", "max_grad_norm", "max_length"):
        assert config[key] == plan[key], key
    assert config["warmup_steps"] == plan["warmup_steps"]
    learning_rates = [line["learning_rate"] for line in metrics(short_run) if "learning_rate" in line]
    assert max(learning_rates) <= plan["learning_rate"]
    assert len(learning_rates) == 8


def test_final_loads_with_transformers_only(short_run):
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer; "
        "model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True); "
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1]); "
        "assert not any(info[kind] for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info; "
        "assert tokenizer.convert_tokens_to_ids('<|im_end|>') in model.generation_config.eos_token_id; "
        "ids = tokenizer.apply_chat_template([{'role': 'user', 'content': 'Hi'}], add_generation_prompt=True, "
        "return_tensors='pt', return_dict=True); "
        "print(model.generate(**ids, max_new_tokens=3).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(short_run / "final")], capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stderr


def test_final_is_best_and_last_is_last(short_run):
    best = manifest(short_run)["best_step"]
    assert same(weights(short_run / "final"), weights(short_run / f"best-{best}"))
    assert same(weights(short_run / "last"), weights(short_run / "checkpoint-8"))
    assert not list((short_run / "final").glob("*.bin")), "a pickle in a published folder"


def test_finished_run_is_not_changed(in_process, short_run):
    def written():
        return {path: path.stat().st_mtime_ns for path in short_run.rglob("*") if path.name != ".lock"}

    before = written()
    done = in_process("train", "tiny", "--name", "short", *SHORT, RUNS_DIR=str(short_run.parent))
    assert done.returncode == 0
    assert "is finished" in done.stdout
    assert written() == before


def test_name_with_another_plan_is_rejected(in_process, short_run):
    arguments = ("train", "tiny", "--name", "short", *SHORT, "trainer.learning_rate=1e-3")
    done = in_process(*arguments, RUNS_DIR=str(short_run.parent))
    assert done.returncode == 2
    assert "short is finished and has another plan" in done.stderr and "learning_rate" in done.stderr
    assert "-> 0.001" in done.stderr and "NAME=" in done.stderr
    assert "ALLOW_CHANGE" not in done.stderr, "a finished run cannot resume"
    assert manifest(short_run)["state"] == "finished"


def test_resume_without_a_run_is_rejected(workplace, in_process):
    done = in_process("train", "tiny", "--name", "another", "--resume", *SHORT)
    assert (done.returncode, "has no run to resume" in done.stderr) == (2, True)
    assert not (workplace.runs / "another").exists()


def test_generate_answers_a_prompt(in_process, short_run):
    done = in_process("generate", "short", "--prompt", "Please add: 1 + 1", RUNS_DIR=str(short_run.parent))
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 1


def test_two_ddp_ranks_follow_one_process_with_the_same_batch(long_run, long_ddp_run):
    assert json.loads((long_ddp_run / "plan.json").read_text())["parallelism"] == "ddp"
    check_same_trajectory(long_run, long_ddp_run)


def test_sharding_ranks_follow_one_with_the_same_batch(shared_workplace, short_run):
    """Each strategy, also those of DeepSpeed, which compile an operator, and each in bf16, packed and resumed:
    tests/strategies."""
    arguments = ("--gpus", "0", "--processes", "2", "parallelism=fsdp2", *SHORT)
    several = shared_workplace.trained("tiny", "--name", "fsdp2", *arguments)
    assert json.loads((several / "plan.json").read_text())["parallelism"] == "fsdp2"
    check_same_trajectory(short_run, several)


def test_zero_without_compiler_names_packages_to_install(workplace, few_rows):
    """Also if ninja is only in the virtual environment: PATH contains none of its programs."""
    done = workplace.sft(
        "train", "tiny", "--gpus", "0", "--processes", "2", "parallelism=zero3", f"data.train={few_rows}",
        *SHORT, PATH=str(workplace.path), TORCH_EXTENSIONS_DIR=str(workplace.path / "extensions"),
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert line.endswith(". Install g++ and python3-dev, or set parallelism=ddp")
    assert "deepspeed_shm_comm" in line and "Traceback" not in done.stdout + done.stderr


def check_same_trajectory(one, several):
    """Loss, validation loss, supervised tokens and final weights are equal up to the order of fp32 sums."""
    left, right = metrics(one), metrics(several)
    assert len(left) == len(right)
    compared = 0
    for mine, theirs in zip(left, right, strict=True):
        assert mine["supervised_tokens_seen"] == theirs["supervised_tokens_seen"]
        assert mine.get("rows_hash") == theirs.get("rows_hash"), "different rows"
        for key in ("loss", "eval_loss", "grad_norm"):
            if key in mine:
                assert theirs[key] == pytest.approx(mine[key], rel=1e-4), (mine["step"], key)
                compared += 1
    assert compared >= 8 * 2 + 2
    ours, theirs = weights(one / "final"), weights(several / "final")
    # DeepSpeed's state does not tie the output layer to the embedding.
    tied = theirs.pop("lm_head.weight", theirs["model.embed_tokens.weight"])
    assert torch.equal(tied, theirs["model.embed_tokens.weight"])
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-3, atol=1e-4)


def wait_for(condition, process):
    """Wait until a condition holds, while the process runs."""
    until = time.monotonic() + HANG_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "timeout"
        time.sleep(0.05)


def test_run_of_closed_terminal_resumes_to_the_same_weights(shared_workplace, few_rows, long_run):
    """Other files of the run are corrupted meanwhile. Kills: tests/chaos."""
    arguments = ["tiny", f"data.train={few_rows}", *LONG]
    run = shared_workplace.runs / "interrupted"
    process = subprocess.Popen(
        [sys.executable, "-m", "sft_recipes", "train", *arguments, "--name", run.name], cwd=shared_workplace.path,
        env=shared_workplace.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # noqa: PLW1509  these tests may be under nohup
    )  # fmt: skip
    wait_for(lambda: (run / "metrics.jsonl").is_file() and len(metrics_so_far(run)) >= 7, process)
    process.send_signal(signal.SIGHUP)
    output = process.communicate(timeout=HANG_SECONDS)[0]
    assert process.returncode == 75, output
    assert not any(str(run / "plan.json").encode() in command for _, command in commands()), (
        "a process of the run is left"
    )
    assert not (run / "final").exists()
    os.truncate(run / "plan.json", 700)
    os.truncate(run / "generations.json", 0)
    for name in ("integrity.jsonl", "metrics.jsonl"):
        with (run / name).open("ab") as file:
            file.write(b"\x00\xff no line\n")
    again = shared_workplace.sft("train", *arguments, "--name", run.name)
    assert again.returncode == 0, again.stderr
    assert "plan.json was missing or corrupt: restored from checkpoint-" in again.stdout
    assert "resuming from checkpoint-" in again.stdout
    assert same(weights(run / "final"), weights(long_run / "final"))
    assert same(weights(run / "last"), weights(long_run / "last"))
    steps = [line["step"] for line in metrics(run) if "loss" in line]
    assert steps == list(range(1, LONG_STEPS + 1)), "a step is logged twice or is missing"
    assert metrics(run)[-1]["supervised_tokens_seen"] == metrics(long_run)[-1]["supervised_tokens_seen"]


def metrics_so_far(run):
    return [line for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


@pytest.mark.parametrize(("method", "trackers", "deepspeed", "remote_code", "skipped"), [
    ("full", ["tensorboard"], False, False, ["wandb", "peft", "deepspeed", "bitsandbytes"]),
    ("full", ["wandb"], True, False, ["peft", "bitsandbytes"]),
    ("lora", ["tensorboard"], False, False, ["wandb", "deepspeed", "bitsandbytes"]),
    ("qlora", ["tensorboard"], False, False, ["wandb", "deepspeed"]),
    ("full", ["tensorboard"], False, True, []),
])  # fmt: skip
def test_unused_libraries_are_skipped_except_for_remote_code(
    monkeypatch, method, trackers, deepspeed, remote_code, skipped
):
    modules = {}
    monkeypatch.setattr(library_imports.sys, "modules", modules)
    library_imports.skip_unused_libraries(method, "adamw_torch_fused", trackers, deepspeed, remote_code)
    assert modules == dict.fromkeys(skipped)


def last_line_of(code):
    """Run code in a new Python process, and return the last line that it prints."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return done.stdout.split("\n")[-2]


def test_imported_objects_are_frozen_and_collection_is_enabled_again():
    code = (
        "import gc; from sft_recipes.runtime import library_imports\n"
        "with library_imports.without_garbage_collection():\n    import torch\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 100_000)"
    )
    assert last_line_of(code) == "True True"


def test_retention_keeps_three_best_and_earlier_step_wins_ties(tmp_path):
    from helpers.checkpoints import logged_lines

    from sft_recipes.training.checkpoint import checkpoint_format, retention

    losses = {4: 3.0, 8: 1.0, 12: 2.0, 16: 1.0, 20: 5.0}
    folder = run_dir.RunDir(tmp_path)
    for step in losses:
        folder.best(step).mkdir()
        (folder.best(step) / "model.safetensors").write_bytes(b"weights")
        checkpoint_format.write_commit_marker(
            folder.best(step),
            {
                "step": step,
                "run_id": "a",
                "files": checkpoint_format.compute_checksums(folder.best(step), ["model.safetensors"]),
            },
        )
    retention.remove_others(folder, losses, "another run")
    assert folder.numbered("best") == list(losses), "not this run's to remove"
    retention.remove_others(folder, losses, "a")
    assert folder.numbered("best") == [8, 12, 16]
    assert retention.find_best_step(folder, losses, "a") == 8
    assert retention.find_best_step(folder, {**losses, 12: float("nan")}, "a") == 8
    (folder.best(8) / "model.safetensors").write_bytes(b"weighty")
    with logged_lines() as lines:
        assert retention.find_best_step(folder, losses, "a") == 16
    assert lines == ["skipping best-8: checksum mismatch in model.safetensors"]
    assert 20 not in retention.rank_steps(losses)[: retention.BEST_KEPT]
    refused = {**losses, 24: 0.5, 28: 0.4, 32: 0.3}  # better ones, which were not saved
    retention.remove_others(folder, refused, "a")
    assert folder.numbered("best") == [8, 12, 16]
    assert retention.find_best_step(folder, {}, "a") is None


def test_missing_final_is_written_again_without_a_step(shared_workplace, short_run):
    """The Trainer alone would take a ninth step of eight. Stopped at its last step: tests/strategies."""
    run = shared_workplace.runs / "cut-off"
    shutil.copytree(short_run, run, ignore=shutil.ignore_patterns("final", "last", ".lock"))
    done = shared_workplace.sft("train", "tiny", "--name", "cut-off", *SHORT)
    assert done.returncode == 0 and "resuming from checkpoint-8" in done.stdout, done.stderr
    assert "final is missing: writing it again" in done.stdout
    assert f"resuming {run} from checkpoint-8: 8 optimizer steps, effective batch 8, " in done.stdout
    assert same(weights(run / "last"), weights(short_run / "last"))
    assert same(weights(run / "final"), weights(short_run / "final"))
    assert max(line["step"] for line in metrics(run)) == 8
    assert {path.name for path in (run / "last").iterdir()} == {path.name for path in (short_run / "last").iterdir()}


def test_accelerate_launch_cpu_starts_one_process(shared_workplace):
    """Why accelerate_configs/cpu.yaml exists; fails if `accelerate launch --cpu` starts the requested processes."""
    probe = shared_workplace.path / "probe.py"
    probe.write_text("from accelerate import PartialState\nprint('ranks', PartialState().num_processes)\n")
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2", str(probe)],
        capture_output=True, text=True, check=False, cwd=REPOSITORY,
    )  # fmt: skip
    assert done.stdout.split() == ["ranks", "1"], done.stderr


def test_run_starts_from_the_last_weights_of_another(shared_workplace, short_run):
    """At a learning rate of almost zero, so that the weights stay, and the smoke test of overfitting fails."""
    rate = ("trainer.learning_rate=1e-12", "allow_out_of_range=[learning_rate]")
    steps = ("trainer.max_steps=2", "generation.show=0", "generation.score=0", "trainer.max_length=128")
    steps += (SMALL_ARCHITECTURE,)
    done = shared_workplace.sft("train", "tiny", "--name", "child", "--init-from", "short", "--overfit", *steps, *rate)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "overfit: found loss" in done.stderr and "after 2 steps, expected below 0.1" in done.stderr
    child = shared_workplace.runs / "child"
    parent = {"run": "short", "run_id": json.loads((short_run / "plan.json").read_text())["run_id"], "step": 8}
    assert manifest(child)["init_from"] == parent
    before, after = weights(short_run / "last"), weights(child / "last")
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-9)
    again = shared_workplace.sft("train", "tiny", "--name", "child", "--init-from", "short", "--overfit", *steps, *rate)
    assert (again.returncode, "is finished" in again.stdout) == (1, True), "as the first time"
    assert "init_from: short (step 8)" in shared_workplace.sft("status", "child").stdout


def test_overfit_reaches_a_loss_near_zero(shared_workplace):
    done = shared_workplace.sft("train", "tiny", "--name", "overfit", "--overfit", "trainer.max_length=128")
    assert done.returncode == 0, done.stdout + done.stderr
    assert manifest(shared_workplace.runs / "overfit")["last_eval_loss"] < 0.1
    assert "expected below 0.1" in done.stdout
