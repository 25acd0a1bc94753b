"""The scripts below benchmarks/: what they would run is a plan, and what they write follows from what they read."""

import json
import os
import re
import shutil
import subprocess
import sys

import psutil
import pytest
from helpers.workplace import REPOSITORY

from sft_recipes.config import gpu_types, loader
from sft_recipes.planner import cost
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Topology

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import bench
import beside
import first_run
import memory
import plots
import published
import readme
from matplotlib.figure import Figure

HERE = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
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
    plan = plans.resolve(loader.load(case.recipe, case.words), Topology(gpus=1, processes=1, gpu_type="h200-141g"))
    assert plan.memory_bytes_per_gpu["total"] > 2**30
    assert plan.fits or "checkpointing" not in name, "refused before it starts"
    tokens = plan.effective_batch_size * plan.max_length
    attended = 2 * bench.MEAN_TOKENS  # the mean over tokens of an example's length, as they are drawn
    flops = cost.flops_per_token(plans.memory_inputs(plan, plan.sections.model.architecture), attended)
    steps = bench.STEPS if name.startswith("bench") else memory.STEPS
    slowly = 0.25 * gpu_types.peak_flops("h200-141g")
    assert steps * tokens * flops.model / slowly < 530 - 180, "a piece of gpu.sh is cut off, with 180 s to begin in"


def test_rows_for_a_gpu_are_as_long_as_the_recipes_say(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "ROWS", tmp_path)
    bench.write_rows()
    rows = [json.loads(line)["messages"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    lengths = sorted(sum(len(turn["content"].split()) for turn in turns) for turns in rows)
    assert len(rows) == 6000 and sum(lengths) / len(rows) == pytest.approx(loader.load("8b").data.mean_tokens, rel=0.05)
    assert lengths[int(0.95 * len(rows))] == pytest.approx(4 * lengths[len(rows) // 2], rel=0.1)


def test_every_knob_is_turned_by_itself():
    for on_gpu in (False, True):
        turned = bench.ablations(on_gpu)
        default = turned.pop(bench.DEFAULT)
        for name, case in turned.items():
            assert case.words != default.words and case.recipe == default.recipe, name
            loader.load(case.recipe, case.words)


@pytest.mark.parametrize("recipe", ["tiny", "1b", "8b-lora"])
def test_what_is_trained_beside_others_is_a_plan(recipe, tmp_path):
    """The words that are said on a GPU are right before there is one."""
    place = beside.Place(recipe, tmp_path, tmp_path, 40, 13)
    command = beside._ours(place, tmp_path)
    words = [word for word in command if "=" in word]
    gpus = int(place.on_gpu)
    plan = plans.resolve(
        loader.load(recipe, words), Topology(gpus=gpus, processes=1, gpu_type="h200-141g" if gpus else None)
    )
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
    "versions": {}, "step_seconds": 2.0, "quartiles": [1.9, 2.0, 2.1], "padded_tokens_per_second": 1100.0,
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


@pytest.mark.parametrize(
    "row", [row for row in published.ROWS if row.source == published._TRL], ids=lambda row: row.model
)
def test_the_plan_is_near_what_trl_published_of_the_same_software(row):
    """Peaks of TRL's own trainer with its chunked loss: within 7% above the forecast, and within the reserve."""
    parts = row.planned
    published_bytes = row.gib * 2**30
    assert parts["total"] <= published_bytes <= 1.07 * parts["total"]
    assert published_bytes <= parts["total"] + parts["reserve"]


def test_a_published_row_far_from_the_plan_says_what_differs():
    for row in published.ROWS:
        if not 0.9 <= row.gib * 2**30 / row.planned["total"] <= 1.1:
            assert "logits of all tokens" in row.differs, row


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
    assert found["padded_tokens_per_second"] >= found["tokens_per_second"] > found["supervised_tokens_per_second"] > 0
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
        (["gpu.sh", "attention"], "gpu.sh: found no GPU"),
    ):
        python = [] if words[0].endswith(".sh") else [sys.executable]
        command = [*python, REPOSITORY / "benchmarks" / words[0], *words[1:]]
        done = subprocess.run(command, env=HERE, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done


def listed(script=REPOSITORY / "benchmarks" / "gpu.sh", **variables):
    """Name, question and state of each piece, in order."""
    done = subprocess.run([script, "--list"], env={**HERE, **variables}, capture_output=True, text=True, check=True)
    return [re.fullmatch(r"(\S+)\s+(.*\?)\s+(.+)", line).groups() for line in done.stdout.splitlines()]


def test_the_pieces_for_a_gpu_are_all_of_these():
    named = [name for name, _, _ in listed()]
    wanted = [*bench.cases(True), *bench.ablations(True), *memory.cases(True)]
    assert len(named) == len(set(named)) >= len(wanted) + 6


def test_the_most_informative_pieces_for_a_gpu_come_first():
    """What rejects the machine or the project, then one row of each table, then the rest of the tables, then repeats."""
    rows = listed()
    named = [name for name, _, _ in rows]
    assert named[:6] == [
        "doctor", "attention", "smoke", "first-run", "memory-1b__4k__checkpointing", "bench-1b__4k",
    ]  # fmt: skip
    order = (
        "bench-8b-lora__4k",
        "bench-8b__4k",
        "ablation-as_shipped",
        "beside-1b-sft-recipes",
        "bench-1b__2k",
        "bench-2-1b__2k",
    )
    places = [named.index(name) for name in order]
    assert places == sorted(places)
    assert all(question.endswith("?") for _, question, _ in rows)


def test_the_first_run_on_a_gpu_can_be_planned_there():
    case = first_run.case(True)
    for gpu_type in ("h100-80g", "h200-141g"):
        plan = plans.resolve(loader.load(case.recipe, case.words), Topology(gpus=1, processes=1, gpu_type=gpu_type))
        assert plan.fits and plan.world_size == 1


PROGRAM = """#!/bin/sh
case "$*" in
    "-c import sys"* | "- "*) exec {python} "$@" ;;
esac
echo "ran: $* with $PYTHONPATH"
case "$*" in *attention.py*) exit 3 ;; esac
"""
SMI = """#!/bin/sh
case "$*" in
    *index,memory.total,name*) echo "0, 143771, NVIDIA H200" ;;
    *index,compute_cap*) echo "0, 9.0" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout on a machine with a GPU, whose Python records what it is to run."""
    (tmp_path / "benchmarks").mkdir()
    for name in ("sft_recipes", "recipes", "accelerate_configs", "deepspeed_configs", "requirements"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    for file in (REPOSITORY / "benchmarks").glob("*.*"):
        if file.suffix in (".py", ".sh"):
            (tmp_path / "benchmarks" / file.name).symlink_to(file)
    (tmp_path / "benchmarks" / "gpu.sh").unlink()
    shutil.copy(REPOSITORY / "benchmarks" / "gpu.sh", tmp_path / "benchmarks")
    program = PROGRAM.format(python=sys.executable)
    smoke = '#!/bin/sh\necho "smoke: $* by $PYTHON"\n'
    for name, text in (("bin/a python", program), ("bin/nvidia-smi", SMI), ("docker/smoke.sh", smoke)):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
    return tmp_path


def test_the_next_pieces_run_in_order_and_their_state_is_listed(checkout):
    script, python = checkout / "benchmarks" / "gpu.sh", f"{checkout}/bin/a python"
    variables = {
        "PYTHON": python, "PATH": f"{checkout}/bin:{os.environ['PATH']}", "PYTHONPATH": "/carried/packages",
        "CUDA_VISIBLE_DEVICES": "0",
    }  # fmt: skip

    def run(*words):
        return subprocess.run(
            [script, *words], env={**HERE, **variables}, capture_output=True, text=True, check=False
        )  # fmt: skip

    done = run("3")
    assert done.returncode == 1, "attention failed"
    assert [line for line in done.stdout.splitlines() if ": " in line and "==" not in line] == [
        "ran: -m sft_recipes doctor --gpus 1 with .:/carried/packages",
        "ran: benchmarks/attention.py with .:/carried/packages",
        f"smoke: --no-container by {python}",
    ]
    states = {name: state for name, _, state in listed(script, **variables)}
    assert states["doctor"].startswith("exit code 0 after ") and states["attention"].startswith("exit code 3 after ")
    assert states["first-run"] == "not done"
    assert "ran: benchmarks/first_run.py" in run("1").stdout, "what failed is tried again by its name alone"
    assert "ran: benchmarks/attention.py" in run("attention").stdout
    assert "ran: benchmarks/memory.py 1b, 4k, checkpointing with" in run("memory-1b__4k__checkpointing").stdout
