"""Recognizes the common formats of chat data and converts each row to a checked conversation."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from sft_recipes.config.schema import RESERVED_TEMPLATE_VARIABLES, DataSource
from sft_recipes.data import columns
from sft_recipes.data.sources import RawRow, parse_json, shorten, type_name
from sft_recipes.runtime.errors import DataError

# role and content; an assistant message may also have reasoning_content and tool_calls.
Message = dict[str, Any]

TRAILING = "turns after the last answer dropped"
GREETING = "assistant turns before the first user turn: context, not in the loss"
CONTEXT_TURNS = "assistant turns marked as context or in the prompt: not in the loss"
REPEATED = "consecutive turns of one role"
NOT_TRAINED = "no assistant turn in the loss: not used"


@dataclass(frozen=True)
class Conversation:
    """Checked messages, the tools they may call, and the location of the row.

    Attributes:
        untrained: numbers of the assistant messages that are context only; the first message is 0.
        template_kwargs: the chat template's variables for this row.
        columns: the row's columns that have a value.
        ignored_keys: keys of its messages that are not read.
        conventions: what was applied to make the row a conversation.
    """

    messages: list[Message]
    location: str
    tools: list[dict[str, Any]] | None = None
    untrained: frozenset[int] = frozenset()
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    ignored_keys: tuple[str, ...] = ()
    conventions: tuple[str, ...] = ()


_ROLES = {alias: role for role, aliases in columns.NAMES["roles"].items() for alias in aliases}
_FLAGS = ("train", "trainable", "loss", "weight", "loss_weight")  # whether an assistant turn is in the loss
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_READ = ("role", "from", "content", "value", "tool_calls", "function_call", "name", "tool_call_id")
_KEYS = {*_READ, *_FLAGS, *_REASONING_KEYS}
_HERMES_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
_HERMES_RESPONSE = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", re.DOTALL)


def conversation_of(row: RawRow, settings: DataSource | None = None) -> Conversation:
    """Convert a row to a conversation: system, user, assistant and tool turns, the last an assistant's.

    Common deviations from an alternating order are kept or repaired, and named in `conventions`; the chat template
    decides whether it can render them.

    Raises:
        DataError: the row has an unknown format, or its roles or contents are invalid; names file and line.
        ColumnError: a column would be ignored although it changes what the row means.
    """
    if isinstance(row.values, DataError):
        raise row.values
    try:
        return _convert(row, settings or DataSource(""))
    except DataError as error:
        raise type(error)(f"{row.location}: {error}") from error
    except RecursionError as error:
        raise DataError(f"{row.location}: nesting: found too many levels") from error


def _convert(row: RawRow, settings: DataSource) -> Conversation:
    given = row.values
    if not isinstance(given, dict):
        raise DataError(f"row: found {type_name(given)}, expected an object with {columns.FORMAT_NAMES}")
    names = columns.names_with_values(given)
    format = columns.select_columns(names, settings).format
    values = columns.map_columns(given, settings.columns) if settings.columns else given
    messages = _read_messages(values, format)
    ignored_keys = tuple(key for message in messages for key in message.pop("ignored", ()))
    for key in ignored_keys:
        columns.check_message_key(key, settings)
    if (system := values.get("system")) not in (None, ""):  # as ShareGPT and Alpaca files have it
        if messages and messages[0]["role"] == "system":
            raise DataError("system prompt: found a system key and a system turn. Keep one of them")
        messages.insert(0, _make_turn("system", system, "system"))
    conventions = [CONTEXT_TURNS] if not all(message.get("trained", True) for message in messages) else []
    tools = _read_tools(_first_set(values, "tools", "functions"))
    template_kwargs = _read_template_kwargs(values.get("chat_template_kwargs"), settings)
    conventions += _arrange_turns(messages)
    untrained = frozenset(number for number, message in enumerate(messages) if not message.pop("trained", True))
    if all(message["role"] != "assistant" or number in untrained for number, message in enumerate(messages)):
        conventions.append(NOT_TRAINED)
    return Conversation(
        messages, row.location, tools, untrained, template_kwargs, names, ignored_keys, tuple(conventions)
    )


def text_of(conversation: Conversation) -> str:
    """Return everything in the conversation; equal for duplicate rows, except for white space."""
    whole = (conversation.tools, conversation.template_kwargs, sorted(conversation.untrained))
    parts = [json.dumps(value) for value in whole if value]
    for message in conversation.messages:
        parts += [message["role"], message.get("reasoning_content") or "", message["content"] or ""]
        if calls := message.get("tool_calls"):
            parts.append(json.dumps(calls))
    return " ".join(parts)


def _read_messages(values: dict[str, Any], format: tuple[str, ...]) -> list[Message]:
    """Read the turns of a row by its format; in pairs, the prompt's turns are not in the loss."""
    if len(format) == 1:
        return _read_turns(values[format[0]])
    prompt, answer = values[format[0]], values[format[1]]
    if format[0] == "instruction":
        instruction = _read_text(prompt, "instruction")
        extra = next((key for key in ("input", "context") if values.get(key) not in (None, "")), None)
        if extra:
            instruction = f"{instruction}\n\n{_read_text(values[extra], extra)}"
        turns = [{"role": "user", "content": instruction}, _make_turn("assistant", answer, format[1])]
        return [*_read_history(values.get("history")), *turns]
    before = _read_side("user", prompt, format[0])
    for turn in before:
        turn["trained"] = turn["role"] != "assistant"
    return [*before, *_read_side("assistant", answer, format[1])]


def _read_history(history: Any) -> list[Message]:
    """Convert Alpaca's earlier turns: a list of [prompt, answer]."""
    pairs, roles = history or [], ("user", "assistant")
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise DataError(f"history: found {shorten(history)}, expected a list of [prompt, answer]")
    return [_make_turn(role, text, "history") for pair in pairs for role, text in zip(roles, pair, strict=True)]


def _read_side(role: str, side: Any, key: str) -> list[Message]:
    """Read a prompt or an answer: a text, a list of turns, or one turn as preference sets write their answers."""
    if isinstance(side, dict) and {"role", "from"} & side.keys() and {"content", "value"} & side.keys():
        side = [side]
    is_turns = isinstance(side, list) and all(isinstance(turn, dict) and "type" not in turn for turn in side)
    return _read_turns(side) if is_turns else [_make_turn(role, side, key)]


def _make_turn(role: str, content: Any, key: str) -> Message:
    return {"role": role, "content": _read_text(content, key)}


def _read_turns(turns: Any) -> list[Message]:
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = parse_json(turns, "turns")
    if not isinstance(turns, list):
        raise DataError(f"turns: found {type_name(turns)}, expected a list of objects with role and content")
    return [_read_turn(turn, f"turn {number}") for number, turn in enumerate(turns, start=1)]


def _read_turn(turn: Any, name: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{name}: found {type_name(turn)}, expected an object with role and content")
    role_key = "from" if "from" in turn and "role" not in turn else "role"
    given, content = turn.get(role_key), turn.get("content", turn.get("value"))
    alias = given.lower().replace(" ", "_") if isinstance(given, str) else ""
    if alias not in _ROLES:
        raise DataError(f"{name}: {role_key}: found {shorten(given)}, expected one of {', '.join(_ROLES)}")
    role = _ROLES[alias]
    message: Message = {"role": role}
    if len(turn) > 2:  # most turns are a role and a content
        ignored = [key for key in turn if key not in _KEYS and turn[key] is not None]
        message |= {"trained": _read_flags(turn, role, name), "ignored": ignored}
    calls = _read_calls(turn.get("function_call") or turn.get("tool_calls") or [], name)
    if alias in ("function_call", "tool_call"):
        calls, content = _read_calls(_json(content, name), name), ""
    if calls and role != "assistant":
        raise DataError(f"{name}: tool call: found in a {role} turn, expected in assistant turns only")
    text = "" if content is None and calls else _read_text(content, f"{name}: content")
    if role == "assistant" and not calls and "<tool_call>" in text:
        text, calls = _read_hermes_calls(text, name)
    if role == "tool" and (wrapped := _HERMES_RESPONSE.fullmatch(text)):
        text = wrapped[1]
    message["content"] = text
    if role == "assistant" and (reasoning := next((key for key in _REASONING_KEYS if turn.get(key)), None)):
        message["reasoning_content"] = _read_text(turn[reasoning], f"{name}: {reasoning}")
    if calls:
        message["tool_calls"] = calls
    if role == "tool":
        message |= {key: _read_text(turn[key], f"{name}: {key}") for key in ("name", "tool_call_id") if turn.get(key)}
    return message


def _read_flags(turn: dict[str, Any], role: str, name: str) -> bool:
    """Return false if the flags of an assistant turn keep it out of the loss.

    Other roles than the assistant are never in the loss, so a flag that asks for it is rejected.
    """
    flags = {key: turn[key] for key in _FLAGS if turn.get(key) is not None}
    for key, value in flags.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise DataError(f"{name}: {key}: found {shorten(value)}, expected 0 or 1, true or false")
        if role in ("user", "tool") and value:
            raise DataError(f"{name}: {key}: found true in a {role} turn, which is never in the loss. Remove the flag")
    return role != "assistant" or all(flags.values())


def _read_template_kwargs(given: Any, settings: DataSource) -> dict[str, Any]:
    """Return the template's variables: the row's over the recipe's."""
    if not given:
        return settings.chat_template_kwargs
    given = _json(given, "chat_template_kwargs")
    if not isinstance(given, dict) or RESERVED_TEMPLATE_VARIABLES & given.keys():
        raise DataError(f"chat_template_kwargs: found {shorten(given)}, expected an object without tools or messages")
    _check_json(given, "chat_template_kwargs")
    return {**settings.chat_template_kwargs, **given}


def _read_hermes_calls(text: str, name: str) -> tuple[str, list[dict[str, Any]]]:
    """Split off the calls between <tool_call> tags, as the Hermes datasets write them."""
    calls = _HERMES_CALL.findall(text)
    rest = _HERMES_CALL.sub("", text)
    if not calls or "<tool_call>" in rest:
        return text, []  # tags around anything but an object are text
    before = text.partition("<tool_call>")[0].strip()
    if rest.strip() != before:
        raise DataError(f"{name}: found text after a tool call, expected calls last. Move the text before them")
    return before, _read_calls([_json(call, name) for call in calls], name)


def _read_calls(calls: Any, name: str) -> list[dict[str, Any]]:
    """Convert tool calls to the form that chat templates document: a name, and arguments as an object."""
    converted = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else call
        given = function.get("name") if isinstance(function, dict) else None
        if not isinstance(given, str) or not given.strip():
            raise DataError(f"{name}: tool call: found no name, expected {{'name': …, 'arguments': {{…}}}}")
        arguments = _first_set(function, "arguments", "parameters")
        arguments = _json("{}" if arguments in (None, "") else arguments, f"{name}: arguments")
        if not isinstance(arguments, dict):
            raise DataError(f"{name}: arguments: found {type_name(arguments)}, expected an object")
        converted_call = {"type": "function", "function": {"name": given, "arguments": arguments}}
        if isinstance(call.get("id"), str):
            converted_call["id"] = call["id"]
        _check_json(converted_call, f"{name}: tool call")
        converted.append(converted_call)
    return converted


def _read_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Convert the tools that a row offers to {"type": "function", "function": {…}}."""
    if isinstance(tools, str):
        tools = _json(tools, "tools") if tools.strip() else None
    if tools in (None, [], {}):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"tools: found {shorten(tools)}, expected a list of functions")
    converted = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    for tool in converted:
        if not isinstance(tool["function"], dict) or not isinstance(tool["function"].get("name"), str):
            raise DataError("tools: found a tool without a name, expected {'name': …, 'parameters': {…}}")
    _check_json(converted, "tools")
    return converted


def _first_set(values: dict[str, Any], *keys: str) -> Any:
    """Return the first value that is not null; Parquet writes null for keys that a row does not have."""
    return next((values[key] for key in keys if values.get(key) is not None), None)


def _json(text: Any, name: str) -> Any:
    """Parse JSON that a row holds as a string."""
    return parse_json(text, name) if isinstance(text, str) else text


def _read_text(content: Any, name: str) -> str:
    """Read a text, or OpenAI's list of content parts if all are text."""
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        other = next((part["type"] for part in content if part.get("type") not in (None, "text")), None)
        if other is not None:
            raise DataError(f"{name}: found a part of type {shorten(other)}, expected text parts only")
        texts = [_first_set(part, "text", "value", "content") for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    if not isinstance(content, str):
        raise DataError(f"{name}: found {type_name(content)}, expected a string")
    _check_characters(content, name)
    return content


def _check_characters(text: str, name: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{name}: found a lone surrogate, expected valid Unicode. Remove it") from error
    if "\x00" in text:
        raise DataError(f"{name}: found a NUL character, expected text. Remove it")


def _check_json(value: Any, name: str) -> None:
    """Check that a value can be written as JSON: Parquet has more types."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: not representable as JSON: {error}") from error
    _check_characters(text.replace("\\u0000", "\x00"), name)


def _arrange_turns(messages: list[Message]) -> list[str]:
    """Apply the conventions for turns that do not alternate, in place, and return the names of those applied.

    Raises:
        DataError: a turn without text, a tool's answer without a call, or no assistant turn.
    """
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("turns: found no assistant turn, expected user and assistant turns")
    conventions = []
    while messages[-1]["role"] in ("user", "tool"):
        messages.pop()
        conventions = [TRAILING]
    previous, first_user = "", False
    for number, message in enumerate(messages, start=1):
        role, calls = message["role"], bool(message.get("tool_calls"))
        if role == "tool" and previous not in ("call", "tool"):
            raise DataError(f"turn {number}: role: found tool after {previous or 'no turn'}, expected it after a call")
        if not message["content"].strip() and role not in ("tool", "system") and not calls:
            raise DataError(f"turn {number}: {role} content: found no text, expected some")
        if role == "assistant" and not first_user:
            message["trained"] = False
            conventions.append(GREETING)
        if role == previous and role != "tool":
            conventions.append(REPEATED)
        first_user = first_user or role == "user"
        previous = "call" if calls else role
    if messages[-1]["role"] != "assistant":
        raise DataError(f"last turn: role: found {messages[-1]['role']}, expected assistant")
    return list(dict.fromkeys(conventions))
