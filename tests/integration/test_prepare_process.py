"""Preparation in its own process before any rank starts, what `train` rejects then, and several worker processes."""

import datetime
import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from helpers.bad_input import IN_SEVERAL_PROCESSES
from helpers.cli_errors import MODEL, check_refused
from safetensors.torch import load_file, save_file

from sft_recipes.config import loader
from sft_recipes.data import model_files, prepare, sources, tokenize_rows, tokenizer_files
from sft_recipes.data.forked_call import ForkedCall
from sft_recipes.data.rows import RowStore
from sft_recipes.data.tokenize import ConversationTokenizer
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Topology
from sft_recipes.runtime.errors import DataError, UserError
from sft_recipes.runtime.polling import wait_until
from sft_recipes.training.model import load_model

ROWS = [{"prompt": f"How much is {n} and {n}?", "completion": f"It is {2 * n}."} for n in range(60)]


def test_prepare_process(tmp_path, write_rows, monkeypatch):
    """An error is one line; cached rows need no heavy library, whose import would delay every later start by seconds."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    for name, rows in (("good", ROWS), ("bad", [*ROWS, {"text": "x"}])):
        overrides = [f"data.train={write_rows(rows, f'{name}.jsonl')}", "trainer.max_length=128"]
        plan = plans.resolve(loader.load("tiny", overrides), Topology(0, 1))
        (tmp_path / name).mkdir()
        (tmp_path / name / "plan.json").write_text(json.dumps(asdict(plan)))
    script = (
        "import sys; from sft_recipes.data import prepare; codes = [prepare.main(plan) for plan in sys.argv[1:]]; "
        "print(codes, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    good, bad = (str(tmp_path / name / "plan.json") for name in ("good", "bad"))
    first, cached = (
        subprocess.run([sys.executable, "-c", script, *files], capture_output=True, text=True, check=True)
        for files in ((good, bad), (good,))
    )
    assert [done.stdout.splitlines()[-1] for done in (first, cached)] == ["[0, 2] True True", "[0] False False"]
    assert first.stderr.startswith(f"error: {tmp_path}/bad.jsonl:61: row keys: found text, expected messages")
    assert len(first.stderr.splitlines()) == 1 and not (tmp_path / "bad" / "prepared.json").exists()


def prepare_rows(rows, store, write_rows, model_folder):
    overrides = [f"data.train={write_rows(rows)}", f"model.name_or_path={model_folder}", "model.from_scratch=false"]
    plan = plans.resolve(
        loader.load("tiny", [*overrides, "data.validation=", "trainer.max_length=128"]), Topology(0, 1)
    )
    return prepare.prepare(plan, store)


def test_prepare_in_several_processes_gives_same_rows(tmp_path, write_rows, model_folder, monkeypatch):
    single = prepare_rows(ROWS, tmp_path / "single", write_rows, model_folder)
    monkeypatch.setattr(sources, "_BYTES_PER_CHUNK", 500)
    several = prepare_rows(ROWS, tmp_path / "several", write_rows, model_folder)
    assert several.folder != single.folder and several.fingerprint == single.fingerprint


def test_prepare_gives_same_files_for_any_number_of_workers(tmp_path, write_rows, model_folder, monkeypatch):
    monkeypatch.setattr(sources, "_BYTES_PER_CHUNK", 300)
    contents = []
    for workers in (1, 2, 3):
        monkeypatch.setattr(tokenize_rows.os, "sched_getaffinity", lambda _, count=workers: set(range(count)))
        folder = Path(prepare_rows(ROWS, tmp_path / str(workers), write_rows, model_folder).folder)
        files = [folder / "prompts.jsonl", *sorted(folder.glob("*/*.arrow"))]
        details = json.loads((folder / "details.json").read_text())
        contents.append(([(file.name, file.read_bytes()) for file in files], {**details, "seconds": 0}))
    assert len(contents[0][0]) == 3 and contents[0] == contents[1] == contents[2]


MEMORY_SCRIPT = """
import resource, sys
from pathlib import Path
from sft_recipes.config import loader
from sft_recipes.data import prepare, sources
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Topology

sources._BYTES_PER_CHUNK = 2**18  # so that few rows are several chunks too
folder, model = Path(sys.argv[1]), ["model.from_scratch=false", f"model.name_or_path={sys.argv[2]}"]
for name in ("few.jsonl", "many.jsonl"):
    data = [f"data.train={folder / name}", "data.validation=", "trainer.max_length=1024"]
    prepare.prepare(plans.resolve(loader.load("tiny", [*data, *model]), Topology(0, 1)), folder / "store")
    (data_size,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    limit = int(data_size.split()[1]) * 1024 + 64 * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))  # of this process and of each worker
"""


def test_prepare_needs_no_more_memory_for_more_rows(tmp_path, write_rows, model_folder):
    """Private memory may grow by 64 MiB from 3,000 to 12,000 rows."""
    text = "What is the sum of these numbers? " * 8
    rows = [{"prompt": f"{n}: {text}", "completion": f"{text} {n}."} for n in range(12_000)]
    write_rows(rows[:3000], "few.jsonl"), write_rows(rows, "many.jsonl")
    script = [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path), str(model_folder)]
    done = subprocess.run(script, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_prepare_names_first_bad_row_in_several_processes(tmp_path, write_rows, model_folder, monkeypatch):
    monkeypatch.setattr(sources, "_BYTES_PER_CHUNK", 400)
    rows = [*ROWS[:33], {"prompt": "a", "completion": " "}, *ROWS[33:50], {"prompt": "b"}]
    with pytest.raises(UserError, match=r"rows.jsonl:34: turn 2: assistant content: found no text"):
        prepare_rows(rows, tmp_path / "store", write_rows, model_folder)


@pytest.mark.parametrize(
    ("module", "function", "error"),
    [
        (tokenizer_files, "save", DataError("model.name_or_path: it gives other ids")),
        (prepare, "_write_prompts", OSError(errno.ENOSPC, "No space left on device")),
    ],
)
def test_errors_of_forked_processes_are_raised(
    tmp_path, write_rows, model_folder, monkeypatch, module, function, error
):
    def fail(*_):
        raise error

    monkeypatch.setattr(module, function, fail)
    with pytest.raises(type(error), match=str(error.args[-1])):
        prepare_rows(ROWS, tmp_path / "store", write_rows, model_folder)
    assert not list((tmp_path / "store").glob("*partial*")) and not multiprocessing.active_children()


def test_forked_call_that_is_killed_is_named():
    with ForkedCall(os.kill, 0, 0) as ended:  # signals nothing
        assert ended.result() is None
        ended.check()
    with ForkedCall(lambda: os.kill(os.getpid(), signal.SIGKILL)) as killed:
        assert wait_until(lambda: not multiprocessing.active_children(), 60)
        with pytest.raises(UserError, match="a process was killed by signal 9. The machine may lack memory"):
            killed.check()


def test_tokenize_source_names_first_bad_row_of_thousands(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case = IN_SEVERAL_PROCESSES
    (tmp_path / case.name).write_bytes(case.content)
    source = sources.resolve(case.name, "data.train", tmp_path / "toy")
    conversation_tokenizer = ConversationTokenizer(tokenizer, datetime.date(2026, 11, 21))
    with pytest.raises(UserError) as raised:
        tokenize_rows.tokenize_source(source, conversation_tokenizer, "data.train", RowStore(tmp_path), 128)
    assert re.match(case.message, str(raised.value))


def test_train_rejects_too_few_rows_and_leaves_nothing(workplace):
    """After the preparation. Errors of the preparation: tests/unit/test_bad_input.py, and test_hub.py for `train`."""
    (workplace.path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    done = workplace.sft("train", "tiny", "data.train=rows.jsonl", "data.validation=")
    check_refused(done, "fewer than one effective batch")
    assert workplace.names() == []


def check(folder):
    model_files.check_model(loader.load("tiny", [*MODEL, f"model.name_or_path={folder}"]).model)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model.safetensors", "has no weights"),
        ("config.json", "has no config.json"),
    ],
)
def test_check_model_rejects_incomplete_folder(tmp_path, model_folder, missing, message):
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / missing).unlink()
    with pytest.raises(UserError, match=message):
        check(tmp_path / "model")


def test_check_model_rejects_remote_code_and_missing_folder(tmp_path, model_folder):
    shutil.copytree(model_folder, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(UserError, match="requires its own code"):
        check(tmp_path / "model")
    with pytest.raises(UserError, match="no folder './nowhere'"):
        check("./nowhere")


def test_train_rejects_missing_weights(workplace, model_folder, few_rows):
    shutil.copytree(model_folder, workplace.path / "model")
    file = workplace.path / "model" / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if "layers.1.mlp" not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    arguments = ("train", "tiny", *MODEL, "model.name_or_path=./model", f"data.train={few_rows}")
    done = workplace.sft(*arguments)
    line = check_refused_late(
        done, "the weights of ./model lack model.layers.1.mlp.* and 2 more, which would be random"
    )
    assert "Use a complete copy of the model" in line
    file.write_bytes(file.read_bytes()[:1000])
    plan = plans.resolve(loader.load("tiny", [*MODEL, f"model.name_or_path={file.parent}"]), Topology(0, 1))
    with pytest.raises(UserError, match="model cannot be loaded"):
        load_model(plan, str(file.parent))
    assert not list(workplace.runs.glob("*/plan.json")), "the corrected command would be another plan's"


def check_refused_late(done, message):
    """As `check_refused`, for errors after the ranks started, with other lines on standard output."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and re.search(message, lines[0]), done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return lines[0]
