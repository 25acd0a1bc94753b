"""The smoke test's comparisons, and the workflows that run it; tests/container/ runs it in the image."""

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
    spec = importlib.util.spec_from_file_location("smoke", DOCKER / "smoke.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_run(folder, golden, weights=b"w", gpus=0, **changed):
    """Create a run folder with these losses."""
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


def test_golden_losses_fall(golden):
    losses = [golden[f"loss {step}"] for step in range(1, 21)]
    assert losses[0] == pytest.approx(math.log(1024), abs=1) and losses[-1] < 0.5 * losses[0]
    assert golden["eval_loss 20"] < golden["eval_loss 10"]


def test_compare_accepts_small_differences(smoke, golden, tmp_path):
    run = make_run(tmp_path / "run", golden, **{"loss 20": golden["loss 20"] * 1.01})
    assert "at most 1.0e-02 from golden" in smoke.compare(run, DOCKER / "golden.json")


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"loss 3": 9.0}, "loss 3: found 9.0000"),
        ({"eval_loss 20": 2.9}, "eval_loss 20: found 2.9000"),
        ({"loss 7": math.nan}, "within 2e-02"),
        ({"loss 20": None}, "not measured: loss 20"),
        ({"eval_loss 10": None}, "not measured: eval_loss 10"),
    ],
)
def test_compare_rejects_other_losses(smoke, golden, tmp_path, changed, error):
    with pytest.raises(SystemExit, match=re.escape(error)):
        smoke.compare(make_run(tmp_path / "run", golden, **changed), DOCKER / "golden.json")


def test_compare_resumed(smoke, golden, tmp_path):
    straight = make_run(tmp_path / "straight", golden)
    assert "same weights bit for bit" in smoke.compare_resumed(make_run(tmp_path / "equal", golden), straight)
    with pytest.raises(SystemExit, match="other weights"):
        smoke.compare_resumed(make_run(tmp_path / "other", golden, weights=b"v"), straight)
    on_gpu = make_run(tmp_path / "gpu", golden, weights=b"v", gpus=1)
    assert "last loss differs by 0.0e+00" in smoke.compare_resumed(on_gpu, straight), (
        "sums on a GPU have no fixed order"
    )
    with pytest.raises(SystemExit):
        smoke.compare_resumed(make_run(tmp_path / "far", golden, weights=b"v", gpus=1, **{"loss 20": 9.0}), straight)


NO_KERNEL = "CUDA error: no kernel image is available for execution on the device"


@pytest.fixture
def gpu(monkeypatch):
    """A simulated GPU of compute capability 12.0; kernels run on the CPU instead."""
    measure = attention.measure_errors
    monkeypatch.setattr(
        attention, "measure_errors", lambda kernel, device, dtype, width=64: measure(kernel, "cpu", dtype, width)
    )

    def with_flash_attention(report, **kernels):
        probe = {"flash_attention": report, "gpus": [{"capability": "12.0"}]}
        monkeypatch.setattr(torch_probe, "probe", lambda: probe)
        for name, kernel in kernels.items():
            monkeypatch.setattr(attention, name, kernel)

    return with_flash_attention


def fails(error):
    def kernel(*arguments):
        raise RuntimeError(error)

    return kernel


def test_gpu_without_flash_attention_kernel_falls_back_to_varlen(smoke, gpu):
    gpu({"error": NO_KERNEL, "loads": True}, flash=fails(NO_KERNEL))
    report = smoke.attention()
    assert f"cannot run on compute capability 12.0 ({NO_KERNEL})" in report
    assert f"falling back to varlen (no flash_attention_2: {NO_KERNEL}" in report


def test_gpu_without_any_correct_kernel_falls_back_to_sdpa(smoke, gpu):
    gpu(
        {"error": NO_KERNEL, "loads": True}, flash=fails(NO_KERNEL), varlen=fails("CUDA error: invalid device function")
    )
    assert "falling back to sdpa (no flash_attention_2: " in smoke.attention()


def test_image_without_flash_attention_falls_back_to_varlen(smoke, gpu):
    gpu({"missing": "flash_attn is not installed"})
    assert "falling back to varlen (no flash_attention_2: flash_attn is not installed" in smoke.attention()


@pytest.mark.parametrize(
    ("report", "error"),
    [
        ({"forward": 0.5, "backward": 0.5, "tolerance": 3e-2}, "error 5.0e-01 forward"),
        ({"error": "undefined symbol: _ZNK3c106SymInt6sym_neERKS0_", "loads": False}, "undefined symbol"),
    ],
)
def test_wrong_flash_attention_fails(smoke, gpu, report, error):
    gpu(report)
    with pytest.raises(SystemExit, match=error):
        smoke.attention()


def test_functions_that_smoke_sh_calls_exist(smoke):
    """On a GPU a missing name would only be found after an hour of building the image."""
    called = re.findall(r'smoke\.py" (\w+)', (DOCKER / "smoke.sh").read_text())
    assert {"compare", "compare_resumed", "attention", "summary"} <= set(called)
    assert all(callable(getattr(smoke, name)) for name in called)


def test_summary_is_one_json_object(tmp_path):
    """As smoke.sh calls it: outside of an image, the package is not on Python's path."""
    (tmp_path / "steps").write_text("a\t0\t3\tlast\tline\nb\t1\t2\t\n")
    command = [sys.executable, str(DOCKER / "smoke.py"), "summary", str(tmp_path / "steps")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert not result["passed"]
    assert result["steps"][0] == {"name": "a", "exit_code": 0, "seconds": 3, "last_line": "last\tline"}


@pytest.mark.parametrize(
    ("argument", "error"),
    [("--gpu", "unknown argument --gpu"), (None, "no GPU found"), ("--no-container", "no GPU found")],
)
def test_smoke_test_rejects_invalid_input(argument, error):
    command = ["bash", str(DOCKER / "smoke.sh"), *([argument] if argument else [])]
    done = subprocess.run(command, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and error in done.stderr


@pytest.mark.parametrize("name", ["ci", "gpu", "cuda-build"])
def test_workflows_pin_actions_and_have_read_permission_only(name):
    text = (REPOSITORY / ".github" / "workflows" / f"{name}.yml").read_text()
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    actions = [step["uses"] for job in workflow["jobs"].values() for step in job["steps"] if "uses" in step]
    assert actions and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action) for action in actions)
    assert "secrets." not in text and "pull_request_target" not in text
    assert name == "ci" or "pull_request" not in workflow[True], "no pull request runs on a self-hosted runner"
    assert all(job["timeout-minutes"] for job in workflow["jobs"].values())
