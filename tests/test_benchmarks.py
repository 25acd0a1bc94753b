"""The scripts below benchmarks/: what they would run is a plan, and what they write follows from what they read."""

import json
import os
import subprocess
import sys

import psutil
import pytest
from conftest import REPOSITORY

from sft_recipes.planning import cost, gpus, recipes
from sft_recipes.planning import plan as plans
from sft_recipes.planning.plan import Topology

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import bench
import beside
import memory
import plots
import readme
from matplotlib.figure import Figure

HERE = {**os.environ, "PYTHON": sys.executable}
ON_A_GPU = {
    f"{script.__name__}: {name}": case
    for script, cases in ((bench, bench.cases(True)), (bench, bench.ablations(True)), (memory, memory.cases(True)))
    for name, case in cases.items()
}


def test_what_is_measured_on_a_gpu_is_as_many_cases_as_were_promised():
    assert len(memory.cases(True)) >= 12 and len(bench.cases(True)) == 22 and len(ON_A_GPU) > 40


@pytest.mark.parametrize("name", ON_A_GPU)
def test_what_is_measured_on_a_gpu_can_be_planned_there(name):
    """So that the first minutes with a GPU are not spent on a refusal; whether it fits is for the run to see."""
    case = ON_A_GPU[name]
    plan = plans.make(recipes.load(case.recipe, case.words), Topology(gpus=1, processes=1, card="h200-141g"))
    assert plan.memory_bytes_per_gpu["total"] > 2**30
    assert plan.fits or "checkpointing" not in name, "refused before it starts"
    tokens = plan.effective_batch_size * plan.max_length
    attended = 2 * bench.MEAN_TOKENS  # the mean over tokens of an example's length, as they are drawn
    flops = cost.flops_per_token(plans.load_of(plan, plan.sections["model"]["architecture"]), attended)
    steps = bench.STEPS if name.startswith("bench") else memory.STEPS
    slowly = 0.25 * gpus.peak_flops("h200-141g")
    assert steps * tokens * flops.model / slowly < 530 - 180, "a piece of gpu.sh is cut off, with 180 s to begin in"


def test_rows_for_a_gpu_are_as_long_as_the_recipes_say(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "ROWS", tmp_path)
    bench.write_rows()
    rows = [json.loads(line)["messages"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    lengths = sorted(sum(len(turn["content"].split()) for turn in turns) for turns in rows)
    assert len(rows) == 6000 and sum(lengths) / len(rows) == pytest.approx(
        recipes.load("8b").data.mean_tokens, rel=0.05
    )
    assert lengths[int(0.95 * len(rows))] == pytest.approx(4 * lengths[len(rows) // 2], rel=0.1)


def test_every_knob_is_turned_by_itself():
    for on_gpu in (False, True):
        turned = bench.ablations(on_gpu)
        default = turned.pop(bench.DEFAULT)
        for name, case in turned.items():
            assert case.words != default.words and case.recipe == default.recipe, name
            recipes.load(case.recipe, case.words)


@pytest.mark.parametrize("recipe", ["tiny", "1b", "8b-lora"])
def test_what_is_trained_beside_others_is_a_plan(recipe, tmp_path):
    """The words that are said on a GPU are right before there is one."""
    place = beside.Place(recipe, tmp_path, tmp_path, 40, 13)
    command = beside._ours(place, tmp_path)
    words = [word for word in command if "=" in word]
    gpus = int(place.on_gpu)
    plan = plans.make(recipes.load(recipe, words), Topology(gpus=gpus, processes=1, card="h200-141g" if gpus else None))
    assert (plan.effective_batch_size, plan.per_device_train_batch_size, plan.max_length) == (
        32, 4, beside.length_of(recipe),
    )  # fmt: skip
    assert bool(place.adapters) == (plan.method == "lora") and plan.fits in (True, None)


LOG = [
    (4.0, "INFO loading eval_dataset"),
    (10.0, "{'loss': 7.1, 'epoch': 0.1}"),
    (18.0, "{'loss': '6.0', 'epoch': 0.1}"),
    (28.0, "{'loss': 5.0}"),
    (29.5, "{'eval_loss': 5.5}"),
    (41.5, "{'loss': 4.0}"),
    (51.5, "{'loss': 3.0}"),
    (53.0, "{'eval_loss': 3.5}"),
]


def test_seconds_are_read_off_the_lines_of_a_log():
    """Ten a line of five steps, a half and a whole more behind an evaluation and its save."""
    assert beside.of_log(LOG) == {"first": 10.0, "step": 2.0, "evaluation": 1.5, "save": 2.0}
    ours = [
        (
            at,
            line.replace("{'loss': ", "step 5/20  epoch 0.1  loss ").replace("{'eval_loss': ", "step 5/20  eval_loss "),
        )
        for at, line in LOG
    ]
    assert beside.of_log(ours) == beside.of_log(LOG)


RUN = {
    "plan": {"parallelism": "ddp", "precision": "bf16", "packing": True, "max_length": 2048, "world_size": 2},
    "versions": {}, "step_seconds": 2.0, "quartiles": [1.9, 2.0, 2.1], "slots_per_second": 1100.0,
    "tokens_per_second": 1000.0, "supervised_tokens_per_second": 300.0,
    "operations_per_token": {"causal": 6e9, "PaLM": 8e9, "hardware": 8e9}, "peak_bytes": 2**30,
    "planned_bytes": 2**30, "host_bytes": 2**30, "first_step_seconds": 20.0, "data": "prepared anew", "seconds": 60.0,
}  # fmt: skip


def test_utilisation_is_operations_over_what_all_devices_can():
    row = bench.summary(
        [RUN, {**RUN, "step_seconds": 3.0, "tokens_per_second": 9.0, "first_step_seconds": 9.0, "data": "found"}, RUN],
        {"matrix product, measured": 10e12, "data sheet": 20e12},
    )
    assert row["mfu"]["causal, matrix product, measured"] == pytest.approx(1000 * 6e9 / 20e12)
    assert row["mfu"]["PaLM, data sheet"] == pytest.approx(1000 * 8e9 / 40e12)
    assert row["hfu"]["causal, data sheet"] == pytest.approx(1000 * 6e9 / 40e12 * 4 / 3)
    assert row["step_seconds"]["median"] == 2.0 and row["step_seconds"]["most"] == 3.0
    assert row["first_step_seconds"] == {"prepared anew": 20.0, "found": 9.0}


def test_the_page_is_what_the_results_files_say(tmp_path):
    """Made again from the committed files it is the same, text and drawings."""
    page, drawings = REPOSITORY / "benchmarks" / "README.md", REPOSITORY / "benchmarks" / "plots"
    before = {file: file.read_bytes() for file in (page, *drawings.glob("*.svg"))}
    assert len(before) > 3
    readme.main()
    assert {file: file.read_bytes() for file in before} == before


def test_a_failed_case_is_a_row_too():
    failed = {"rows": {"8b": {"failed": 1, "said": "CUDA out of memory"}}, "notes": {}, "left out": ["ms-swift"]}
    assert "failed: CUDA out of memory" in bench.table(failed)
    assert "failed: CUDA out of memory" in memory.table(failed)
    plots.throughput(Figure(), failed)
    of_a_peer = {"rounds": [{}], "failed": {"trl sft": "1: no module\nnamed x"}}
    row = beside._summary(of_a_peer, "trl sft")
    assert "failed: 1: no module named x |" in beside.table({**failed, "rows": {"trl sft": row}})


def test_a_run_is_measured_and_ended_behind_its_last_step(tmp_path):
    """As on a GPU, where its saves would take more disk and time than the measurement."""
    found = bench.measure(bench.Case("tiny", ("--gpus", "0")), tmp_path, "run")
    assert found["data"] == "prepared anew" and found["step_seconds"] > 0 and found["first_step_seconds"] > 1
    assert found["slots_per_second"] >= found["tokens_per_second"] > found["supervised_tokens_per_second"] > 0
    assert not (tmp_path / "run" / "final").exists() and not list((tmp_path / "run").glob("checkpoint-*"))
    assert not [one for one in psutil.Process().children(recursive=True) if "sft_recipes" in " ".join(one.cmdline())]


def test_what_cannot_be_measured_is_said_in_one_line(tmp_path):
    (tmp_path / "train.jsonl").touch()
    for words, said in (
        (["bench.py", "huge"], "no case 'huge' here"),
        (["memory.py", "huge"], "no case 'huge' here"),
        (["beside.py", "ms-swift"], "is not installed"),
        (["beside.py", "axolotl"], "is none of them"),
        (["beside.py", "--peers", tmp_path], "nothing is installed in"),
        (["beside.py", "--rows", tmp_path], "has no validation.jsonl"),
        (["beside.py", "--steps", "7"], "--steps: 7"),
        (["metrics.py", "--device", "cuda"], "no GPU that is known is here"),
        (["gpu.sh", "attention"], "no GPU that is known is here"),
    ):
        python = [] if words[0].endswith(".sh") else [sys.executable]
        command = [*python, REPOSITORY / "benchmarks" / words[0], *words[1:]]
        done = subprocess.run(command, env=HERE, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done


def test_the_pieces_for_a_gpu_are_all_of_these():
    command = [REPOSITORY / "benchmarks" / "gpu.sh", "--list"]
    done = subprocess.run(command, env=HERE, capture_output=True, text=True, check=True)
    named = [line.split()[0] for line in done.stdout.splitlines()]
    wanted = [*bench.cases(True), *memory.cases(True)]
    assert len(named) == len(set(named)) >= len(wanted) + 6
