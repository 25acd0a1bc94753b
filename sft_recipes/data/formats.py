"""Recognises the forms in which people write examples, and turns each into checked chat messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sft_recipes.data.sources import RawRow
from sft_recipes.planning.schema import RecipeError

Message = dict[str, str]

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
_KNOWN = "messages, conversations, prompt/completion, instruction/input/output, or question/answer"


def messages_of(row: RawRow) -> list[Message]:
    """The row's conversation: an optional system turn, then user and assistant in turns, the assistant last.

    Raises:
        RecipeError: a row of no known form, or one whose roles or contents are wrong; names file and line.
    """
    values = row.values
    if not isinstance(values, dict):
        raise RecipeError(f"{row.where}: the row is a {_kind(values)}; wanted an object with {_KNOWN}")
    for keys, read in _FORMS:
        if all(values.get(key) is not None for key in keys):
            return _checked(read(values, row.where), row.where)
    raise RecipeError(f"{row.where}: a row with keys {', '.join(map(str, values)) or 'none'}; wanted {_KNOWN}")


def _from_turns(turns: Any, where: str, role_key: str, content_key: str) -> list[Message]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RecipeError(
            f"{where}: the conversation is a {_kind(turns)}; wanted a list of turns, each with {role_key} and "
            f"{content_key}"
        )
    found = []
    for number, turn in enumerate(turns, start=1):
        role = turn.get(role_key)
        if not isinstance(role, str) or role.lower() not in _ROLES:
            raise RecipeError(f"{where}: turn {number} has {role_key} {role!r}; wanted one of {', '.join(_ROLES)}")
        found.append({"role": _ROLES[role.lower()], "content": _string(turn.get(content_key), where, f"turn {number}")})
    return found


def _messages(values: dict[str, Any], where: str) -> list[Message]:
    return _from_turns(values["messages"], where, "role", "content")


def _conversations(values: dict[str, Any], where: str) -> list[Message]:
    turns = values["conversations"]
    openai_keys = isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "role" in turns[0]
    found = _from_turns(turns, where, *(("role", "content") if openai_keys else ("from", "value")))
    system = values.get("system")
    return [{"role": "system", "content": _string(system, where, "system")}, *found] if system else found


def _prompt_completion(values: dict[str, Any], where: str) -> list[Message]:
    prompt, completion = values["prompt"], values["completion"]
    head = _from_turns(prompt, where, "role", "content") if isinstance(prompt, list) else [_turn("user", prompt, where)]
    tail = (
        _from_turns(completion, where, "role", "content")
        if isinstance(completion, list)
        else [_turn("assistant", completion, where)]
    )
    return head + tail


def _instruction(values: dict[str, Any], where: str) -> list[Message]:
    asked = _string(values["instruction"], where, "instruction")
    given = values.get("input")
    if given not in (None, ""):
        asked = f"{asked}\n\n{_string(given, where, 'input')}"
    found = [{"role": "user", "content": asked}, _turn("assistant", values["output"], where)]
    system = values.get("system")
    return [{"role": "system", "content": _string(system, where, "system")}, *found] if system else found


def _question_answer(values: dict[str, Any], where: str) -> list[Message]:
    return [_turn("user", values["question"], where), _turn("assistant", values["answer"], where)]


def _turn(role: str, content: Any, where: str) -> Message:
    return {"role": role, "content": _string(content, where, role)}


def _string(content: Any, where: str, what: str) -> str:
    if not isinstance(content, str):
        raise RecipeError(f"{where}: the content of {what} is {_kind(content)}; wanted text")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecipeError(f"{where}: the content of {what} holds a lone surrogate, which is no character") from error
    return content


def _checked(messages: list[Message], where: str) -> list[Message]:
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not turns:
        raise RecipeError(f"{where}: no user and assistant turns; wanted at least one of each")
    for number, (message, wanted) in enumerate(zip(turns, ("user", "assistant") * len(turns), strict=False), start=1):
        if message["role"] != wanted:
            raise RecipeError(
                f"{where}: turn {number} is the {message['role']}'s; wanted the {wanted}'s: they alternate"
            )
        if not message["content"].strip():
            raise RecipeError(f"{where}: turn {number}, the {wanted}'s, is empty")
    if turns[-1]["role"] != "assistant":
        raise RecipeError(f"{where}: the conversation ends with the user; wanted an assistant's turn to learn from")
    return messages


def _kind(value: Any) -> str:
    names = {
        "NoneType": "null",
        "list": "list",
        "dict": "object",
        "str": "text",
        "int": "number",
        "float": "number",
        "bool": "boolean",
    }
    return names.get(type(value).__name__, type(value).__name__)


_FORMS: tuple[tuple[tuple[str, ...], Callable[[dict[str, Any], str], list[Message]]], ...] = (
    (("messages",), _messages),
    (("conversations",), _conversations),
    (("prompt", "completion"), _prompt_completion),
    (("instruction", "output"), _instruction),
    (("question", "answer"), _question_answer),
)
