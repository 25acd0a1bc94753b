"""Real runs of the tiny recipe, in small: what lies in the folder, which names are taken, what an interruption costs."""

import dataclasses
import inspect
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
from helpers.workplace import HANG_SECONDS, REPOSITORY, SHORT, manifest, metrics, needs_compiler

from sft_recipes.config import loader
from sft_recipes.planner import plan as plans
from sft_recipes.runtime import library_imports, run_dir


def test_a_runs_folder_holds_what_is_promised(short_run):
    promised = [
        "plan.json", "manifest.json", "metrics.jsonl", "log.txt", "sft_config.json", "accelerate.yaml", "generations.json",
        "outcome.json", "final", "last", "best-4", "best-8", "checkpoint-4", "checkpoint-8",
    ]  # fmt: skip
    assert [name for name in promised if not (short_run / name).exists()] == []
    assert not list(short_run.rglob("*.partial"))


def test_the_manifest_says_what_the_run_was(short_run):
    found = manifest(short_run)
    assert (found["state"], found["exit_code"], found["steps"]) == ("finished", 0, 8)
    assert found["starts"][0]["versions"]["torch"].startswith("2.13")
    assert set(found["starts"][0]["code"]) == {"commit", "dirty"}
    assert found["data"]["fingerprint"] and found["wall_seconds"] > 0
    assert found["supervised_tokens_seen"] == metrics(short_run)[-1]["supervised_tokens_seen"] > 0
    assert found["best_eval_loss"] == min(line["eval_loss"] for line in metrics(short_run) if "eval_loss" in line)


def test_the_plan_of_a_run_is_settled_and_what_the_trainer_got(short_run):
    plan = json.loads((short_run / "plan.json").read_text())
    config = json.loads((short_run / "sft_config.json").read_text())
    assert plan["settled"] and plan["data_fingerprint"]
    for key in ("learning_rate", "gradient_accumulation_steps", "weight_decay", "max_grad_norm", "max_length"):
        assert config[key] == plan[key], key
    assert config["warmup_steps"] == plan["warmup_steps"]
    learning_rates = [line["learning_rate"] for line in metrics(short_run) if "learning_rate" in line]
    assert max(learning_rates) <= plan["learning_rate"]
    assert len(learning_rates) == 8


def test_final_loads_with_transformers_alone_and_stops_by_itself(short_run):
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


def test_final_is_the_best_and_last_is_the_last(short_run):
    best = manifest(short_run)["best_step"]
    assert same(weights(short_run / "final"), weights(short_run / f"best-{best}"))
    assert same(weights(short_run / "last"), weights(short_run / "checkpoint-8"))
    assert not list((short_run / "final").glob("*.bin")), "a pickle in a folder that others load"


def test_a_finished_run_started_again_does_nothing(shared_workplace, short_run):
    before = (short_run / "manifest.json").read_bytes()
    done = shared_workplace.sft("train", "tiny", "--name", "short", *SHORT)
    assert done.returncode == 0
    assert "is finished" in done.stdout
    assert (short_run / "manifest.json").read_bytes() == before


def test_a_name_that_holds_another_plan_is_refused_with_what_differs(shared_workplace, short_run):
    done = shared_workplace.sft("train", "tiny", "--name", "short", *SHORT, "trainer.learning_rate=1e-3")
    assert done.returncode == 2
    assert "short is finished, and had another plan" in done.stderr and "learning_rate" in done.stderr
    assert "-> 0.001" in done.stderr and "NAME=" in done.stderr
    assert "ALLOW_CHANGE" not in done.stderr, "nothing is left to go on with"
    assert manifest(short_run)["state"] == "finished"


def test_resume_where_there_is_nothing_to_go_on_with_is_an_error(shared_workplace, short_run):
    done = shared_workplace.sft("train", "tiny", "--name", "another", "--resume", *SHORT)
    assert (done.returncode, "holds no run to go on with" in done.stderr) == (2, True)
    assert not (shared_workplace.runs / "another").exists()


def test_a_run_lets_itself_be_asked(shared_workplace, short_run):
    done = shared_workplace.sft("generate", "short", "--prompt", "Please add: 1 + 1")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 1
    missing = shared_workplace.sft("generate", "nobody", "--prompt", "x")
    assert (missing.returncode, "no run 'nobody'" in missing.stderr) == (2, True)


@pytest.mark.parametrize(
    "engine", ["ddp", "fsdp2", *(pytest.param(f"zero{kind}", marks=needs_compiler) for kind in ("2", "3"))]
)
def test_every_engine_on_two_processes_follows_one_with_the_same_batch(shared_workplace, short_run, engine):
    """Each kind once; zero1, zero3_offload, and all of them in bf16, packed or not and with a stop between:
    tests/strategies."""
    arguments = ("--gpus", "0", "--processes", "2", f"parallelism={engine}", *SHORT)
    several = shared_workplace.trained("tiny", "--name", engine, *arguments)
    assert json.loads((several / "plan.json").read_text())["parallelism"] == engine
    check_same_trajectory(short_run, several)


def test_zero_without_a_compiler_says_what_to_install(workplace, few_rows):
    """Also where ninja is the virtual environment's alone: none of its programs is on the user's PATH here."""
    done = workplace.sft(
        "train", "tiny", "--gpus", "0", "--processes", "2", "parallelism=zero3", f"data.train={few_rows}",
        *SHORT, PATH=str(workplace.path), TORCH_EXTENSIONS_DIR=str(workplace.path / "extensions"),
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert line.endswith("found no C++ compiler (c++). Install g++ and python3-dev, or set parallelism=ddp")
    assert "deepspeed_shm_comm" in line and "Traceback" not in done.stdout + done.stderr


def check_same_trajectory(one, several):
    """Loss, validation loss, supervised tokens and final weights, within what the order of fp32 sums explains."""
    left, right = metrics(one), metrics(several)
    assert len(left) == len(right)
    compared = 0
    for mine, theirs in zip(left, right, strict=True):
        assert mine["supervised_tokens_seen"] == theirs["supervised_tokens_seen"]
        assert mine.get("tokens_digest") == theirs.get("tokens_digest"), "other rows"
        for key in ("loss", "eval_loss", "grad_norm"):
            if key in mine:
                assert theirs[key] == pytest.approx(mine[key], rel=1e-4), (mine["step"], key)
                compared += 1
    assert compared >= 8 * 2 + 2
    ours, theirs = weights(one / "final"), weights(several / "final")
    # DeepSpeed's copy of the state does not know that the output layer is the embedding's own tensor.
    tied = theirs.pop("lm_head.weight", theirs["model.embed_tokens.weight"])
    assert torch.equal(tied, theirs["model.embed_tokens.weight"])
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-3, atol=1e-4)


def wait_for(condition, process):
    """Until something that a live process does has happened."""
    until = time.monotonic() + HANG_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "hangs"
        time.sleep(0.05)


LONGER = [word.replace("max_steps=8", "max_steps=24").replace("eval_steps=4", "eval_steps=12") for word in SHORT]


def test_a_run_whose_terminal_is_closed_goes_on_and_ends_with_the_same_weights(shared_workplace, few_rows):
    """Though files beside its checkpoint were harmed meanwhile. What a kill costs: tests/chaos."""
    words = ["tiny", f"data.train={few_rows}", *LONGER, "trainer.max_length=128", "generation.show=0"]
    whole = shared_workplace.trained_once("straight", *words[1:])
    run = shared_workplace.runs / "interrupted"
    process = subprocess.Popen(
        [sys.executable, "-m", "sft_recipes", "train", *words, "--name", run.name], cwd=shared_workplace.path,
        env=shared_workplace.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # noqa: PLW1509  these tests may be under nohup
    )  # fmt: skip
    wait_for(lambda: (run / "metrics.jsonl").is_file() and len(metrics_so_far(run)) >= 7, process)
    process.send_signal(signal.SIGHUP)
    said = process.communicate(timeout=HANG_SECONDS)[0]
    assert process.returncode == 75, said
    assert not any(str(run / "plan.json").encode() in command for _, command in commands()), "a process of it is left"
    assert not (run / "final").exists()
    os.truncate(run / "plan.json", 700)
    os.truncate(run / "generations.json", 0)
    for name in ("integrity.jsonl", "metrics.jsonl"):
        with (run / name).open("ab") as file:
            file.write(b"\x00\xff no line\n")
    again = shared_workplace.sft("train", *words, "--name", run.name)
    assert again.returncode == 0, again.stderr
    assert "plan.json could not be read; it is that of checkpoint-" in again.stdout
    assert "resuming from checkpoint-" in again.stdout
    assert same(weights(run / "final"), weights(whole / "final"))
    assert same(weights(run / "last"), weights(whole / "last"))
    steps = [line["step"] for line in metrics(run) if "loss" in line]
    assert steps == list(range(1, 25)), "a step is logged twice, or not at all"
    assert metrics(run)[-1]["supervised_tokens_seen"] == metrics(whole)[-1]["supervised_tokens_seen"]

    shutil.rmtree(run / "final")
    done = shared_workplace.sft("train", *words, "--name", run.name)
    assert done.returncode == 0 and "final is gone: it is written again" in done.stdout, done.stdout + done.stderr
    assert same(weights(run / "final"), weights(whole / "final"))


def metrics_so_far(run):
    return [line for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


def test_a_rank_imports_what_its_plan_uses_alone(monkeypatch):
    """Fails as well where a library comes to need one of them all the same."""
    code = (
        "import gc, sys; from sft_recipes.config import loader; from sft_recipes.planner import plan; from sft_recipes.runtime import library_imports; "
        "made = plan.make(loader.load('tiny'), plan.Topology(gpus=0, processes=1)); "
        "swiftly = library_imports.swiftly(); swiftly.__enter__(); library_imports.leave_out_what_is_not_used(made); "
        "import sft_recipes.training.trainer; swiftly.__exit__(None, None, None); "
        "print([name for name in ('bitsandbytes', 'peft', 'wandb') if sys.modules.get(name)], "
        "'torch._inductor.compile_fx' in sys.modules, gc.isenabled(), gc.get_freeze_count() > 100_000)"
    )
    environment = {**os.environ, "REPORT_TO": "tensorboard", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[-2] == "[] False True True", done.stdout + done.stderr

    left_out = {}
    monkeypatch.setattr(library_imports.sys, "modules", left_out)
    tiny = loader.load("tiny")
    for reporters, method, wanted in (("wandb", "full", {"bitsandbytes", "peft"}), ("none", "qlora", {"wandb"})):
        left_out.clear()
        monkeypatch.setenv("REPORT_TO", reporters)
        plan = dataclasses.replace(plans.make(tiny, plans.Topology(gpus=0, processes=1)), method=method)
        library_imports.leave_out_what_is_not_used(plan)
        assert left_out == dict.fromkeys(wanted)


def test_deepspeeds_muon_is_compiled_when_it_is_called_and_not_before():
    """Fails as well where DeepSpeed itself brings torch's compiler no more."""
    code = (
        "import inspect, sys, torch; from sft_recipes.runtime import library_imports; library_imports.deepspeed(); "
        "from deepspeed.runtime.zero.muon import original_muon as muon; "
        "from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as stage3; "
        "print('@compiler.compile()' in inspect.getsource(muon), 'import MuonWithAuxAdam' in inspect.getsource(stage3)); "
        "print('torch._inductor.compile_fx' in sys.modules); "
        "torch.compile = lambda function: print('compiled:', function.__name__) or function; "
        "[muon.zeropower_via_newtonschulz5(torch.eye(2), 1) for _ in range(2)]"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    said = done.stdout.splitlines()[-3:]
    assert said == ["True True", "False", "compiled: zeropower_via_newtonschulz5"], done.stdout + done.stderr


def test_accelerate_still_asks_localhost_before_it_starts_ranks():
    """Why training/rank_launcher.py is there; fails when accelerate asks no more."""
    from accelerate.utils.launch import is_port_in_use

    assert '"localhost"' in inspect.getsource(is_port_in_use)


def test_retention_keeps_the_three_best_and_the_earlier_of_equal_ones(tmp_path):
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
    assert not retention.is_among_best(losses, 20)
    refused = {**losses, 24: 0.5, 28: 0.4, 32: 0.3}  # better ones, which were not saved
    retention.remove_others(folder, refused, "a")
    assert folder.numbered("best") == [8, 12, 16]
    assert retention.find_best_step(folder, {}, "a") is None


def test_a_run_cut_off_behind_its_last_checkpoint_takes_no_step_more(shared_workplace, short_run):
    """The Trainer itself would take a ninth step of eight."""
    run = shared_workplace.runs / "cut-off"
    shutil.copytree(short_run, run, ignore=shutil.ignore_patterns("final", "last", ".lock"))
    (run / "manifest.json").write_text(json.dumps({**manifest(run), "state": "running"}))
    done = shared_workplace.sft("train", "tiny", "--name", "cut-off", *SHORT)
    assert done.returncode == 0 and "resuming from checkpoint-8" in done.stdout, done.stderr
    assert same(weights(run / "last"), weights(short_run / "last"))
    assert same(weights(run / "final"), weights(short_run / "final"))
    assert max(line["step"] for line in metrics(run)) == 8
    assert {path.name for path in (run / "last").iterdir()} == {path.name for path in (short_run / "last").iterdir()}


def test_ranks_that_are_not_the_plans_are_refused():
    from sft_recipes.runtime.errors import UserError
    from sft_recipes.training.main import check_ranks

    plan = plans.make(loader.load("tiny"), plans.Topology(gpus=0, processes=2))
    check_ranks(plan, 2, {})
    with pytest.raises(UserError, match="1 ranks were started where the plan has 2"):
        check_ranks(plan, 1, {})
    with pytest.raises(UserError, match="started DeepSpeed where the plan has parallelism ddp"):
        check_ranks(plan, 2, {"ACCELERATE_USE_DEEPSPEED": "true"})


def test_ranks_that_share_fewer_cores_than_they_are_are_stopped():
    from sft_recipes.runtime.errors import UserError
    from sft_recipes.training.main import check_cores

    for ranks, allowed, there in ((8, 64, 64), (8, 8, 64), (4, 2, 2), (1, 1, 64)):
        check_cores(ranks, allowed, there)
    with pytest.raises(UserError, match="8 ranks may run on 1 of this node's 64 cores; .*SRUN_CPUS_PER_TASK"):
        check_cores(8, 1, 64)


def test_accelerate_itself_would_have_started_one_process(shared_workplace):
    """Why the plan's files are written as they are; fails when `accelerate launch --cpu` starts the ranks asked for."""
    probe = shared_workplace.path / "probe.py"
    probe.write_text("from accelerate import PartialState\nprint('ranks', PartialState().num_processes)\n")
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2", str(probe)],
        capture_output=True, text=True, check=False, cwd=REPOSITORY,
    )  # fmt: skip
    assert done.stdout.split() == ["ranks", "1"], done.stderr
