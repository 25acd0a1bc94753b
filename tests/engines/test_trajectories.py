"""The same recipe, seed and data under every engine: the same training, step by step, and the same after a stop.

Twenty optimizer steps over two epochs of a prime number of rows of ragged lengths. Slow: `make test-engines`.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import HANG_SECONDS, compiler, manifest, metrics
from safetensors.torch import load_file

from sft_recipes.data import embedded

pytestmark = compiler

SEVERAL = ("ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2")
RECIPE = (
    "batch.effective_batch_size=8", "batch.per_device_at_most=2", "trainer.num_train_epochs=2", "trainer.max_length=128",
    "trainer.eval_steps=5", "trainer.save_steps=10", "trainer.logging_steps=1", "answers.show=0",
    "answers.exact_match=0", "size=tiny",
)  # fmt: skip
# Relative, of a step's loss. In fp32 the order of sums explains what is left; in bf16 the engines round at other places
# (bf16 weights under ZeRO, bf16 autocast of fp32 weights else). Measured: benchmarks/results/engines-2-cores.json.
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}
# Absolute, of a final weight; the learning rate is 2e-3 and the weights are about 0.08.
WEIGHT_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """83 conversations to train on unpacked, 304 that pack into 97 rows; 31 to validate on."""
    folder = tmp_path_factory.mktemp("data")
    rows = embedded.rows(600, held_out=False)
    random.Random(7).shuffle(rows)
    for name, part in (("few", rows[:83]), ("many", rows[100:404]), ("validation", rows[500:531])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@pytest.fixture(scope="module")
def follow(shared_workplace, data):
    """Trains under an engine and returns the run; the same one is trained once."""
    done: dict[str, Path] = {}

    def train(engine, processes, packing=False, precision="fp32", *more):
        more_words = hashlib.sha256(" ".join(more).encode()).hexdigest()[:8] if more else "plain"
        name = "-".join([engine, str(processes), "packed" if packing else "padded", precision, more_words])
        if name not in done:
            done[name] = shared_workplace.trained(*arguments(data, name, engine, processes, packing, precision), *more)
        return done[name]

    return train


def arguments(data, name, engine, processes, packing, precision):
    source = "many" if packing else "few"
    return [
        "tiny", "--name", name, "--gpus", "0", "--processes", str(processes), f"parallelism={engine}",
        f"precision={precision}", f"trainer.packing={str(packing).lower()}", f"data.train={data / source}.jsonl",
        f"data.validation={data / 'validation'}.jsonl", *RECIPE,
    ]  # fmt: skip


def differences(one, several):
    """The largest relative difference of a loss, of an eval_loss, and the largest absolute one of a final weight."""
    left, right = ([line for line in metrics(run) if "loss" in line or "eval_loss" in line] for run in (one, several))
    assert [line["step"] for line in left] == [line["step"] for line in right]
    found = {"loss": 0.0, "eval_loss": 0.0}
    for mine, theirs in zip(left, right, strict=True):
        assert mine["supervised_tokens_seen"] == theirs["supervised_tokens_seen"]
        assert mine.get("tokens_digest") == theirs.get("tokens_digest"), f"other rows at step {mine['step']}"
        for key in ("loss", "eval_loss"):
            if key in mine:
                found[key] = max(found[key], abs(theirs[key] - mine[key]) / abs(mine[key]))
    ours, theirs = (trained_weights(run / "last") for run in (one, several))
    for weights in (ours, theirs):  # a tied architecture's output layer, which DeepSpeed and FSDP2 write as well
        tied = weights.pop("lm_head.weight", None)
        assert tied is None or torch.equal(tied, weights["model.embed_tokens.weight"])
    assert ours.keys() == theirs.keys()
    found["weight"] = max((ours[name].float() - theirs[name].float()).abs().max().item() for name in ours)
    return found


def trained_weights(folder):
    adapters = folder / "adapter_model.safetensors"
    return load_file(adapters if adapters.is_file() else folder / "model.safetensors")


def record(**figures):
    """Keeps what was measured for the documentation, where ENGINES_REPORT names a file."""
    if os.environ.get("ENGINES_REPORT"):
        with Path(os.environ["ENGINES_REPORT"]).open("a") as lines:
            lines.write(json.dumps(figures) + "\n")


def check(reference, run, engine, processes, packing, precision):
    plan = json.loads((run / "plan.json").read_text())
    assert (plan["parallelism"], plan["world_size"]) == (engine, processes)
    assert manifest(run)["dtypes"].items() >= plan["dtypes"].items()
    found = differences(reference, run)
    record(engine=engine, processes=processes, packing=packing, precision=precision, **found)
    assert found["loss"] <= TOLERANCE[precision] and found["eval_loss"] <= TOLERANCE[precision], found
    assert found["weight"] <= WEIGHT_TOLERANCE[precision], found


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("engine", "processes"), [*((engine, 2) for engine in SEVERAL), ("ddp", 4)])
def test_every_engine_follows_one_process_in_fp32(follow, engine, processes, packing):
    check(follow("single", 1, packing), follow(engine, processes, packing), engine, processes, packing, "fp32")


@pytest.mark.parametrize("engine", SEVERAL)
def test_every_engine_follows_one_process_in_bf16(follow, engine):
    check(follow("single", 1, True, "bf16"), follow(engine, 2, True, "bf16"), engine, 2, True, "bf16")


def test_the_runs_are_what_they_are_meant_to_be(follow):
    for packing, rows in ((False, 83), (True, 97)):
        run = follow("single", 1, packing)
        plan = json.loads((run / "plan.json").read_text())
        assert plan["rows"] == rows, "prime, so that nothing divides it"
        assert plan["optimizer_steps"] == (24 if packing else 20) and plan["num_train_epochs"] == 2
        lines = [line for line in metrics(run) if "loss" in line]
        assert len({line["tokens_digest"] for line in lines}) == len(lines)
        assert lines[-1]["loss"] < lines[0]["loss"] - 1, "it learns, so that a wrong step would show"


def test_another_order_of_rows_is_found_out(follow):
    """The comparison can fail, and finds nothing between two runs of one plan."""
    again = follow("single", 1, False, "fp32", "trainer.data_seed=42")
    assert differences(follow("single", 1), again) == {"loss": 0.0, "eval_loss": 0.0, "weight": 0.0}
    other = follow("single", 1, False, "fp32", "trainer.data_seed=43")
    with pytest.raises(AssertionError):
        differences(follow("single", 1), other)
    digests = [{line["tokens_digest"] for line in metrics(run) if "loss" in line} for run in (again, other)]
    assert not digests[0] & digests[1]


@pytest.mark.parametrize(
    ("engine", "more"),
    [
        *((engine, ()) for engine in ("single", *SEVERAL)),
        *((engine, ("lora.r=4",)) for engine in ("ddp", "zero2", "zero3")),
    ],
)
def test_stopped_at_half_time_and_resumed_it_ends_as_if_it_had_gone_straight(
    shared_workplace, follow, data, engine, more
):
    """Stopped in the second epoch, so that the order of rows behind a resume is tried too; and saved every 10 steps."""
    processes = 1 if engine == "single" else 2
    straight = follow(engine, processes, False, "fp32", *more)
    name = f"stopped-{engine}{'-lora' if more else ''}"
    words = [*arguments(data, name, engine, processes, False, "fp32"), *more]
    run = shared_workplace.runs / name
    process = subprocess.Popen(
        [sys.executable, "-m", "sft_recipes", "train", *words], cwd=shared_workplace.path,
        env=shared_workplace.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    until = time.monotonic() + HANG_SECONDS
    while not ((run / "metrics.jsonl").is_file() and '"step": 12,' in (run / "metrics.jsonl").read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "hangs"
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=HANG_SECONDS)[0]
    assert process.returncode == 75, said
    stopped_at = manifest(run)["steps"]
    assert 12 <= stopped_at < 20
    done = shared_workplace.sft("train", *words)
    assert done.returncode == 0 and f"going on from checkpoint-{stopped_at}" in done.stdout, done.stdout + done.stderr
    # DeepSpeed's Adam on the CPU multiplies its bias correction up, and after a resume takes a power: the last bit differs.
    allowed = 1e-6 if engine == "zero3_offload" else 0.0
    assert max(differences(straight, run).values()) <= allowed
    assert manifest(run)["best_step"] == manifest(straight)["best_step"]
    ours, theirs = (trained_weights(folder / "final") for folder in (straight, run))
    assert all((ours[key] - theirs[key]).abs().max() <= allowed for key in ours)


@pytest.mark.parametrize("engine", SEVERAL)
def test_final_is_whole_and_holds_the_best_steps_weights(follow, engine):
    """In plain transformers: no tensor missing, none unexpected, each equal to what the engine had trained."""
    from transformers import AutoModelForCausalLM

    run = follow(engine, 2)
    model, loading = AutoModelForCausalLM.from_pretrained(run / "final", output_loading_info=True, dtype=torch.float32)
    assert not loading["missing_keys"] and not loading["mismatched_keys"]
    best = load_file(run / f"best-{manifest(run)['best_step']}" / "model.safetensors")
    loaded = model.state_dict()
    assert set(loaded) - {"lm_head.weight"} == set(best) - {"lm_head.weight"}
    assert all(torch.equal(loaded[key].float(), best[key].float()) for key in best)
    assert all(tensor.abs().sum() > 0 for name, tensor in best.items() if "weight" in name)


@pytest.mark.parametrize(
    ("engine", "quantize"), [*((engine, "") for engine in SEVERAL), ("ddp", "nf4"), ("zero2", "nf4")]
)
def test_adapters_train_alike_under_every_engine(follow, engine, quantize):
    """At twice this learning rate bf16's rounding grows to 6e-3 of a loss within the twenty steps."""
    more = (
        "lora.r=4", "trainer.learning_rate=5e-3", f"lora.quantize={quantize}", "trainer.gradient_checkpointing=true",
        "model.architecture={model_type: llama, hidden_size: 128, intermediate_size: 256, num_hidden_layers: 2, "
        "num_attention_heads: 2, vocab_size: 1024, max_position_embeddings: 512, initializer_range: 0.08}",
    )  # fmt: skip
    one, several = follow("single", 1, False, "bf16", *more), follow(engine, 2, False, "bf16", *more)
    left, right = ([line for line in metrics(run) if "loss" in line] for run in (one, several))
    for mine, theirs in zip(left, right, strict=True):
        assert mine["tokens_digest"] == theirs["tokens_digest"]
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=TOLERANCE["bf16"])
    assert left[-1]["loss"] < left[0]["loss"] - 0.5, "adapters that learn nothing would agree too"
    adapters = load_file(several / "final" / "adapter_model.safetensors")
    assert len(adapters) == 2 * 7 * 2 and all(tensor.abs().sum() > 0 for tensor in adapters.values())
    assert manifest(several)["dtypes"]["frozen"] == (quantize or "bf16")
