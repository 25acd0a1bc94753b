"""Recognizes the common formats of chat data and converts each row to a checked conversation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sft_recipes.data.sources import RawRow, parse_json, shorten, type_name
from sft_recipes.runtime.errors import DataError

# role and content; an assistant message may also have reasoning_content and tool_calls.
Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Checked messages, the tools they may call, and the location of the row."""

    messages: list[Message]
    location: str
    tools: list[dict[str, Any]] | None = None


_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_CALL_ROLES = ("function_call", "tool_call")  # ShareGPT's roles whose text is the call itself
_ROLE_KEYS = (("role", "content"), ("from", "value"), ("role", "value"), ("from", "content"))
_FORMAT_NAMES = "messages, conversations, prompt/completion, instruction/input/output, or question/answer"
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_MAX_DEPTH = 200  # of calls and tools; far below Python's recursion limit, which templates' own recursion would reach
_HERMES_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
_HERMES_RESPONSE = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", re.DOTALL)


def conversation_of(row: RawRow) -> Conversation:
    """Convert a row to a conversation: an optional system turn, then user and assistant alternate, the assistant last.

    The tools' answers are between an assistant's call and its answer.

    Raises:
        DataError: the row has an unknown format, or its roles or contents are invalid; names file and line.
    """
    values = row.values
    if not isinstance(values, dict):
        raise DataError(f"{row.location}: row: found {type_name(values)}, expected an object with {_FORMAT_NAMES}")
    formats = [(keys, read) for keys, read in _FORMATS if all(values.get(key) is not None for key in keys)]
    if len(formats) > 1:
        matching = " and ".join("/".join(keys) for keys, _ in formats)
        raise DataError(
            f"{row.location}: row keys: found {_describe_keys(values)}, which match {len(formats)} formats. Keep one "
            f"of {matching}"
        )
    if not formats:
        raise DataError(f"{row.location}: row keys: found {_describe_keys(values)}, expected {_FORMAT_NAMES}")
    messages = formats[0][1](values, row.location)
    tools = _read_tools(_first_set(values, "tools", "functions"), row.location)
    _check_turns(messages, row.location)
    return Conversation(messages, row.location, tools)


def text_of(conversation: Conversation) -> str:
    """Return everything in the conversation with normalized white space; equal for duplicate rows."""
    parts = [conversation.tools or ""]
    for message in conversation.messages:
        parts += [message["role"], *(message[key] for key in ("reasoning_content", "content") if message.get(key))]
        parts.append(message.get("tool_calls") or "")
    return " ".join(" ".join(part if isinstance(part, str) else json.dumps(part) for part in parts).split())


def _read_messages(values: dict[str, Any], location: str) -> list[Message]:
    return _with_system(values, _read_turns(values["messages"], location), location)


def _read_conversations(values: dict[str, Any], location: str) -> list[Message]:
    return _with_system(values, _read_turns(values["conversations"], location), location)


def _with_system(values: dict[str, Any], messages: list[Message], location: str) -> list[Message]:
    """Prepend the system turn that ShareGPT and Alpaca files may have in a separate key."""
    system = values.get("system")
    if system in (None, ""):
        return messages
    if messages and messages[0]["role"] == "system":
        raise DataError(f"{location}: system prompt: found a system key and a system turn. Keep one of them")
    return [_make_turn("system", system, "system", location), *messages]


def _read_turns(turns: Any, location: str) -> list[Message]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        inner = next((turn for turn in turns if not isinstance(turn, dict)), None) if isinstance(turns, list) else None
        kind = f"a list with {type_name(inner)}" if isinstance(turns, list) else type_name(turns)
        raise DataError(f"{location}: turns: found {kind}, expected a list of objects with role and content")
    return [_read_turn(turn, location, f"turn {number}") for number, turn in enumerate(turns, start=1)]


def _read_turn(turn: dict[str, Any], location: str, name: str) -> Message:
    role_key, content_key = next(
        (keys for keys in _ROLE_KEYS if keys[0] in turn and keys[1] in turn),
        ("from", "value") if "from" in turn else ("role", "content"),
    )
    given = turn.get(role_key)
    alias = given.lower().replace(" ", "_") if isinstance(given, str) else given
    if not isinstance(alias, str) or alias not in _ROLES:
        raise DataError(f"{location}: {name}: {role_key}: found {shorten(given)}, expected one of {', '.join(_ROLES)}")
    role, content = _ROLES[alias], turn.get(content_key)
    if alias in _CALL_ROLES:
        return {"role": role, "content": "", "tool_calls": _read_calls(_json(content, location, name), location, name)}
    calls = _read_calls(turn.get("tool_calls"), location, name) if turn.get("tool_calls") else None
    if turn.get("function_call"):
        calls = _read_calls(turn["function_call"], location, name)
    if calls and role != "assistant":
        raise DataError(f"{location}: {name}: tool call: found in a {role} turn, expected in assistant turns only")
    text = "" if content is None and calls else _read_text(content, location, f"{name}: content")
    if role == "assistant" and not calls and "<tool_call>" in text:
        text, calls = _read_hermes_calls(text, location, name)
    if role == "tool" and (wrapped := _HERMES_RESPONSE.fullmatch(text)):
        text = wrapped[1]
    if role == "assistant" and turn.get("weight") not in (None, 1):
        raise DataError(
            f"{location}: {name}: weight: found {shorten(turn['weight'])}, expected 1 (every assistant turn is in the "
            f"loss). Remove the row"
        )
    message: Message = {"role": role, "content": text}
    reasoning_key = next((key for key in _REASONING_KEYS if turn.get(key)), None)
    if reasoning_key is not None and role == "assistant":
        message["reasoning_content"] = _read_text(turn[reasoning_key], location, f"{name}: {reasoning_key}")
    if calls:
        message["tool_calls"] = calls
    if role == "tool":
        keys = [key for key in ("name", "tool_call_id") if turn.get(key)]
        message |= {key: _read_text(turn[key], location, f"{name}: {key}") for key in keys}
    return message


def _read_hermes_calls(text: str, location: str, name: str) -> tuple[str, list[dict[str, Any]] | None]:
    """Split off the calls between <tool_call> tags, as the Hermes datasets write them."""
    calls = _HERMES_CALL.findall(text)
    rest = _HERMES_CALL.sub("", text)
    if not calls or "<tool_call>" in rest:
        return text, None  # tags around anything but an object are text
    before = text.partition("<tool_call>")[0]
    if rest.strip() != before.strip():
        after = shorten(rest.strip()[len(before.strip()) :].strip())
        raise DataError(
            f"{location}: {name}: found {after} after a tool call, expected calls last, as chat templates write them. "
            f"Move the text before the calls"
        )
    return before.strip(), _read_calls([_json(call, location, name) for call in calls], location, name)


def _read_calls(calls: Any, location: str, name: str) -> list[dict[str, Any]]:
    """Convert tool calls to the form that chat templates document: a name, and arguments as an object."""
    converted = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise DataError(f"{location}: {name}: tool call: found no name, expected {{'name': …, 'arguments': {{…}}}}")
        arguments = _first_set(function, "arguments", "parameters")
        argument_name = f"{name}: arguments of {shorten(function['name'])[1:-1]}"
        if isinstance(arguments, str):
            arguments = _json(arguments or "{}", location, argument_name)
        if not isinstance(arguments, dict | None):
            raise DataError(f"{location}: {argument_name}: found {type_name(arguments)}, expected an object")
        converted_call = {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
        if isinstance(call.get("id"), str):
            converted_call["id"] = call["id"]
        _check_json(converted_call, location, f"{name}: tool call")
        converted.append(converted_call)
    return converted


def _read_tools(tools: Any, location: str) -> list[dict[str, Any]] | None:
    """Convert the tools that a row offers to {"type": "function", "function": {…}}."""
    if isinstance(tools, str):
        tools = _json(tools, location, "tools") if tools.strip() else None
    if tools in (None, [], {}):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        kind = "a list of other values" if isinstance(tools, list) else type_name(tools)
        raise DataError(f"{location}: tools: found {kind}, expected a list of functions")
    converted = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    for tool in converted:
        if not isinstance(tool["function"], dict) or not isinstance(tool["function"].get("name"), str):
            raise DataError(
                f"{location}: tools: found a tool without a name, expected {{'name': …, 'parameters': {{…}}}}"
            )
    _check_json(converted, location, "tools")
    return converted


def _first_set(values: dict[str, Any], *keys: str) -> Any:
    """Return the first value that is not null; Parquet writes null for keys that a row does not have."""
    return next((values[key] for key in keys if values.get(key) is not None), None)


def _json(text: Any, location: str, name: str) -> Any:
    """Parse JSON that a row holds as a string."""
    return parse_json(text, f"{location}: {name}") if isinstance(text, str) else text


def _read_prompt_completion(values: dict[str, Any], location: str) -> list[Message]:
    messages = []
    for role, key in (("user", "prompt"), ("assistant", "completion")):
        side = values[key]
        messages += _read_turns(side, location) if isinstance(side, list) else [_make_turn(role, side, key, location)]
    return _with_system(values, messages, location)


def _read_instruction(values: dict[str, Any], location: str) -> list[Message]:
    instruction = _read_text(values["instruction"], location, "instruction")
    context = values.get("input")
    if context not in (None, ""):
        instruction = f"{instruction}\n\n{_read_text(context, location, 'input')}"
    turns = [{"role": "user", "content": instruction}, _make_turn("assistant", values["output"], "output", location)]
    return _with_system(values, [*_read_history(values.get("history"), location), *turns], location)


def _read_history(history: Any, location: str) -> list[Message]:
    """Convert Alpaca's earlier turns: a list of [prompt, answer]."""
    if history in (None, []):
        return []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        kind = "a list of other values" if isinstance(history, list) else type_name(history)
        raise DataError(f"{location}: history: found {kind}, expected a list of [prompt, answer]")
    return [
        _make_turn(role, text, "history", location)
        for pair in history
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _read_question_answer(values: dict[str, Any], location: str) -> list[Message]:
    turns = [
        _make_turn("user", values["question"], "question", location),
        _make_turn("assistant", values["answer"], "answer", location),
    ]
    return _with_system(values, turns, location)


def _make_turn(role: str, content: Any, key: str, location: str) -> Message:
    return {"role": role, "content": _read_text(content, location, key)}


def _read_text(content: Any, location: str, name: str) -> str:
    if isinstance(content, list):
        content = _join_parts(content, location, name)
    if not isinstance(content, str):
        raise DataError(f"{location}: {name}: found {type_name(content)}, expected a string")
    _check_characters(content, location, name)
    return content


def _join_parts(parts: list[Any], location: str, name: str) -> Any:
    """Join OpenAI's list of content parts, if all are text."""
    if not parts or not all(isinstance(part, dict) for part in parts):
        return parts
    other = next((part["type"] for part in parts if part.get("type") not in (None, "text")), None)
    if other is not None:
        raise DataError(f"{location}: {name}: found a part of type {shorten(other)}, expected text parts only")
    texts = [part.get("text") for part in parts]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None


def _check_characters(text: str, location: str, name: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{location}: {name}: found a lone surrogate, expected valid Unicode. Remove it") from error
    if "\x00" in text:
        raise DataError(f"{location}: {name}: found a NUL character, expected text. Remove it")


def _check_json(value: Any, location: str, name: str) -> None:
    """Check that a value can be written as JSON: Parquet has more types, and the parser reads deeper nesting."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"{location}: {name}: not representable as JSON: {error}") from error
    except RecursionError as error:
        raise DataError(f"{location}: {name}: nesting: expected at most {_MAX_DEPTH} levels") from error
    if _depth(value) > _MAX_DEPTH:
        raise DataError(f"{location}: {name}: nesting: found {_depth(value)} levels, expected at most {_MAX_DEPTH}")
    _check_characters(text.replace("\\u0000", "\x00"), location, name)


def _depth(value: Any) -> int:
    """Return the nesting depth of lists and objects."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return depth


def _describe_keys(values: dict[str, Any]) -> str:
    """Return a row's keys for an error message."""
    names = [shorten(key)[1:-1] for key in list(values)[:10]]
    return ", ".join(names) + (f" and {len(values) - 10} others" if len(values) > 10 else "") or "none"


def _check_turns(messages: list[Message], location: str) -> None:
    """Check the order of roles: an optional system turn, user and assistant alternate, tools answer calls, an assistant
    turn is last."""
    first = int(bool(messages) and messages[0]["role"] == "system")
    if len(messages) == first:
        raise DataError(f"{location}: turns: found no user and assistant turns, expected at least one of each")
    previous = "start"
    for number, message in enumerate(messages[first:], start=first + 1):
        role, calls = message["role"], bool(message.get("tool_calls"))
        expected = _MAY_FOLLOW[previous]
        if role not in expected:
            raise DataError(
                f"{location}: turn {number}: role: found {role}, expected {' or '.join(expected)} "
                f"({_ORDER_RULES.get(role, 'user and assistant alternate')})"
            )
        if not message["content"].strip() and role != "tool" and not calls:
            raise DataError(f"{location}: turn {number}: {role} content: found no text, expected some")
        previous = "call" if calls else role
    if previous not in ("assistant", "call"):
        raise DataError(f"{location}: last turn: role: found {previous}, expected assistant")


_MAY_FOLLOW = {
    "start": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "call": ("tool",),
    "tool": ("assistant", "tool"),
}
_ORDER_RULES = {"tool": "a tool turn follows a tool call", "system": "the system turn is first"}


_FORMATS: tuple[tuple[tuple[str, ...], Callable[[dict[str, Any], str], list[Message]]], ...] = (
    (("messages",), _read_messages),
    (("conversations",), _read_conversations),
    (
        ("conversation",),
        lambda values, location: _read_conversations({**values, "conversations": values["conversation"]}, location),
    ),
    (("prompt", "completion"), _read_prompt_completion),
    (("instruction", "output"), _read_instruction),
    (("question", "answer"), _read_question_answer),
)
