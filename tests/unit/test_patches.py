"""Each patch of training/patches.py is still needed; a test fails once its library no longer needs the patch."""

import importlib.util
import inspect
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.workplace import REPOSITORY
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sft_recipes.config import loader
from sft_recipes.planner import plan as plans
from sft_recipes.runtime import timeouts
from sft_recipes.training import lora, patches
from sft_recipes.training.patches import FlockBaton


def test_trl_scores_all_positions_on_cpu_without_patch():
    import trl.trainer.utils
    from trl.kernels import chunked_logprob

    source = inspect.getsource(trl.trainer.utils)
    assert not chunked_logprob._use_triton(torch.device("cpu"))
    assert "compact = _use_triton(hidden_states.device)" in source
    assert source.count("_use_triton(") == 1, "the patched name has another use"


def test_trl_allocates_chunks_wider_than_the_vocabulary(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    import trl.trainer.utils
    from machine import peak_allocated
    from torch.profiler import ProfilerActivity, profile
    from trl.kernels import ChunkedLogProbFunction

    chunk = patches._LOGITS_CHUNK
    assert f"\n_CHUNKED_LOGPROB_CHUNK_SIZE = {chunk}\n" in inspect.getsource(trl.trainer.utils)
    states, weight, labels = torch.zeros(100, 8), torch.zeros(64, 8), torch.zeros(100, dtype=torch.int64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        ChunkedLogProbFunction.apply(states, weight, None, labels, 1.0, chunk, None, 1.0, ())
    assert peak_allocated(profiler) > 100 * chunk * 4


def test_limit_logits_chunk_is_repeatable(monkeypatch):
    import trl.trainer.utils

    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", patches._LOGITS_CHUNK)
    sizes = []
    for vocabulary in (320, 1024, 10**6):
        patches.limit_logits_chunk(vocabulary)
        sizes.append(trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE)
    assert sizes == [320, 1024, patches._LOGITS_CHUNK]


def test_deepspeed_compiles_muon_at_import_without_patch_and_at_first_call_with_it():
    code = (
        "import inspect, sys, torch; from sft_recipes.training import patches; patches.defer_muon_compilation(); "
        "from deepspeed.runtime.zero.muon import original_muon as muon; "
        "from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as stage3; "
        "print('@compiler.compile()' in inspect.getsource(muon), 'import MuonWithAuxAdam' in inspect.getsource(stage3)); "
        "print('torch._inductor.compile_fx' in sys.modules); "
        "torch.compile = lambda function: print('compiled:', function.__name__) or function; "
        "[muon.zeropower_via_newtonschulz5(torch.eye(2), 1) for _ in range(2)]"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()[-3:]
    assert lines == ["True True", "False", "compiled: zeropower_via_newtonschulz5"], done.stdout + done.stderr


def test_torch_build_lock_survives_a_killed_builder():
    from torch.utils import cpp_extension, file_baton

    assert "FileBaton(" in inspect.getsource(cpp_extension._jit_compile)
    assert "O_EXCL" in inspect.getsource(file_baton.FileBaton.try_acquire)


def test_flock_baton_is_released_when_its_process_is_killed(tmp_path):
    killed = subprocess.run(
        [sys.executable, "-c", "import os, signal, sys\n"
         "from sft_recipes.training.patches import FlockBaton\n"
         "assert FlockBaton(sys.argv[1]).try_acquire()\n"
         "os.kill(os.getpid(), signal.SIGKILL)", str(tmp_path / "lock")],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL
    builder, waiting = FlockBaton(str(tmp_path / "lock")), FlockBaton(str(tmp_path / "lock"))
    assert builder.try_acquire() and not waiting.try_acquire()
    builder.release()
    waiting.wait()


def test_accelerate_ignores_fsdp_on_cpu():
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    source = inspect.getsource(AcceleratorState.__init__)
    branch = source[: source.index("self.distributed_type = DistributedType.FSDP")].rpartition("elif ")[2]
    assert "DistributedType.MULTI_GPU," in branch and "MULTI_CPU" not in branch
    assert isinstance(PartialState._shared_state, dict)


def test_accelerate_reduces_fsdp2_gradients_in_bf16_without_patch():
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.reduce_dtype == torch.bfloat16
    patches.reduce_gradients_in_fp32(plugin)
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)


def test_bitsandbytes_repack_stops_gradients_without_patch():
    """The second half needs a CPU with AVX512-BF16."""
    import bitsandbytes

    def layer():
        torch.manual_seed(0)
        linear = bitsandbytes.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        return linear.to("cpu").train()

    def gradient(linear):
        inputs = torch.linspace(-1, 1, 128).repeat(2, 1).requires_grad_()
        linear(inputs).square().sum().backward()
        return inputs.grad

    def gradient_after_evaluation(linear):
        with torch.no_grad():
            linear.eval()(torch.ones(1, 128))
        return gradient(linear.train())

    patched, unpatched = layer(), layer()
    repacks = unpatched.support_avx512bf16_for_cpu
    expected = gradient(layer())
    patches.disable_cpu_repack(torch.nn.Sequential(patched))
    assert torch.equal(gradient_after_evaluation(patched), expected)
    if repacks:
        assert gradient_after_evaluation(unpatched) is None, "remove disable_cpu_repack"


def test_peft_saves_embeddings_and_asks_the_hub_without_patch(model_folder, tmp_path, monkeypatch):
    from peft import get_peft_model
    from peft.utils import save_and_load

    plan = plans.resolve(loader.load("tiny", ("lora.r=2",)), plans.Topology(gpus=0, processes=1))

    def names_looked_up(patch):
        names = []
        monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", lambda name, _file: names.append(name))
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        model.resize_token_embeddings(384)
        model.name_or_path = "some/model"
        adapted = get_peft_model(model, lora.make_lora_config(plan, model_folder))
        patch(adapted)
        adapted.save_pretrained(tmp_path)
        return names

    assert names_looked_up(lambda _model: None) == ["some/model"], "remove save_adapters_without_embeddings"
    assert names_looked_up(patches.save_adapters_without_embeddings) == []
    assert all(".lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


def test_deepspeed_engine_has_what_tolerate_disk_errors_changes():
    """Read as text: importing the engine takes seconds."""
    package = importlib.util.find_spec("deepspeed").submodule_search_locations[0]
    text = (Path(package) / "runtime" / "engine.py").read_text(encoding="utf-8")
    assert "def save_checkpoint(self, save_dir, tag=None, client_state={}, save_latest=True" in text
    assert "self._copy_recovery_script(save_path)" in text and "self.checkpoint_engine.save(" in text


def test_tolerate_disk_errors_wraps_writes_once():
    from contextlib import suppress

    written = []

    def write(path):
        written.append(path)
        raise OSError(28, "No space left on device")

    engine = SimpleNamespace(
        checkpoint_engine=SimpleNamespace(save=write), save_checkpoint=lambda save_latest=True: save_latest
    )
    for _ in range(2):
        patches.tolerate_disk_errors(engine, lambda: suppress(OSError))
    engine.checkpoint_engine.save("a")
    assert written == ["a"] and engine.save_checkpoint() is False and engine._copy_recovery_script("x") is None


def test_torch_agent_waits_half_a_minute_without_patch(monkeypatch):
    from torch.distributed.elastic.multiprocessing.api import PContext

    code = PContext.close.__code__
    assert code.co_varnames[: code.co_argcount] == ("self", "death_sig", "timeout")
    assert PContext.close.__defaults__ == (None, 30)
    monkeypatch.setattr(PContext.close, "__defaults__", PContext.close.__defaults__)
    patches.shorten_wait_for_other_ranks()
    assert PContext.close.__defaults__ == (None, timeouts.OTHER_RANKS_EXIT)


@pytest.mark.parametrize("resolves", [True, False])
def test_accelerate_checks_port_on_localhost_without_patch(monkeypatch, resolves):
    import socket

    import accelerate.utils.launch

    check = accelerate.utils.launch.is_port_in_use
    assert '"localhost"' in inspect.getsource(check)
    monkeypatch.setattr(accelerate.utils.launch, "is_port_in_use", check)
    if not resolves:

        def fail(*_arguments):
            raise socket.gaierror

        monkeypatch.setattr(patches.socket, "getaddrinfo", fail)
    patches.skip_port_check_without_localhost()
    assert (accelerate.utils.launch.is_port_in_use is check) == resolves
