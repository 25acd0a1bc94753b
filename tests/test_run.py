"""Real runs of the tiny recipe, in small: what lies in the folder, which names are taken, what an interruption costs."""

import contextlib
import inspect
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import HANG_SECONDS, REPOSITORY, SHORT, compiler, manifest, metrics
from safetensors.torch import load_file

from sft_recipes.planning import run_folder


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_runs_folder_holds_what_is_promised(short_run):
    promised = [
        "plan.json", "manifest.json", "metrics.jsonl", "log.txt", "sft_config.json", "accelerate.yaml", "answers.json",
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
    assert "learning_rate" in done.stderr and "-> 0.001" in done.stderr and "--accept learning_rate" in done.stderr
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
    "engine", ["ddp", "fsdp2", *(pytest.param(f"zero{kind}", marks=compiler) for kind in ("2", "3"))]
)
def test_every_engine_on_two_processes_follows_one_with_the_same_batch(shared_workplace, short_run, engine):
    """Each kind once; zero1, zero3_offload, and all of them in bf16, packed or not and with a stop between:
    tests/engines."""
    arguments = ("--gpus", "0", "--processes", "2", f"parallelism={engine}", *SHORT)
    several = shared_workplace.trained("tiny", "--name", engine, *arguments)
    assert json.loads((several / "plan.json").read_text())["parallelism"] == engine
    check_same_trajectory(short_run, several)


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


def start(workplace, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "sft_recipes", "train", "tiny", *arguments],
        cwd=workplace.path,
        env=workplace.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, process):
    """Until something that a live process does has happened."""
    until = time.monotonic() + HANG_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "hangs"
        time.sleep(0.05)


LONGER = [word.replace("max_steps=8", "max_steps=24").replace("eval_steps=4", "eval_steps=12") for word in SHORT]


@pytest.fixture(scope="module")
def uninterrupted(shared_workplace):
    return shared_workplace.trained("tiny", "--name", "straight", *LONGER)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGKILL, -9)], ids=["asked to stop", "killed"]
)
def test_an_interrupted_run_goes_on_and_ends_with_the_same_weights(shared_workplace, uninterrupted, number, code):
    name = f"interrupted-{number.name.lower()}"
    run = shared_workplace.runs / name
    process = start(shared_workplace, "--name", name, *LONGER)
    wait_for(lambda: (run / "metrics.jsonl").is_file() and len(metrics_so_far(run)) >= 7, process)
    process.send_signal(number)
    said = process.communicate(timeout=HANG_SECONDS)[0]
    assert process.returncode == code, said
    wait_until_free(run)
    assert not (run / "final").exists()
    again = shared_workplace.sft("train", "tiny", "--name", name, *LONGER)
    assert again.returncode == 0, again.stderr
    assert "going on from checkpoint-" in again.stdout
    assert same(weights(run / "final"), weights(uninterrupted / "final"))
    assert same(weights(run / "last"), weights(uninterrupted / "last"))
    steps = [line["step"] for line in metrics(run) if "loss" in line]
    assert steps == list(range(1, 25)), "a step is logged twice, or not at all"
    assert metrics(run)[-1]["supervised_tokens_seen"] == metrics(uninterrupted)[-1]["supervised_tokens_seen"]


def metrics_so_far(run):
    return [line for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


def wait_until_free(run):
    """No process of the run may be left, also where its parent was killed."""
    until = time.monotonic() + HANG_SECONDS
    while any(str(run / "plan.json").encode() in command for command in commands()):
        assert time.monotonic() < until, "a process of the run is left"
        time.sleep(0.1)


def commands():
    """The command line of every process that this user can see."""
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            yield process.read_bytes()


def test_accelerate_still_asks_localhost_before_it_starts_ranks():
    """Why training/start.py is there; fails when accelerate asks no more."""
    from accelerate.utils.launch import is_port_in_use

    assert '"localhost"' in inspect.getsource(is_port_in_use)


def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path):
    from sft_recipes.training import checkpoint

    folder = run_folder.RunFolder(tmp_path)
    for step in (4, 8, 12):
        folder.checkpoint(step).mkdir()
    checkpoint.mark_complete(folder.checkpoint(4), 4, 100)
    checkpoint.mark_complete(folder.checkpoint(12), 8, 100)
    assert checkpoint.newest_complete(folder) == (folder.checkpoint(4), ["checkpoint-12", "checkpoint-8"])
    assert checkpoint.supervised_tokens_seen(folder.checkpoint(4)) == 100


def test_the_three_best_are_kept_and_the_earlier_of_equals_wins(tmp_path):
    from sft_recipes.training import checkpoint

    losses = {4: 3.0, 8: 1.0, 12: 2.0, 16: 1.0, 20: 5.0}
    folder = run_folder.RunFolder(tmp_path)
    for step in losses:
        folder.best(step).mkdir()
    checkpoint.forget_all_but_the_best(folder, losses)
    assert folder.numbered("best") == [8, 12, 16]
    assert checkpoint.best_step(folder, losses) == 8
    assert checkpoint.best_step(folder, {**losses, 12: float("nan")}) == 8
    folder.best(8).rmdir()
    assert checkpoint.best_step(folder, losses) == 16
    assert not checkpoint.among_the_best(losses, 20)
    assert checkpoint.best_step(folder, {}) is None


def test_a_run_cut_off_behind_its_last_checkpoint_takes_no_step_more(shared_workplace, short_run):
    """The Trainer itself would take a ninth step of eight."""
    run = shared_workplace.runs / "cut-off"
    shutil.copytree(short_run, run, ignore=shutil.ignore_patterns("final", "last", ".lock"))
    (run / "manifest.json").write_text(json.dumps({**manifest(run), "state": "running"}))
    done = shared_workplace.sft("train", "tiny", "--name", "cut-off", *SHORT)
    assert done.returncode == 0 and "going on from checkpoint-8" in done.stdout, done.stderr
    assert same(weights(run / "last"), weights(short_run / "last"))
    assert same(weights(run / "final"), weights(short_run / "final"))
    assert max(line["step"] for line in metrics(run)) == 8
    assert {path.name for path in (run / "last").iterdir()} == {path.name for path in (short_run / "last").iterdir()}


def test_ranks_that_are_not_the_plans_are_refused():
    from sft_recipes.planning import plan as plans
    from sft_recipes.planning import recipes
    from sft_recipes.planning.schema import RecipeError
    from sft_recipes.training.run import check_ranks

    plan = plans.make(recipes.load("tiny"), plans.Topology(gpus=0, processes=2))
    check_ranks(plan, 2, {})
    with pytest.raises(RecipeError, match="1 ranks were started where the plan has 2"):
        check_ranks(plan, 1, {})
    with pytest.raises(RecipeError, match="started DeepSpeed where the plan has parallelism ddp"):
        check_ranks(plan, 2, {"ACCELERATE_USE_DEEPSPEED": "true"})


def test_accelerate_itself_would_have_started_one_process(shared_workplace):
    """Why the plan's files are written as they are; fails when `accelerate launch --cpu` starts the ranks asked for."""
    probe = shared_workplace.path / "probe.py"
    probe.write_text("from accelerate import PartialState\nprint('ranks', PartialState().num_processes)\n")
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2", str(probe)],
        capture_output=True, text=True, check=False, cwd=REPOSITORY,
    )  # fmt: skip
    assert done.stdout.split() == ["ranks", "1"], done.stderr
