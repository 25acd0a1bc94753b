"""Check that a server of a run's model gets the prompt tokens of training, and answers as `generate` does."""

import contextlib
import datetime
import json
import logging
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2  # of huggingface_hub

from sft_recipes.data.formats import Conversation
from sft_recipes.data.tokenize import ConversationTokenizer, with_call_ids
from sft_recipes.data.tokenizer import load_tokenizer
from sft_recipes.planner import plan as plans
from sft_recipes.runtime import timeouts
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.polling import wait_until
from sft_recipes.runtime.run_dir import RunDir, read_json
from sft_recipes.tools import serve
from sft_recipes.training import completions
from sft_recipes.training.library_logging import silence_libraries

log = logging.getLogger(__name__)

MAX_LOGIT_GAP = 0.1  # between the two likeliest tokens: other kernels and dtypes may choose the second
_PER_KIND = 6  # conversations
_KINDS = {
    "with a system turn": lambda prompt: any(message["role"] == "system" for message in prompt.messages),
    "of several turns": lambda prompt: sum(message["role"] == "user" for message in prompt.messages) > 1,
    "with tools": lambda prompt: bool(prompt.tools),
    "of one turn": lambda prompt: len(prompt.messages) == 1,
}


def main(folder: RunDir) -> int:
    """Start a server, send it held-out conversations, and compare; return 0, or 1 if a check fails.

    Raises:
        SetupError: as `serve.configure`; the server does not start, or there are no held-out conversations.
    """
    silence_libraries()
    server, prompts = serve.configure(folder, port=0), _select_prompts(folder)
    limit = plans.read(folder.plan).sections.generation.max_new_tokens
    chats = [_chat(prompt, server) for prompt in prompts]
    with _running(server):
        greedy = {"temperature": 0, "max_tokens": limit}
        answers = [_post(server, "v1/chat/completions", chat | greedy) for chat in chats]
        if server.is_vllm:
            ids = [_post(server, "tokenize", chat | {"add_generation_prompt": True})["tokens"] for chat in chats]
        else:
            ids = _tokenize_as_server(server, chats)
    return _compare(folder, server, prompts, list(zip(ids, answers, strict=True)))  # may need the server's memory


def _select_prompts(folder: RunDir) -> list[completions.Prompt]:
    prepared = Path(read_json(folder.prepared).get("folder", ""))
    found = completions.read_prompts(prepared, 1000) if (prepared / "prompts.jsonl").is_file() else []
    if not found:
        raise SetupError(f"RUN: found no held-out conversations of {folder.name} in {prepared}. Train it again")
    kinds = {kind: [prompt for prompt in found if holds(prompt)][:_PER_KIND] for kind, holds in _KINDS.items()}
    log.info(f"held-out conversations: {', '.join(f'{len(prompts)} {kind}' for kind, prompts in kinds.items())}")
    return list({id(prompt): prompt for prompts in kinds.values() for prompt in prompts}.values())


def _chat(prompt: completions.Prompt, server: serve.Server) -> dict[str, Any]:
    """Return a request: calls have the ids that training gave them, and arguments as JSON."""
    calls = [call for message in prompt.messages for call in message.get("tool_calls", ())]
    messages = with_call_ids(prompt.messages) if any("id" not in call for call in calls) else prompt.messages
    messages = json.loads(json.dumps(messages))
    for call in (call for message in messages for call in message.get("tool_calls", ())):
        call["type"] = "function"
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    optional = {"tools": prompt.tools, "chat_template_kwargs": prompt.template_kwargs}
    return {"model": server.model, "messages": messages, **{key: value for key, value in optional.items() if value}}


@contextlib.contextmanager
def _running(server: serve.Server) -> Iterator[None]:
    """Start the server, wait until it answers, and end it afterwards."""
    with tempfile.TemporaryFile("w+") as output:
        options = {"cwd": server.directory, "env": server.environment, "stdout": output, "stderr": output}
        with subprocess.Popen(server.command, **options) as process:

            def answers_or_ended() -> bool:
                with contextlib.suppress(httpx2.TransportError):
                    return httpx2.get(f"{server.url}/health", timeout=timeouts.HUB_REQUEST, trust_env=False).is_success
                return process.poll() is not None

            try:
                settled = wait_until(answers_or_ended, timeouts.MODEL_LOADING, timeouts.POLL_SERVER)
                if not settled or process.poll() is not None:
                    output.seek(0)
                    reason = " ".join(output.read().splitlines()[-1:])[:200]
                    raise SetupError(f"serve: the server did not start: {reason}. Run `make serve` to see why")
                yield
            finally:
                process.terminate()


def _post(server: serve.Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = httpx2.post(f"{server.url}/{path}", json=body, timeout=timeouts.MODEL_LOADING, trust_env=False)
    if response.is_error:
        reason = f"{response.status_code}: {response.text[:200]!r}"
        raise SetupError(f"serve: {path}: {reason}. Run `make serve` to see its output")
    return dict(response.json())


def _tokenize_as_server(server: serve.Server, chats: list[dict[str, Any]]) -> list[list[int]]:
    """Return the ids of each chat from the environment of `transformers serve`."""
    script, trust = Path(__file__).with_name("server_tokens.py"), "--trust-remote-code"
    command = [server.command[0], script, server.folder.resolve(), *([trust] if trust in server.command else [])]
    lines = "".join(f"{json.dumps(chat)}\n" for chat in chats)
    done = subprocess.run(command, input=lines, env=server.environment, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def _compare(folder: RunDir, server: serve.Server, prompts: list[completions.Prompt], results: list[Any]) -> int:
    """Print a line per check; return 1 if one fails.

    Args:
        results: for each prompt, the ids that the server uses, and its answer.
    """
    import torch
    from transformers import AutoModelForCausalLM

    section = plans.read(folder.plan).sections
    options = {"dtype": "auto", "device_map": "auto", "trust_remote_code": section.model.trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(server.folder, **options).eval()
    tokenizer = load_tokenizer(str(server.folder), None, section.model.trust_remote_code)
    today, dated = ConversationTokenizer(tokenizer, datetime.date.today()), "strftime_now" in tokenizer.chat_template
    stop, limit = model.generation_config.eos_token_id, section.generation.max_new_tokens
    stop_ids = stop if isinstance(stop, list) else [stop]
    is_exact = model.dtype == torch.float32 and model.device.type == "cpu" and not server.is_vllm
    failures: dict[str, list[str]] = {"prompt tokens": [], "completions": [], "end of turn": []}
    compared, gaps = {"prompt tokens": len(prompts), "completions": 0, "end of turn": 0}, []
    for prompt, (ids, answer) in zip(prompts, results, strict=True):
        conversation = Conversation(prompt.messages, "", prompt.tools, template_kwargs=prompt.template_kwargs)
        expected = today.tokenize_prompt(conversation) if dated else prompt.input_ids
        if ids != expected or answer["usage"]["prompt_tokens"] != len(expected):
            text = f"{tokenizer.decode(ids)[:200]!r}, expected {tokenizer.decode(expected)[:200]!r}"
            failures["prompt tokens"].append(f"{answer['usage']['prompt_tokens']} of {len(expected)} tokens: {text}")
            continue
        (own,) = completions.generate_ids(model, tokenizer, [expected], limit, stop_ids).tolist()
        text, choice = tokenizer.decode(own, skip_special_tokens=True), answer["choices"][0]
        message = choice["message"]
        served = message.get("content") or ""
        if message.get("tool_calls") or message.get("reasoning_content"):
            continue  # the server has parsed the text
        compared["completions"] += 1
        if served != text:
            gaps.append(_gap_at_difference(model, tokenizer, expected, own, served))
            if is_exact or gaps[-1] >= MAX_LOGIT_GAP:
                failures["completions"].append(f"{served[:80]!r}, expected {text[:80]!r} (logit gap {gaps[-1]:.3f})")
        elif own[-1] in stop_ids and len(own) < limit:
            compared["end of turn"] += 1
            if choice["finish_reason"] != "stop":
                failures["end of turn"].append(f"{served[:80]!r}: finish_reason {choice['finish_reason']}")
    for name, found in failures.items():
        first = f"; first difference: {found[0]}" if found else ""
        log.info(f"{'FAIL' if found else 'PASS'}  {name:<13}  {compared[name] - len(found)} of {compared[name]}{first}")
    if gaps:
        log.info(f"{len(gaps)} completions differ where the two likeliest tokens are at most {max(gaps):.3f} apart")
    return int(any(failures.values()))


def _gap_at_difference(model: Any, tokenizer: Any, prompt: list[int], ids: list[int], served: str) -> float:
    """Return the gap between the two largest logits where the served text leaves the completion `ids`."""
    import torch

    texts = (tokenizer.decode(ids[: end + 1], skip_special_tokens=True).rstrip("\ufffd") for end in range(len(ids)))
    end = next((end for end, text in enumerate(texts) if not served.startswith(text)), len(ids) - 1)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids[:end]], device=model.device)).logits[0, -1].float()
    first, second = logits.topk(2).values.tolist()
    return float(first - second)
