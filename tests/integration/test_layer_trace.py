"""Forecasts of models without a closed form: their layers are traced in a process, on fake tensors.

Run as a program, this file regenerates the traces of the recipes (sft_recipes/config/traced_layers.json).
"""

import json
import sys

import pytest
from helpers.traced_architectures import save_untrained
from helpers.workplace import Workplace

from sft_recipes.config import architecture as architectures
from sft_recipes.config import loader, traced_layers
from sft_recipes.config.schema import Lora
from sft_recipes.data import model_trace
from sft_recipes.planner import memory


def traced_recipes():
    found = {name: dict(loader.load(name).model.architecture) for name in loader.names()}
    return {name: value for name, value in found.items() if not architectures.is_dense(value)}


def test_trace_equals_the_closed_form(tmp_path, monkeypatch):
    """Bytes that a layer keeps, in the modes of the forecast; 16-bit weights keep 2 to 4% more than the closed form."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    dense = {**loader.load("8b").model.architecture, "num_hidden_layers": 2}
    assert model_trace.trace(dense, (*memory.trace_modes("bf16", None), *memory.trace_modes("fp32", None))) is None
    for strategy, precision, lora, tolerance in (
        ("ddp", "fp32", None, 0.02), ("ddp", "bf16", None, 0.02), ("zero2", "bf16", None, 0.05),
        ("fsdp2", "bf16", None, 0.05), ("ddp", "bf16", Lora(), 0.03), ("ddp", "fp32", Lora(), 0.02),
    ):  # fmt: skip
        inputs = (dense, strategy, precision, 8, 4096, False)
        closed = memory.MemoryInputs(*inputs, lora=lora)
        with monkeypatch.context() as patched:
            patched.setattr(memory, "find_trace", traced_layers.find)
            traced = memory.MemoryInputs(*inputs, lora=lora)
        ours, theirs = closed.decoder[0], traced.decoder[0]
        assert theirs.kept == pytest.approx(ours.kept, rel=tolerance), (strategy, precision)
        total = ours.kept + ours.temporary
        assert theirs.kept + theirs.temporary == pytest.approx(total, rel=0.05), (strategy, precision)
        assert (theirs.active, theirs.queries) == (ours.active, ours.queries)


def test_shipped_traces_are_those_of_this_code(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    shipped = json.loads(traced_layers.SHIPPED.read_text())
    assert shipped.keys() == {traced_layers.key_of(each) for each in traced_recipes().values()}
    for each in {traced_layers.key_of(each): each for each in traced_recipes().values()}.values():
        assert model_trace.trace(each, shipped[traced_layers.key_of(each)]["modes"]) is None
        assert json.loads(traced_layers.cache_file(each).read_text()) == shipped[traced_layers.key_of(each)]


def test_plan_traces_once_what_its_method_and_precision_need(tmp_path):
    folder, _ = save_untrained("mixtral", tmp_path)
    place = Workplace(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 50)

    def plan(method, *more):
        done = place.sft("plan", "--model", str(folder), "--method", method, f"data.train={rows}", *more)
        assert done.returncode == 0, done.stderr
        traced = "tracing the layers of" in done.stderr
        assert traced or not done.stderr
        return done.stdout, traced, "GiB" in done.stdout

    on_cpu, on_gpus = ("--gpus", "0"), ("--gpus", "8", "--gpu-type", "h100-80g")
    assert plan("full", *on_cpu)[1:] == (False, False)
    first, *traced = plan("full", *on_gpus)
    assert traced == [True, True] and plan("full", *on_gpus) == (first, False, True)
    assert "from a trace of the layers on fake tensors, assuming varlen attention, grouped experts" in first
    assert plan("lora", *on_gpus)[1:] == (False, True), "traced for the suggestion of adapters"
    assert plan("lora", *on_gpus, "lora.experts=true")[1:] == (True, True)
    assert plan("full", *on_cpu, "precision=fp32")[1:] == (False, False), "no forecast from another precision"
    assert plan("full", *on_gpus, "precision=fp32")[1:] == (True, True)
    assert plan("full", *on_gpus)[1:] == plan("lora", *on_gpus, "lora.experts=true")[1:] == (False, True), "kept"


def test_model_that_cannot_be_traced_is_planned_without_a_forecast(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    unknown = {"model_type": "no_such_type", "hidden_size": 64}
    assert "no_such_type" in model_trace.trace(unknown, ["bf16"])
    assert architectures.parameter_count(unknown) is None and not model_trace.needs_trace(unknown, ["bf16"])


if __name__ == "__main__":
    from sft_recipes.training import layer_trace

    content = {traced_layers.key_of(each): layer_trace.trace(each) for each in traced_recipes().values()}
    traced_layers.SHIPPED.write_text(json.dumps(content, sort_keys=True) + "\n")
    sys.exit()
