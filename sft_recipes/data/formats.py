"""Recognizes the common formats of chat data and converts each row to a checked conversation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sft_recipes.config.schema import RESERVED_TEMPLATE_VARIABLES, DataSource
from sft_recipes.data import columns
from sft_recipes.data.sources import RawRow, Source, parse_json, shorten, type_name
from sft_recipes.runtime.errors import DataError

# role and content; an assistant message may also have reasoning_content and tool_calls.
Message = dict[str, Any]

TRAILING = "turns after the last answer dropped"
GREETING = "assistant turns before the first user turn: context, not in the loss"
CONTEXT_TURNS = "assistant turns marked as context or in the prompt: not in the loss"
REPEATED = "consecutive turns of one role"
LATER_SYSTEM = "system turns after the first turn"
NO_RESULT = "tool calls without a result"
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
_FLAGS = ("train", "trainable", "loss", "weight", "loss_weight")  # whether an assistant turn is in the loss
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_MAX_DEPTH = 200  # of calls and tools; far below Python's recursion limit, which templates' own recursion would reach
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
    settings = settings or DataSource("")
    if isinstance(row.values, DataError):
        raise row.values
    if not isinstance(row.values, dict):
        raise DataError(
            f"{row.location}: row: found {type_name(row.values)}, expected an object with {columns.FORMAT_NAMES}"
        )
    names = columns.names_with_values(row.values)
    ignored_keys: list[str] = []
    try:
        selection = columns.select_columns(names, settings)
        values = columns.map_columns(row.values, settings.columns) if settings.columns else row.values
        reader = _READERS[selection.format[0]]
        messages = reader(values, selection.format, row.location)
        for message in messages:
            for key in message.pop("ignored", ()):
                columns.check_message_key(key, settings)
                ignored_keys.append(key)
    except DataError as error:
        if str(error).startswith(f"{row.location}: "):
            raise
        nulls = [name for name in columns.REQUIRED if name in row.values and row.values[name] is None]
        hint = f" (null: {', '.join(nulls)})" if nulls and not isinstance(error, columns.ColumnError) else ""
        raise type(error)(f"{row.location}: {error}{hint}") from None
    messages = _with_system(values, messages, row.location)
    tools = _read_tools(_first_set(values, "tools", "functions"), row.location)
    template_kwargs = _read_template_kwargs(values.get("chat_template_kwargs"), settings, row.location)
    has_context_turns = any(message.get("trained") is False for message in messages)
    conventions = [CONTEXT_TURNS] if has_context_turns else []
    conventions += _arrange_turns(messages, row.location)
    untrained = frozenset(number for number, message in enumerate(messages) if message.pop("trained", True) is False)
    if all(message["role"] != "assistant" or number in untrained for number, message in enumerate(messages)):
        conventions.append(NOT_TRAINED)
    return Conversation(
        messages, row.location, tools, untrained, template_kwargs, names, tuple(ignored_keys), tuple(conventions)
    )


def read_conversations(source: Source) -> Iterator[Conversation]:
    """Yield the conversations of a source, without the rows that are rejected (`tokenize_source` reports those)."""
    for row in source.rows():
        try:
            conversation = conversation_of(row, source.settings)
        except DataError:
            continue
        yield conversation


def text_of(conversation: Conversation) -> str:
    """Return everything in the conversation with normalized white space; equal for duplicate rows."""
    parts: list[Any] = [conversation.tools or "", conversation.template_kwargs or ""]
    parts += [str(sorted(conversation.untrained))] if conversation.untrained else []
    for message in conversation.messages:
        parts += [message["role"], *(message[key] for key in ("reasoning_content", "content") if message.get(key))]
        parts.append(message.get("tool_calls") or "")
    return " ".join(" ".join(part if isinstance(part, str) else json.dumps(part) for part in parts).split())


def _with_system(values: dict[str, Any], messages: list[Message], location: str) -> list[Message]:
    """Prepend the system turn that ShareGPT and Alpaca files may have in a separate key."""
    system = values.get("system")
    if system in (None, ""):
        return messages
    if messages and messages[0]["role"] == "system":
        raise DataError(f"{location}: system prompt: found a system key and a system turn. Keep one of them")
    return [_make_turn("system", system, "system", location), *messages]


def _read_turns(turns: Any, location: str) -> list[Message]:
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = parse_json(turns, f"{location}: turns")
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
    others: dict[str, Any] = {}
    if len(turn) > 2:  # most turns are a role and a content
        if (trained := _read_flags(turn, role, location, name)) is not None:
            others["trained"] = trained
        if ignored := [key for key in turn if key not in _KEYS and turn[key] is not None]:
            others["ignored"] = ignored
    if alias in _CALL_ROLES:
        calls = _read_calls(_json(content, location, name), location, name)
        return {"role": role, "content": "", "tool_calls": calls, **others}
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
    message: Message = {"role": role, "content": text, **others}
    reasoning_key = next((key for key in _REASONING_KEYS if turn.get(key)), None)
    if reasoning_key is not None and role == "assistant":
        message["reasoning_content"] = _read_text(turn[reasoning_key], location, f"{name}: {reasoning_key}")
    if calls:
        message["tool_calls"] = calls
    if role == "tool":
        keys = [key for key in ("name", "tool_call_id") if turn.get(key)]
        message |= {key: _read_text(turn[key], location, f"{name}: {key}") for key in keys}
    return message


def _read_flags(turn: dict[str, Any], role: str, location: str, name: str) -> bool | None:
    """Return whether a turn's own flags put it in the loss; None if it has none.

    Other roles than the assistant are never in the loss, so a flag that asks for it is rejected.
    """
    flags = {key: turn[key] for key in _FLAGS if turn.get(key) is not None}
    for key, value in flags.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise DataError(f"{location}: {name}: {key}: found {shorten(value)}, expected 0 or 1, true or false")
    if len({bool(value) for value in flags.values()}) > 1:
        raise DataError(f"{location}: {name}: found {flags}, which contradict each other. Keep one of them")
    if not flags or role == "assistant":
        return bool(next(iter(flags.values()))) if flags else None
    if any(flags.values()) and role in ("user", "tool"):
        raise DataError(
            f"{location}: {name}: {next(iter(flags))}: found true in a {role} turn, expected it in assistant turns "
            f"only. Remove the flag: this text is never in the loss"
        )
    return None


def _read_template_kwargs(given: Any, settings: DataSource, location: str) -> dict[str, Any]:
    """Return the template's variables: the row's over the recipe's."""
    if not given:
        return settings.chat_template_kwargs
    given = _json(given, location, "chat_template_kwargs")
    if not isinstance(given, dict) or RESERVED_TEMPLATE_VARIABLES & given.keys():
        raise DataError(
            f"{location}: chat_template_kwargs: found {shorten(given)}, expected an object without messages, tools and "
            f"add_generation_prompt"
        )
    _check_json(given, location, "chat_template_kwargs")
    return {**settings.chat_template_kwargs, **given}


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


def _read_messages(values: dict[str, Any], names: tuple[str, ...], location: str) -> list[Message]:
    return _read_turns(values[names[0]], location)


def _read_pair(values: dict[str, Any], names: tuple[str, ...], location: str) -> list[Message]:
    """Read a prompt and an answer, each a text or a list of turns; the prompt's turns are not in the loss."""
    turns = []
    for role, key in zip(("user", "assistant"), names, strict=True):
        side = [values[key]] if _is_turn(values[key]) else values[key]
        is_turns = isinstance(side, list) and all(isinstance(turn, dict) and "type" not in turn for turn in side)
        read = _read_turns(side, location) if is_turns else [_make_turn(role, side, key, location)]
        if role == "user":
            read = [{**turn, "trained": False} if turn["role"] == "assistant" else turn for turn in read]
        turns += read
    return turns


def _is_turn(value: Any) -> bool:
    """Return whether a value is one turn, as preference sets write their answers."""
    return isinstance(value, dict) and any(keys[0] in value and keys[1] in value for keys in _ROLE_KEYS)


def _read_instruction(values: dict[str, Any], names: tuple[str, ...], location: str) -> list[Message]:
    instruction = _read_text(values["instruction"], location, "instruction")
    extra = next((key for key in ("input", "context") if values.get(key) not in (None, "")), None)
    if extra:
        instruction = f"{instruction}\n\n{_read_text(values[extra], location, extra)}"
    turns = [{"role": "user", "content": instruction}, _make_turn("assistant", values[names[1]], names[1], location)]
    return [*_read_history(values.get("history"), location), *turns]


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
    texts = [_first_set(part, "text", "value", "content") for part in parts]
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


def _arrange_turns(messages: list[Message], location: str) -> list[str]:
    """Apply the conventions for turns that do not alternate, in place, and return the names of those applied.

    Raises:
        DataError: a turn without text, a tool's answer without a call, or no assistant turn.
    """
    conventions = []
    while messages and messages[-1]["role"] in ("user", "tool"):
        if not any(message["role"] == "assistant" for message in messages):
            break
        messages.pop()
        conventions = [TRAILING]
    previous, first_user = "", False
    for number, message in enumerate(messages, start=1):
        role, calls = message["role"], bool(message.get("tool_calls"))
        if role == "tool" and previous not in ("call", "tool"):
            raise DataError(
                f"{location}: turn {number}: role: found tool after {previous or 'no turn'}, expected it after a tool "
                f"call. Add the call, or remove the turn"
            )
        if not message["content"].strip() and role not in ("tool", "system") and not calls:
            raise DataError(f"{location}: turn {number}: {role} content: found no text, expected some")
        if role == "assistant" and not first_user:
            message["trained"] = False
            conventions.append(GREETING)
        if role == previous and role != "tool":
            conventions.append(REPEATED)
        if role == "system" and number > 1:
            conventions.append(LATER_SYSTEM)
        if previous == "call" and role != "tool":
            conventions.append(NO_RESULT)
        first_user = first_user or role == "user"
        previous = "call" if calls else role
    if not messages or not any(message["role"] == "assistant" for message in messages):
        found = f"{messages[-1]['role']} last and no assistant turn" if messages else "none"
        raise DataError(f"{location}: turns: found {found}, expected user and assistant turns")
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{location}: last turn: role: found {messages[-1]['role']}, expected assistant")
    return list(dict.fromkeys(conventions))


_KEYS = {
    *(key for keys in _ROLE_KEYS for key in keys),
    *("tool_calls", "function_call", "name", "tool_call_id"),
    *_FLAGS,
    *_REASONING_KEYS,
}
_READERS: dict[str, Callable[[dict[str, Any], tuple[str, ...], str], list[Message]]] = {
    **dict.fromkeys(("messages", "conversations", "conversation"), _read_messages),
    **dict.fromkeys(("prompt", "question", "query"), _read_pair),
    "instruction": _read_instruction,
}
