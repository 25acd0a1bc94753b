"""Recognises the forms in which people write examples, and turns each into a checked conversation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sft_recipes.data.sources import RawRow, kind, parse, shown
from sft_recipes.runtime.errors import DataError

# role and content; an assistant's turn may have reasoning_content and tool_calls besides.
Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Checked messages, the tools that they may call, and where the row was written."""

    messages: list[Message]
    where: str
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
_CALLS = ("function_call", "tool_call")  # ShareGPT's roles whose text is the call itself
_ROLE_KEYS = (("role", "content"), ("from", "value"), ("role", "value"), ("from", "content"))
_KNOWN = "messages, conversations, prompt/completion, instruction/input/output, or question/answer"
_REASONING = ("reasoning_content", "reasoning", "thinking")
_DEEPEST = 200  # of calls and tools; far below Python's limit, which templates' own recursion would meet
_HERMES_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
_HERMES_RESPONSE = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", re.DOTALL)


def conversation_of(row: RawRow) -> Conversation:
    """The row's conversation: an optional system turn, then user and assistant in turns, the assistant last.

    Between an assistant's call and its answer stand the tools' answers.

    Raises:
        DataError: a row of no known form, or one whose roles or contents are wrong; names file and line.
    """
    values = row.values
    if not isinstance(values, dict):
        raise DataError(f"{row.where}: the row is a {kind(values)}; wanted an object with {_KNOWN}")
    forms = [(keys, read) for keys, read in _FORMS if all(values.get(key) is not None for key in keys)]
    if len(forms) != 1:
        clash = f", which say it {len(forms)} times: keep one of " if forms else "; wanted "
        known = " and ".join("/".join(keys) for keys, _ in forms) if forms else _KNOWN
        raise DataError(f"{row.where}: a row with keys {_keys(values)}{clash}{known}")
    messages = forms[0][1](values, row.where)
    tools = _tools(_first(values, "tools", "functions"), row.where)
    _check_turns(messages, row.where)
    return Conversation(messages, row.where, tools)


def text_of(conversation: Conversation) -> str:
    """All that the conversation says, with white space made one: what makes two rows the same."""
    said = [conversation.tools or ""]
    for message in conversation.messages:
        said += [message["role"], *(message[key] for key in ("reasoning_content", "content") if message.get(key))]
        said.append(message.get("tool_calls") or "")
    return " ".join(" ".join(one if isinstance(one, str) else json.dumps(one) for one in said).split())


def _messages(values: dict[str, Any], where: str) -> list[Message]:
    return _with_system(values, _from_turns(values["messages"], where), where)


def _conversations(values: dict[str, Any], where: str) -> list[Message]:
    return _with_system(values, _from_turns(values["conversations"], where), where)


def _with_system(values: dict[str, Any], messages: list[Message], where: str) -> list[Message]:
    """ShareGPT and Alpaca files may write the system turn beside the others."""
    system = values.get("system")
    if system in (None, ""):
        return messages
    if messages and messages[0]["role"] == "system":
        raise DataError(f"{where}: the row has a system key and a system turn; which is meant?")
    return [_turn("system", system, where), *messages]


def _from_turns(turns: Any, where: str) -> list[Message]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(
            f"{where}: the conversation is a {kind(turns)}; wanted a list of turns, each with role and content, or "
            f"from and value"
        )
    return [_message(turn, where, f"turn {number}") for number, turn in enumerate(turns, start=1)]


def _message(turn: dict[str, Any], where: str, what: str) -> Message:
    role_key, content_key = next(
        (keys for keys in _ROLE_KEYS if keys[0] in turn and keys[1] in turn),
        ("from", "value") if "from" in turn else ("role", "content"),
    )
    said = turn.get(role_key)
    name = said.lower().replace(" ", "_") if isinstance(said, str) else said
    if not isinstance(name, str) or name not in _ROLES:
        raise DataError(f"{where}: {what} has {role_key} {shown(said)}; wanted one of {', '.join(_ROLES)}")
    role, content = _ROLES[name], turn.get(content_key)
    if name in _CALLS:
        return {"role": role, "content": "", "tool_calls": _calls(_json(content, where, what), where, what)}
    calls = _calls(turn.get("tool_calls"), where, what) if turn.get("tool_calls") else None
    if turn.get("function_call"):
        calls = _calls(turn["function_call"], where, what)
    if calls and role != "assistant":
        raise DataError(f"{where}: {what} is the {role}'s and calls a tool; wanted calls in the assistant's turns")
    text = "" if content is None and calls else _string(content, where, what)
    if role == "assistant" and not calls and "<tool_call>" in text:
        text, calls = _hermes(text, where, what)
    if role == "tool" and (wrapped := _HERMES_RESPONSE.fullmatch(text)):
        text = wrapped[1]
    if role == "assistant" and turn.get("weight") not in (None, 1):
        raise DataError(
            f"{where}: {what} has weight {shown(turn['weight'])}; every assistant's turn is learned from: leave "
            f"the row out"
        )
    message: Message = {"role": role, "content": text}
    reasoning = next((turn[key] for key in _REASONING if turn.get(key)), None)
    if reasoning is not None and role == "assistant":
        message["reasoning_content"] = _string(reasoning, where, f"{what}'s reasoning")
    if calls:
        message["tool_calls"] = calls
    if role == "tool":
        message |= {key: _string(turn[key], where, what) for key in ("name", "tool_call_id") if turn.get(key)}
    return message


def _hermes(text: str, where: str, what: str) -> tuple[str, list[dict[str, Any]] | None]:
    """Calls that stand in the text between <tool_call> marks, as the Hermes data sets write them."""
    found = _HERMES_CALL.findall(text)
    rest = _HERMES_CALL.sub("", text)
    if not found or "<tool_call>" in rest:
        return text, None  # marks around no object are text
    said = text.partition("<tool_call>")[0]
    if rest.strip() != said.strip():
        raise DataError(
            f"{where}: {what} says {shown(rest.strip()[len(said.strip()) :].strip())} behind or between its calls, and "
            f"templates write calls last; put the text before them"
        )
    return said.strip(), _calls([_json(call, where, what) for call in found], where, what)


def _calls(calls: Any, where: str, what: str) -> list[dict[str, Any]]:
    """Tool calls in the one form that templates document: a name, and arguments as an object."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise DataError(f"{where}: {what} calls a tool without a name; wanted {{'name': …, 'arguments': {{…}}}}")
        arguments = _first(function, "arguments", "parameters")
        if isinstance(arguments, str):
            arguments = _json(arguments or "{}", where, f"{what}'s call of {shown(function['name'])[1:-1]}")
        if not isinstance(arguments, dict | None):
            raise DataError(
                f"{where}: {what} calls {shown(function['name'])[1:-1]} with a {kind(arguments)}; wanted arguments as "
                f"an object"
            )
        one = {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
        if isinstance(call.get("id"), str):
            one["id"] = call["id"]
        _check_plain(one, where, what)
        found.append(one)
    return found


def _tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    """The tools that a row offers, each as {"type": "function", "function": {…}}."""
    if isinstance(tools, str):
        tools = _json(tools, where, "tools") if tools.strip() else None
    if tools in (None, [], {}):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: tools is a {kind(tools)}; wanted a list of functions")
    found = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    for tool in found:
        if not isinstance(tool["function"], dict) or not isinstance(tool["function"].get("name"), str):
            raise DataError(f"{where}: a tool has no name; wanted {{'name': …, 'description': …, 'parameters': …}}")
    _check_plain(found, where, "tools")
    return found


def _first(values: dict[str, Any], *keys: str) -> Any:
    """The first of the keys that says something; Parquet writes null for those that a row does not have."""
    return next((values[key] for key in keys if values.get(key) is not None), None)


def _json(text: Any, where: str, what: str) -> Any:
    """JSON that a row holds as text."""
    return parse(text, f"{where}: {what}") if isinstance(text, str) else text


def _prompt_completion(values: dict[str, Any], where: str) -> list[Message]:
    sides = []
    for role, side in (("user", values["prompt"]), ("assistant", values["completion"])):
        sides += _from_turns(side, where) if isinstance(side, list) else [_turn(role, side, where)]
    return _with_system(values, sides, where)


def _instruction(values: dict[str, Any], where: str) -> list[Message]:
    asked = _string(values["instruction"], where, "instruction")
    given = values.get("input")
    if given not in (None, ""):
        asked = f"{asked}\n\n{_string(given, where, 'input')}"
    turns = [{"role": "user", "content": asked}, _turn("assistant", values["output"], where)]
    return _with_system(values, [*_history(values.get("history"), where), *turns], where)


def _history(history: Any, where: str) -> list[Message]:
    """Alpaca's earlier turns: a list of [asked, answered]."""
    if history in (None, []):
        return []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError(f"{where}: history is a {kind(history)}; wanted a list of [asked, answered]")
    return [
        _turn(role, text, where) for pair in history for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _question_answer(values: dict[str, Any], where: str) -> list[Message]:
    return _with_system(
        values, [_turn("user", values["question"], where), _turn("assistant", values["answer"], where)], where
    )


def _turn(role: str, content: Any, where: str) -> Message:
    return {"role": role, "content": _string(content, where, role)}


def _string(content: Any, where: str, what: str) -> str:
    if isinstance(content, list):
        content = _parts(content, where, what)
    if not isinstance(content, str):
        raise DataError(f"{where}: the content of {what} is {kind(content)}; wanted text")
    _check_characters(content, where, what)
    return content


def _parts(parts: list[Any], where: str, what: str) -> Any:
    """OpenAI's list of parts, where all are text."""
    if not parts or not all(isinstance(part, dict) for part in parts):
        return parts
    other = next((part["type"] for part in parts if part.get("type") not in (None, "text")), None)
    if other is not None:
        raise DataError(f"{where}: the content of {what} holds a part of type {shown(other)}; only text is trained on")
    texts = [part.get("text") for part in parts]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None


def _check_characters(text: str, where: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: the content of {what} holds a lone surrogate, which is no character") from error
    if "\x00" in text:
        raise DataError(f"{where}: the content of {what} holds a NUL character; the source is broken there")


def _check_plain(value: Any, where: str, what: str) -> None:
    """Templates write calls and tools as JSON, which has less than Parquet holds, and nests less deep than it reads."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: {what} holds what JSON has not: {error}") from error
    except RecursionError as error:
        raise DataError(f"{where}: {what} is nested too deep") from error
    if _depth(value) > _DEEPEST:
        raise DataError(f"{where}: {what} is nested {_depth(value)} deep; wanted at most {_DEEPEST}")
    _check_characters(text.replace("\\u0000", "\x00"), where, what)


def _depth(value: Any) -> int:
    """How deep lists and objects stand in each other."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
    return depth


def _keys(values: dict[str, Any]) -> str:
    """A row's keys as an error names them."""
    names = [shown(key)[1:-1] for key in list(values)[:10]]
    return ", ".join(names) + (f" and {len(values) - 10} others" if len(values) > 10 else "") or "none"


def _check_turns(messages: list[Message], where: str) -> None:
    """An optional system turn; user and assistant alternate; tools answer calls; the assistant has the last word."""
    first = int(bool(messages) and messages[0]["role"] == "system")
    if len(messages) == first:
        raise DataError(f"{where}: no user and assistant turns; wanted at least one of each")
    before = "the start"
    for number, message in enumerate(messages[first:], start=first + 1):
        role, calls = message["role"], bool(message.get("tool_calls"))
        wanted = _MAY_FOLLOW[before]
        if role not in wanted:
            raise DataError(
                f"{where}: turn {number} is the {role}'s; wanted the {' or '.join(f'{one}{_S}' for one in wanted)}: "
                f"{_RULES.get(role, 'they alternate')}"
            )
        if not message["content"].strip() and role != "tool" and not calls:
            raise DataError(f"{where}: turn {number}, the {role}'s, is empty")
        before = "a call" if calls else role
    if before not in ("assistant", "a call"):
        raise DataError(f"{where}: the conversation ends with the {before}; wanted an assistant's turn to learn from")


_S = "'s"
_MAY_FOLLOW = {
    "the start": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "a call": ("tool",),
    "tool": ("assistant", "tool"),
}
_RULES = {"tool": "tools answer calls", "system": "the system speaks first"}


_FORMS: tuple[tuple[tuple[str, ...], Callable[[dict[str, Any], str], list[Message]]], ...] = (
    (("messages",), _messages),
    (("conversations",), _conversations),
    (
        ("conversation",),
        lambda values, where: _conversations({**values, "conversations": values["conversation"]}, where),
    ),
    (("prompt", "completion"), _prompt_completion),
    (("instruction", "output"), _instruction),
    (("question", "answer"), _question_answer),
)
