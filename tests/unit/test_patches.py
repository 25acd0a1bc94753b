"""Each patch of training/patches.py is still needed; a test fails once its library no longer needs the patch."""

import importlib.util
import inspect
from pathlib import Path

import torch
from helpers.workplace import REPOSITORY
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sft_recipes.config import loader
from sft_recipes.planner import plan as plans
from sft_recipes.runtime import timeouts
from sft_recipes.training import lora, patches


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


def test_logits_chunk_is_no_wider_than_the_vocabulary(monkeypatch):
    import trl.trainer.utils

    monkeypatch.setattr(trl.trainer.utils, "_use_triton", trl.trainer.utils._use_triton)
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", patches._LOGITS_CHUNK)
    sizes = []
    for vocabulary in (320, 1024, 10**6):
        patches.score_supervised_positions_only(vocabulary)
        sizes.append(trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE)
    assert sizes == [320, 1024, patches._LOGITS_CHUNK]


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
        adapted = get_peft_model(model, lora.make_lora_config(plan, model_folder, model))
        patch(adapted)
        adapted.save_pretrained(tmp_path)
        return names

    assert names_looked_up(lambda _model: None) == ["some/model"], "remove save_adapters_without_embeddings"
    assert names_looked_up(patches.save_adapters_without_embeddings) == []
    assert all(".lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


def test_deepspeed_engine_has_what_the_patch_changes():
    """Read as text: importing the engine takes seconds."""
    package = importlib.util.find_spec("deepspeed").submodule_search_locations[0]
    text = (Path(package) / "runtime" / "engine.py").read_text(encoding="utf-8")
    assert "def save_checkpoint(self, save_dir, tag=None, client_state={}, save_latest=True" in text
    assert "self._copy_recovery_script(save_path)" in text and "self.checkpoint_engine.save(" in text
    engine = (Path(package) / "runtime" / "checkpoint_engine" / "torch_checkpoint_engine.py").read_text()
    assert "        torch.save(state_dict, path" in engine, "collect_errors_of_torch_save does not reach it"


def test_errors_of_torch_save_are_collected(tmp_path):
    from contextlib import suppress

    original = torch.save
    with patches.collect_errors_of_torch_save(lambda: suppress(RuntimeError)):
        torch.save([1], tmp_path / "missing" / "file")
        torch.save([1], tmp_path / "file")
    assert torch.save is original and torch.load(tmp_path / "file") == [1]


def test_torch_agent_waits_half_a_minute_without_patch(monkeypatch):
    from torch.distributed.elastic.multiprocessing.api import PContext

    code = PContext.close.__code__
    assert code.co_varnames[: code.co_argcount] == ("self", "death_sig", "timeout")
    assert PContext.close.__defaults__ == (None, 30)
    monkeypatch.setattr(PContext.close, "__defaults__", PContext.close.__defaults__)
    patches.shorten_wait_for_other_ranks()
    assert PContext.close.__defaults__ == (None, timeouts.OTHER_RANKS_EXIT)
