"""The smoke test's judgement, and the workflows that call it; tests/container/ runs it in the image."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import pytest
import yaml
from helpers.workplace import REPOSITORY

from sft_recipes.training import attention, torch_probe

DOCKER = REPOSITORY / "docker"


@pytest.fixture(scope="module")
def smoke():
    described = importlib.util.spec_from_file_location("smoke", DOCKER / "smoke.py")
    module = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
    return module


def run_of(folder, golden, weights=b"w", gpus=0, **changed):
    """A run's folder with these losses."""
    (folder / "last").mkdir(parents=True)
    lines = []
    for key, value in {**golden, **changed}.items():
        kind, step = key.split()
        if value is not None:
            lines.append(json.dumps({"step": int(step), kind: value}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "plan.json").write_text(json.dumps({"gpus": gpus}))
    (folder / "last" / "model.safetensors").write_bytes(weights)
    return folder


@pytest.fixture(scope="module")
def golden():
    return json.loads((DOCKER / "golden.json").read_text())


def test_the_golden_run_learns(golden):
    losses = [golden[f"loss {step}"] for step in range(1, 21)]
    assert losses[0] == pytest.approx(math.log(1024), abs=1) and losses[-1] < 0.5 * losses[0]
    assert golden["eval_loss 20"] < golden["eval_loss 10"]


def test_a_run_like_the_golden_one_passes(smoke, golden, tmp_path):
    run = run_of(tmp_path / "run", golden, **{"loss 20": golden["loss 20"] * 1.01})
    assert "at most 1.0e-02 off" in smoke.compare(run, DOCKER / "golden.json")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"loss 3": 9.0}, "loss 3: 9.0000 and not"),
        ({"eval_loss 20": 2.9}, "eval_loss 20: 2.9000"),
        ({"loss 7": math.nan}, "are allowed"),
        ({"loss 20": None}, "not measured: loss 20"),
        ({"eval_loss 10": None}, "not measured: eval_loss 10"),
    ],
)
def test_another_training_fails(smoke, golden, tmp_path, changed, says):
    with pytest.raises(SystemExit, match=re.escape(says)):
        smoke.compare(run_of(tmp_path / "run", golden, **changed), DOCKER / "golden.json")


def test_what_is_gone_on_with_must_end_alike(smoke, golden, tmp_path):
    straight = run_of(tmp_path / "straight", golden)
    assert "to the bit" in smoke.same(run_of(tmp_path / "equal", golden), straight)
    with pytest.raises(SystemExit, match="ends with other weights"):
        smoke.same(run_of(tmp_path / "other", golden, weights=b"v"), straight)
    on_gpu = run_of(tmp_path / "gpu", golden, weights=b"v", gpus=1)
    assert "the last loss 0.0e+00 off" in smoke.same(on_gpu, straight), "a GPU's sums have no fixed order"
    with pytest.raises(SystemExit):
        smoke.same(run_of(tmp_path / "far", golden, weights=b"v", gpus=1, **{"loss 20": 9.0}), straight)


NO_KERNEL = "CUDA error: no kernel image is available for execution on the device"


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of compute capability 12.0, by what torch reports of it; kernels are tried on the CPU in its place."""
    tried = attention.errors
    monkeypatch.setattr(attention, "errors", lambda kernel, device, dtype, width=64: tried(kernel, "cpu", dtype, width))

    def with_flash_attention(looked, **ways):
        monkeypatch.setattr(torch_probe, "look", lambda: {"flash_attention": looked, "gpus": [{"capability": "12.0"}]})
        for name, kernel in ways.items():
            monkeypatch.setattr(attention, name, kernel)

    return with_flash_attention


def fails(error):
    def kernel(*arguments):
        raise RuntimeError(error)

    return kernel


def test_a_gpu_without_a_flash_attention_kernel_falls_back_and_says_so(smoke, gpu):
    gpu({"error": NO_KERNEL}, flash=fails(NO_KERNEL))
    said = smoke.attention()
    assert "no kernel for compute capability 12.0" in said
    assert f"falling back to varlen (no flash_attention_2: {NO_KERNEL}" in said


def test_where_no_kernel_is_right_it_falls_back_to_torchs_masked_attention(smoke, gpu):
    gpu({"error": NO_KERNEL}, flash=fails(NO_KERNEL), varlen=fails("CUDA error: invalid device function"))
    assert "falling back to sdpa (no flash_attention_2: " in smoke.attention()


def test_an_image_built_without_flash_attention_falls_back(smoke, gpu):
    gpu({"missing": "flash_attn is not installed"})
    assert "falling back to varlen (no flash_attention_2: flash_attn is not installed" in smoke.attention()


@pytest.mark.parametrize(
    ("looked", "says"),
    [
        ({"forward": 0.5, "backward": 0.5, "tolerance": 3e-2}, "off by 5.0e-01 forward"),
        ({"error": "undefined symbol: _ZNK3c106SymInt6sym_neERKS0_"}, "undefined symbol"),
    ],
)
def test_a_flash_attention_that_is_wrong_or_does_not_load_fails(smoke, gpu, looked, says):
    gpu(looked)
    with pytest.raises(SystemExit, match=says):
        smoke.attention()


def test_what_smoke_py_is_called_with_exists(smoke):
    """On a GPU a name that is missing is found after the image was built for an hour."""
    called = re.findall(r'smoke\.py" (\w+)', (DOCKER / "smoke.sh").read_text())
    assert {"compare", "same", "attention", "summary"} <= set(called)
    assert all(callable(getattr(smoke, name)) for name in called)


def test_the_summary_is_one_object_wherever_it_is_asked_for(tmp_path):
    """As smoke.sh asks for it: outside of an image, the package is not on Python's path."""
    (tmp_path / "steps").write_text("a\t0\t3\tsaid\twell\nb\t1\t2\t\n")
    words = [sys.executable, str(DOCKER / "smoke.py"), "summary", str(tmp_path / "steps")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert not told["passed"] and told["steps"][0] == {"name": "a", "exit_code": 0, "seconds": 3, "said": "said\twell"}


@pytest.mark.parametrize(
    ("word", "says"), [("--gpu", "unknown argument --gpu"), (None, "no GPU here"), ("--no-container", "no GPU here")]
)
def test_the_smoke_test_is_not_begun_where_it_cannot_be(word, says):
    words = ["bash", str(DOCKER / "smoke.sh"), *([word] if word else [])]
    done = subprocess.run(words, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and says in done.stderr


@pytest.mark.parametrize("name", ["ci", "gpu", "cuda-build"])
def test_workflows_pin_what_they_use_and_may_read_alone(name):
    text = (REPOSITORY / ".github" / "workflows" / f"{name}.yml").read_text()
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    used = [step["uses"] for job in workflow["jobs"].values() for step in job["steps"] if "uses" in step]
    assert used and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", one) for one in used)
    assert "secrets." not in text and "pull_request_target" not in text
    assert name == "ci" or "pull_request" not in workflow[True], "no stranger's code on a machine of one's own"
    assert all(job["timeout-minutes"] for job in workflow["jobs"].values())
