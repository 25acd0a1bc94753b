"""Check that a server of a run's model gets the prompt tokens of training, and answers as `generate` does."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft_recipes.data.formats import Conversation
from sft_recipes.data.tokenize import ConversationTokenizer, with_call_ids
from sft_recipes.data.tokenizer import load_tokenizer
from sft_recipes.planner import plan as plans
from sft_recipes.runtime import timeouts
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import RunDir, read_json
from sft_recipes.tools import serve
from sft_recipes.tools.serve import Server
from sft_recipes.training import completions
from sft_recipes.training.completions import Prompt
from sft_recipes.training.library_logging import silence_libraries

log = logging.getLogger(__name__)

MAX_LOGIT_GAP = 0.1  # between the two likeliest tokens: other kernels and dtypes may choose the second
_PER_KIND = 6  # conversations
_KINDS = {
    "system": lambda prompt: any(message["role"] == "system" for message in prompt.messages),
    "multi-turn": lambda prompt: sum(message["role"] == "user" for message in prompt.messages) > 1,
    "tools": lambda prompt: bool(prompt.tools),
    "single-turn": lambda prompt: len(prompt.messages) == 1,
}
_CHAT = "/v1/chat/completions"


def main(folder: RunDir, port: int | None) -> int:
    """Check a server that is started here, or the one on `port`; return 0, or 1 if a check fails.

    Raises:
        SetupError: as `serve.configure`; the server does not start or answer, or there are no held-out conversations.
    """
    silence_libraries()
    prompts = _select_prompts(folder)
    with socket.socket() as probe:
        probe.bind((serve.HOST, 0))
        free_port = probe.getsockname()[1]
    server = serve.configure(folder, free_port)
    url = f"http://{serve.HOST}:{port or free_port}"
    bodies = [
        _request(prompt, server, plans.read(folder.plan).sections.generation.max_new_tokens) for prompt in prompts
    ]
    with contextlib.nullcontext() if port else _running(server, url):
        answers = [_post(url + _CHAT, body) for body in bodies]
        keys = ("model", "messages", "tools", "chat_template_kwargs")
        chats = [{key: body[key] for key in keys if key in body} for body in bodies]
        if server.is_vllm:
            given = [_post(f"{url}/tokenize", {**chat, "add_generation_prompt": True})["tokens"] for chat in chats]
        else:
            given = _tokenize_as_server(server, chats)
    # The server has ended: the reference may need its GPU.
    return _compare(folder, server, prompts, list(zip(bodies, given, answers, strict=True)))


def _select_prompts(folder: RunDir) -> list[Prompt]:
    prepared = Path(read_json(folder.prepared).get("folder", ""))
    if not (prepared / "prompts.jsonl").is_file():
        raise SetupError(
            f"RUN: the held-out conversations of {folder.name} are gone: found no {prepared}. Train it again"
        )
    prompts, selected, counts = completions.read_prompts(prepared, 1000), {}, []
    for kind, holds in _KINDS.items():
        of_kind = [number for number, prompt in enumerate(prompts) if holds(prompt)][:_PER_KIND]
        selected.update((number, prompts[number]) for number in of_kind)
        counts.append(f"{len(of_kind)} {kind}")
    if not selected:
        raise SetupError(f"RUN: {folder.name} has no held-out conversation with an answer to compare")
    log.info(f"prompts    {len(selected)} held-out conversations: {', '.join(counts)}")
    return list(selected.values())


def _request(prompt: Prompt, server: Server, max_tokens: int) -> dict[str, Any]:
    """Return the body of a chat request; calls get the ids that training gave them, and JSON arguments."""
    messages, calls = prompt.messages, [call for message in prompt.messages for call in message.get("tool_calls", ())]
    if any("id" not in call for call in calls):
        messages = with_call_ids(messages)
    messages = [dict(message) for message in messages]
    for message in messages:
        if message.get("tool_calls"):
            message["tool_calls"] = [
                {**call, "type": "function", "function": {**function, "arguments": json.dumps(function["arguments"])}}
                for call in message["tool_calls"]
                for function in [call["function"]]
            ]
    body = {"model": server.model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
    optional = {"tools": prompt.tools, "chat_template_kwargs": prompt.template_kwargs}
    return body | {key: value for key, value in optional.items() if value}


@contextlib.contextmanager
def _running(server: Server, url: str) -> Iterator[None]:
    """Start the server, wait until it answers, and end it afterwards."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            server.command, cwd=server.directory, env=server.environment, stdout=output, stderr=output
        )
        try:
            deadline = time.monotonic() + timeouts.MODEL_LOADING
            while not _is_healthy(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    output.seek(0)
                    lines = output.read().strip().splitlines() or ["no output"]
                    raise SetupError(f"serve: the server did not start: {lines[-1][:200]}. Run `make serve` to see all")
                time.sleep(timeouts.POLL_SERVER)
            yield
        finally:
            process.terminate()
            process.wait()


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=timeouts.HUB_REQUEST):
            return True
    except OSError:
        return False


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeouts.MODEL_LOADING) as response:
            return dict(json.load(response))
    except OSError as error:  # also HTTPError, whose body has the reason
        reason = error.read().decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else error
        raise SetupError(f"serve: {url}: {error}: {' '.join(str(reason).split())[:200]}") from error


def _tokenize_as_server(server: Server, chats: list[dict[str, Any]]) -> list[list[int]]:
    """Return the ids of each chat's prompt, from the tokenizer in the environment of `transformers serve`."""
    trusted = ["trust"] if "--trust-remote-code" in server.command else []
    command = [
        server.command[0],
        str(Path(__file__).with_name("server_tokens.py")),
        str(server.folder.resolve()),
        *trusted,
    ]
    text = "".join(json.dumps(chat) + "\n" for chat in chats)
    done = subprocess.run(command, input=text, env=server.environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupError(
            f"serve: the chats cannot be tokenized: {(done.stderr.strip().splitlines() or ['?'])[-1][:200]}"
        )
    return [json.loads(line) for line in done.stdout.splitlines()]


def _compare(folder: RunDir, server: Server, prompts: list[Prompt], results: list[tuple[Any, Any, Any]]) -> int:
    """Print one line per check; return 1 if one fails."""
    import torch
    from transformers import AutoModelForCausalLM

    plan, failed = plans.read(folder.plan), False
    trusted = plan.sections.model.trust_remote_code
    tokenizer = load_tokenizer(str(server.folder), None, trusted)
    today = ConversationTokenizer(tokenizer, datetime.date.today())
    model = AutoModelForCausalLM.from_pretrained(
        server.folder, dtype="auto", device_map="auto", trust_remote_code=trusted
    ).eval()
    stop = model.generation_config.eos_token_id
    stop_ids, limit = stop if isinstance(stop, list) else [stop], plan.sections.generation.max_new_tokens
    exact = model.dtype == torch.float32 and model.device.type == "cpu" and not server.is_vllm
    tokens, texts, ends, gaps, parsed = [], [], [], [], 0
    for prompt, (_, given, answer) in zip(prompts, results, strict=True):
        expected = prompt.input_ids
        if "strftime_now" in str(tokenizer.chat_template):  # the server writes today's date
            conversation = Conversation(
                prompt.messages, "held-out", prompt.tools, template_kwargs=prompt.template_kwargs
            )
            expected = today.tokenize_prompt(conversation)
        if given != expected or answer["usage"]["prompt_tokens"] != len(expected):
            tokens.append(_describe_tokens(tokenizer, expected, given, answer["usage"]["prompt_tokens"]))
            continue
        (ids,) = completions.generate_ids(model, tokenizer, [expected], limit, stop_ids).tolist()
        text, choice = tokenizer.decode(ids, skip_special_tokens=True), answer["choices"][0]
        message = choice["message"]
        if message.get("tool_calls") or message.get("reasoning_content"):
            parsed += 1  # not comparable as text
        elif (served := message.get("content") or "") != text:
            gap = _gap_at_difference(model, tokenizer, expected, ids, served)
            gaps.append(gap)
            texts += (
                [f"{served[:60]!r}, expected {text[:60]!r} (logit gap {gap:.3f})"]
                if exact or gap >= MAX_LOGIT_GAP
                else []
            )
        elif ids[-1] in stop_ids and len(ids) < limit and choice["finish_reason"] != "stop":
            ends.append(f"finish_reason {choice['finish_reason']}, expected stop after {len(ids)} tokens")
    count = len(prompts)
    same = f"{count - len(tokens) - len(gaps) - parsed} of {count} identical"
    same += f", {len(gaps)} differ at logit gaps of at most {max(gaps):.3f}" if gaps else ""
    same += f", {parsed} parsed by the server and not compared" if parsed else ""
    for name, result, failures in (
        ("prompt tokens", f"{count - len(tokens)} of {count} as in training", tokens),
        ("completions", same, texts),
        ("end of turn", "generation stops there", ends),
    ):
        failed = failed or bool(failures)
        log.info(
            f"{'FAIL' if failures else 'PASS'}  {name:<14}  {result}{f'; first: {failures[0]}' if failures else ''}"
        )
    return int(failed)


def _describe_tokens(tokenizer: Any, expected: list[int], given: list[int], counted: int) -> str:
    """Describe the first difference of a prompt's tokens."""
    position = next((i for i, pair in enumerate(zip(expected, given, strict=False)) if pair[0] != pair[1]), None)
    if position is None:
        return f"{counted} prompt tokens, expected {len(expected)}"
    parts = [tokenizer.decode(ids[position : position + 8]) for ids in (given, expected)]
    return f"token {position}: {parts[0]!r}, expected {parts[1]!r}"


def _gap_at_difference(model: Any, tokenizer: Any, prompt: list[int], ids: list[int], served: str) -> float:
    """Return the gap between the two largest logits where the served text leaves the reference."""
    import torch

    prefixes = (
        tokenizer.decode(ids[: end + 1], skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}")
        for end in range(len(ids))
    )
    position = next((end for end, prefix in enumerate(prefixes) if not served.startswith(prefix)), len(ids) - 1)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids[:position]], device=model.device)).logits[0, -1].float()
    first, second = logits.topk(2).values.tolist()
    return float(first - second)
