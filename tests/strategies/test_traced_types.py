"""Every kind of decoder gets a forecast from the folder of a model: minutes, since some trace layers that loop over tokens."""

import json

import pytest
from helpers.traced_architectures import TRACED, save_untrained

from sft_recipes.config import architecture as architectures
from sft_recipes.config import loader
from sft_recipes.data import model_files, model_trace
from sft_recipes.planner import memory
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Topology


@pytest.mark.parametrize("kind", TRACED)
def test_model_types_get_a_forecast_from_their_folder(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    folder, model = save_untrained(kind, tmp_path)
    facts = model_files.describe_model(str(folder))
    modes = memory.trace_modes("bf16", None)
    assert model_trace.needs_trace(facts.architecture, modes)
    assert model_trace.trace(facts.architecture, modes) is None
    assert not model_trace.needs_trace(facts.architecture, modes)
    assert architectures.parameter_count(facts.architecture) == model.num_parameters()
    overrides = (f"model.architecture={json.dumps(facts.architecture)}", "size=1-3b", "trainer.packing=false")
    plan = plans.resolve(loader.load("8b", overrides), Topology(8, 8, gpu_type="h100-80g"))
    assert plan.fits and plan.step_seconds and plan.parameters == model.num_parameters()
    load = plans.memory_inputs(plan, facts.architecture)
    experts = sum(weight.numel() for weight in model.parameters() if weight.ndim == 3 and weight.shape[1] > 1)
    in_layers, active = (sum(getattr(each, key) for each in load.decoder) for key in ("weights", "active"))
    assert active == pytest.approx(in_layers - experts * 3 / 4, rel=0.2), "two of eight experts are used"
