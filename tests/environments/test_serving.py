"""`transformers serve` gives a run's model the tokens of training and answers as `generate`; `make test-serve` runs this.

The server is the real one, on the CPU.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from helpers import tool_chats
from helpers.cli_errors import check_refused
from helpers.workplace import FEW_STEPS, HANG_SECONDS, SMALL_ARCHITECTURE

from sft_recipes.launch import command


@pytest.fixture(scope="module")
def trained(shared_workplace):
    """A run on chats with system turns, several turns and tools, and a template that writes all of them."""
    rows, template = shared_workplace.path / "tools.jsonl", shared_workplace.path / "tools.jinja"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tool_chats.rows(300)))
    template.write_text(tool_chats.TEMPLATE)
    data = (f"data.train={rows}", "data.validation_fraction=0.2", f"model.chat_template={template}")
    steps = ("trainer.max_length=256", "trainer.max_steps=24", "generation.max_new_tokens=16")
    return shared_workplace.trained_once("tools", *data, SMALL_ARCHITECTURE, *FEW_STEPS, *steps)


@pytest.fixture
def run(workplace, trained):
    """A copy, whose model may be changed."""
    return shutil.copytree(trained, workplace.runs / "tools", ignore=shutil.ignore_patterns("checkpoint-*"))


def verdicts(done):
    return [" ".join(line.split()) for line in done.stdout.splitlines() if line.startswith(("PASS", "FAIL"))]


def test_server_gets_the_tokens_of_training_and_answers_as_generate(workplace, run):
    done = workplace.sft("check-serving", "tools")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 with a system turn, 6 of several turns, 6 with tools, 6 of one turn" in done.stdout
    assert [line[:10] for line in verdicts(done)] == ["PASS promp", "PASS compl", "PASS end o"]
    check_another_template(workplace, run)


def check_another_template(workplace, run):
    """A template other than that of training is noticed."""
    template = run / "final" / "chat_template.jinja"
    template.write_text(template.read_text().replace("Tools: ", "Tools:"))
    done = workplace.sft("check-serving", "tools")
    assert done.returncode == 1
    first = verdicts(done)[0]
    assert first.startswith("FAIL prompt tokens") and "'<|im_start|>system" in first, "shows both texts"


def test_another_client_gets_the_same_number_of_tokens(workplace, run):
    """Requests by curl's equivalent: no code of this project between the client and the server."""
    port = command.free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "sft_recipes", "serve", "tools", "--port", str(port)],
        cwd=workplace.path, env=workplace.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        wait_until_healthy(port, process)
        prompts = [json.loads(line) for line in (prepared(run) / "prompts.jsonl").read_text().splitlines()]
        simple = next(prompt for prompt in prompts if len(prompt["messages"]) == 1)
        body = {"model": "tools/final", "messages": simple["messages"], "temperature": 0, "max_tokens": 4}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        answer = json.load(urllib.request.urlopen(request))
        assert answer["usage"]["prompt_tokens"] == len(simple["input_ids"])
        check_refused(workplace.sft("serve", "tools", "--port", str(port)), f"PORT: {port}: .*Address already in use")
    finally:
        process.send_signal(signal.SIGINT)
        output = process.communicate()[0]
    assert f"http://127.0.0.1:{port}/v1 by transformers serve, model tools/final" in output
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health")


def prepared(run):
    return type(run)(json.loads((run / "prepared.json").read_text())["folder"])


def wait_until_healthy(port, process):
    deadline = time.monotonic() + HANG_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
            return
        except urllib.error.URLError:
            time.sleep(0.1)
    raise AssertionError(process.communicate()[0])
