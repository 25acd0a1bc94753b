"""Console of a run: lines of metrics, on rank 0 only."""

from types import SimpleNamespace

import pytest

from sft_recipes.runtime import log
from sft_recipes.training.callbacks.console import ConsoleCallback

TRAINED = {"loss": 1.2345, "learning_rate": 2e-5, "grad_norm": 0.71, "tokens_per_second": 12345.6}
EVALUATED = {"eval_loss": 1.1111, "eval_few_loss": 1.0, "eval_others_loss": 1.2}


@pytest.fixture(autouse=True)
def run_log(tmp_path):
    """The handlers that rank 0 has, `log.txt` in a temporary directory."""
    log.to_console()
    log.to_file(tmp_path / "log.txt")


def follow(rank_0=True):
    """Two log records, an evaluation and a warning, as the Trainer calls a callback."""
    view = ConsoleCallback()
    state = SimpleNamespace(is_world_process_zero=rank_0, global_step=0, max_steps=2000, epoch=0.0)
    view.on_train_begin(None, state, None)
    for step, logs in (
        (10, {**TRAINED, "memory_peak_bytes": 5 * 2**30}),
        (20, {**TRAINED, "host_memory_bytes": 2**29}),
        (20, EVALUATED),
    ):
        state.global_step, state.epoch = step, step / 1000
        view.on_log(None, state, None, logs=logs)
    if rank_0:
        log.ROOT.info("step 20  loss spike: loss 9.000")


def test_console_prints_lines_without_a_terminal(tmp_path, capsys):
    follow()
    lines = capsys.readouterr().out.splitlines()
    assert lines == (tmp_path / "log.txt").read_text().splitlines()
    assert lines[0].startswith(
        "step 10/2000  epoch 0.01  loss 1.2345  lr 2.00e-05  grad_norm 0.71  12,346 tokens/s  5.0 GiB  eta "
    )
    assert "0.5 GiB" in lines[1] and "eval_loss 1.1111  eta " in lines[2]
    assert lines[3] == "step 20  loss spike: loss 9.000" and len(lines) == 4


def test_console_prints_on_rank_0_only(tmp_path, capsys):
    follow(rank_0=False)
    assert capsys.readouterr().out == "" and not (tmp_path / "log.txt").exists()
