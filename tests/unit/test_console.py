"""Console of a run: lines of metrics, below them a progress bar on a terminal, on rank 0 only."""

import contextlib
import fcntl
import os
import struct
import sys
import termios
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
        view.on_step_end(None, state, None)
        view.on_log(None, state, None, logs=logs)
    if rank_0:
        log.ROOT.info("step 20  loss spike: loss 9.000")
    view.on_train_end(None, state, None)


def test_console_prints_lines_without_a_terminal(tmp_path, capsys):
    follow()
    lines = capsys.readouterr().out.splitlines()
    assert lines == (tmp_path / "log.txt").read_text().splitlines()
    assert lines[0].startswith(
        "step 10/2000  epoch 0.01  loss 1.2345  lr 2.00e-05  grad_norm 0.71  12,346 tokens/s  5.0 GiB  eta "
    )
    assert "0.5 GiB" in lines[1] and "eval_loss 1.1111 (few 1.0000, others 1.2000)" in lines[2]
    assert lines[3] == "step 20  loss spike: loss 9.000" and len(lines) == 4


def test_console_prints_on_rank_0_only(tmp_path, capsys):
    follow(rank_0=False)
    assert capsys.readouterr().out == "" and not (tmp_path / "log.txt").exists()


def test_terminal_has_lines_and_a_progress_bar(tmp_path, monkeypatch):
    """A real pseudo-terminal."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("COLUMNS", raising=False)
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        follow()
    shown = b""
    with contextlib.suppress(OSError):  # at the end of the output; a read returns a part of it
        while True:
            shown += os.read(ours, 65536)
    os.close(ours)
    shown = " ".join(shown.decode().split())  # lines longer than the width are wrapped
    assert "20/2000" in shown and "eta" in shown
    assert "loss 1.2345 lr" in shown and "12,346 tokens/s 0.5 GiB" in shown and "eval_loss 1.1111" in shown
    assert "loss spike: loss 9.000" in shown
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 4
