"""Scripts in benchmarks/: their cases are valid plans, and README and plots follow from the results files."""

import json
import os
import re
import shutil
import subprocess
import sys

import psutil
import pytest
from helpers import svg
from helpers.workplace import REPOSITORY, SMALL_ARCHITECTURE

from sft_recipes.config import gpu_types, loader
from sft_recipes.planner import cost
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Topology

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import bench
import comparison
import first_run
import memory
import plots
import published
import readme
from matplotlib.figure import Figure as Canvas  # language: ok

HERE = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
ON_A_GPU = {
    f"{script.__name__}: {name}": case
    for script, cases in ((bench, bench.cases(True)), (bench, bench.ablations(True)), (memory, memory.cases(True)))
    for name, case in cases.items()
}


def test_gpu_cases_are_complete():
    assert len(memory.cases(True)) >= 12 and len(bench.cases(True)) == 22 and len(ON_A_GPU) > 40


@pytest.mark.parametrize("name", ON_A_GPU)
def test_gpu_case_is_a_valid_plan(name):
    """Whether it fits is measured by the run."""
    case = ON_A_GPU[name]
    plan = plans.resolve(loader.load(case.recipe, case.words), Topology(gpus=1, processes=1, gpu_type="h200-141g"))
    assert plan.memory_bytes_per_gpu["total"] > 2**30
    assert plan.fits or "checkpointing" not in name, "rejected before it starts"
    tokens = plan.effective_batch_size * plan.max_length
    attended = 2 * bench.MEAN_TOKENS  # the mean over tokens of an example's length, as they are drawn
    flops = cost.flops_per_token(plans.memory_inputs(plan, plan.sections.model.architecture), attended)
    steps = bench.STEPS if name.startswith("bench") else memory.STEPS
    slow_flops = 0.25 * gpu_types.peak_flops("h200-141g")
    assert steps * tokens * flops.model / slow_flops < 530 - 180, "a piece of gpu.sh is terminated, with 180 s to start"


def test_generated_rows_have_the_lengths_of_the_recipes(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "ROWS", tmp_path)
    bench.write_rows()
    rows = [json.loads(line)["messages"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    lengths = sorted(sum(len(turn["content"].split()) for turn in turns) for turns in rows)
    assert len(rows) == 6000 and sum(lengths) / len(rows) == pytest.approx(loader.load("8b").data.mean_tokens, rel=0.05)
    assert lengths[int(0.95 * len(rows))] == pytest.approx(4 * lengths[len(rows) // 2], rel=0.1)


def test_each_ablation_changes_one_option():
    for on_gpu in (False, True):
        changed = bench.ablations(on_gpu)
        default = changed.pop(bench.DEFAULT)
        for name, case in changed.items():
            assert case != default and case.recipe == default.recipe, name
            loader.load(case.recipe, case.words)


@pytest.mark.parametrize("recipe", ["tiny", "1b", "8b-lora"])
def test_comparison_job_is_a_valid_plan(recipe, tmp_path):
    job = comparison.Job(recipe, tmp_path, tmp_path, 40, 13)
    command = comparison._ours(job, tmp_path)
    overrides = [argument for argument in command if "=" in argument]
    gpus = int(job.on_gpu)
    plan = plans.resolve(
        loader.load(recipe, overrides), Topology(gpus=gpus, processes=1, gpu_type="h200-141g" if gpus else None)
    )
    assert (plan.effective_batch_size, plan.per_device_train_batch_size, plan.max_length) == (
        32, 4, comparison.length_of(recipe),
    )  # fmt: skip
    assert bool(job.adapters) == (plan.method == "lora") and plan.fits in (True, None)


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


def test_comparison_reads_seconds_from_log_lines():
    """Ten seconds per line of five steps, 0.5 and 1 more after an evaluation and its save."""
    assert comparison.of_log(LOG) == {"first": 10.0, "step": 2.0, "evaluation": 1.5, "save": 2.0}
    ours = [
        (
            at,
            line.replace("{'loss': ", "step 5/20  epoch 0.1  loss ").replace("{'eval_loss': ", "step 5/20  eval_loss "),
        )
        for at, line in LOG
    ]
    assert comparison.of_log(ours) == comparison.of_log(LOG)


RUN = {
    "plan": {"parallelism": "ddp", "precision": "bf16", "packing": True, "max_length": 2048, "world_size": 2},
    "versions": {}, "step_seconds": 2.0, "quartiles": [1.9, 2.0, 2.1], "padded_tokens_per_second": 1100.0,
    "tokens_per_second": 1000.0, "supervised_tokens_per_second": 300.0,
    "operations_per_token": {"causal": 6e9, "PaLM": 8e9, "hardware": 8e9}, "peak_bytes": 2**30,
    "planned_bytes": 2**30, "host_bytes": 2**30, "first_step_seconds": 20.0, "data": bench.PREPARED, "seconds": 60.0,
}  # fmt: skip


def test_utilization_is_flops_over_peak_of_all_devices():
    row = bench.summary(
        [
            RUN,
            {**RUN, "step_seconds": 3.0, "tokens_per_second": 9.0, "first_step_seconds": 9.0, "data": bench.CACHED},
            RUN,
        ],
        {"matrix product, measured": 10e12, "data sheet": 20e12},
    )
    assert row["mfu"]["causal, matrix product, measured"] == pytest.approx(1000 * 6e9 / 20e12)
    assert row["mfu"]["PaLM, data sheet"] == pytest.approx(1000 * 8e9 / 40e12)
    assert row["hfu"]["causal, data sheet"] == pytest.approx(1000 * 6e9 / 40e12 * 4 / 3)
    assert row["step_seconds"]["median"] == 2.0 and row["step_seconds"]["most"] == 3.0
    assert row["first_step_seconds"] == {bench.PREPARED: 20.0, bench.CACHED: 9.0}


def test_readme_and_plots_match_the_results_files():
    """Tables as text; of the plots their texts, curves, bars and numbers of points."""
    page, folder = REPOSITORY / "benchmarks" / "README.md", REPOSITORY / "benchmarks" / "plots"
    before = {path: path.read_bytes() for path in (page, *folder.iterdir())}
    plots_before = {path: (svg.texts(path), svg.shapes(path)) for path in folder.glob("*.svg")}
    assert len(plots_before) >= 5 and all(texts and shapes for texts, shapes in plots_before.values())
    try:
        readme.main()
        assert page.read_text() == before[page].decode()
        assert {path: (svg.texts(path), svg.shapes(path)) for path in folder.glob("*.svg")} == plots_before
    finally:  # another version of matplotlib writes other bytes
        for path, content in before.items():
            path.write_bytes(content)


@pytest.mark.parametrize(
    "row", [row for row in published.ROWS if row.source == published._TRL], ids=lambda row: row.model
)
def test_forecast_is_close_to_peaks_published_by_trl(row):
    """TRL's trainer with its chunked loss: at most 7% above the forecast, and within the reserve."""
    parts = row.planned
    published_bytes = row.gib * 2**30
    assert parts["total"] <= published_bytes <= 1.07 * parts["total"]
    assert published_bytes <= parts["total"] + parts["reserve"]


def test_published_row_far_from_the_forecast_has_a_reason():
    for row in published.ROWS:
        if not 0.9 <= row.gib * 2**30 / row.planned["total"] <= 1.1:
            assert "logits of all tokens" in row.differs, row


def test_failed_case_is_a_row():
    failed = {"rows": {"8b": {"failed": 1, "said": "CUDA out of memory"}}, "notes": {}, "left out": ["ms-swift"]}
    assert "failed: CUDA out of memory" in bench.table(failed)
    assert "failed: CUDA out of memory" in memory.table(failed)
    plots.throughput(Canvas(), failed)
    of_a_baseline = {"rounds": [{}], "failed": {"trl sft": "1: no module\nnamed x"}}
    row = comparison._summary(of_a_baseline, "trl sft")
    assert "failed: 1: no module named x |" in comparison.table({**failed, "rows": {"trl sft": row}})


def test_bench_terminates_the_run_after_its_last_step(tmp_path, few_rows):
    """As on a GPU, where saves take more disk and time than the measurement."""
    words = (SMALL_ARCHITECTURE, f"data.train={few_rows}", "trainer.max_length=128")
    result = bench.measure(bench.Case("tiny", ("--gpus", "0"), words), tmp_path, "run")
    assert result["data"] == bench.PREPARED and result["step_seconds"] > 0 and result["first_step_seconds"] > 0
    assert (
        result["padded_tokens_per_second"] >= result["tokens_per_second"] > result["supervised_tokens_per_second"] > 0
    )
    assert not (tmp_path / "run" / "final").exists() and not list((tmp_path / "run").glob("checkpoint-*"))
    children = psutil.Process().children(recursive=True)
    assert not [child for child in children if "sft_recipes" in " ".join(child.cmdline())]


def test_invalid_arguments_are_rejected_in_one_line(tmp_path):
    (tmp_path / "train.jsonl").touch()
    for arguments, message in (
        (["bench.py", "huge"], "unknown case: found 'huge'"),
        (["memory.py", "huge"], "unknown case: found 'huge'"),
        (["comparison.py", "ms-swift"], "is not installed"),
        (["comparison.py", "axolotl"], "is unknown"),
        (["comparison.py", "--baselines", tmp_path], "nothing is installed in"),
        (["comparison.py", "--rows", tmp_path], "has no validation.jsonl"),
        (["comparison.py", "--steps", "7"], "--steps: found 7"),
        (["metrics.py", "--device", "cuda"], "no supported GPU found"),
        (["gpu.sh", "attention"], "gpu.sh: found no GPU"),
    ):
        python = [] if arguments[0].endswith(".sh") else [sys.executable]
        command = [*python, REPOSITORY / "benchmarks" / arguments[0], *arguments[1:]]
        done = subprocess.run(command, env=HERE, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done


def listed(script=REPOSITORY / "benchmarks" / "gpu.sh", **variables):
    """Name, question and state of each piece, in order."""
    done = subprocess.run([script, "--list"], env={**HERE, **variables}, capture_output=True, text=True, check=True)
    return [re.fullmatch(r"(\S+)\s+(.*\?)\s+(.+)", line).groups() for line in done.stdout.splitlines()]


def test_gpu_script_has_a_piece_per_case():
    named = [name for name, _, _ in listed()]
    cases = [*bench.cases(True), *bench.ablations(True), *memory.cases(True)]
    assert len(named) == len(set(named)) >= len(cases) + 6


def test_gpu_script_orders_pieces_by_information():
    """First what rejects the machine, then one row of each table, then the other rows, then repeats."""
    rows = listed()
    named = [name for name, _, _ in rows]
    assert named[:6] == [
        "doctor", "attention", "smoke", "first-run", "memory-1b__4k__checkpointing", "bench-1b__4k",
    ]  # fmt: skip
    order = (
        "bench-8b-lora__4k",
        "bench-8b__4k",
        "ablation-as_shipped",
        "comparison-1b-sft-recipes",
        "bench-1b__2k",
        "bench-2-1b__2k",
    )
    places = [named.index(name) for name in order]
    assert places == sorted(places)
    assert all(question.endswith("?") for _, question, _ in rows)


def test_first_run_on_a_gpu_is_a_valid_plan():
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
    """A checkout on a machine with a GPU, whose Python prints what it would run."""
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


def test_gpu_script_runs_pieces_in_order_and_lists_their_state(checkout):
    script, python = checkout / "benchmarks" / "gpu.sh", f"{checkout}/bin/a python"
    variables = {
        "PYTHON": python, "PATH": f"{checkout}/bin:{os.environ['PATH']}", "PYTHONPATH": "/carried/packages",
        "CUDA_VISIBLE_DEVICES": "0",
    }  # fmt: skip

    def run(*arguments):
        return subprocess.run(
            [script, *arguments], env={**HERE, **variables}, capture_output=True, text=True, check=False
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
    assert "ran: benchmarks/first_run.py" in run("1").stdout, "a failed piece is repeated only by its name"
    assert "ran: benchmarks/attention.py" in run("attention").stdout
    assert "ran: benchmarks/memory.py 1b, 4k, checkpointing with" in run("memory-1b__4k__checkpointing").stdout
