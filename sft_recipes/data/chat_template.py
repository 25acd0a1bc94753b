"""A compiled chat template, given what it sees at inference, and the training templates that TRL ships for some."""

from __future__ import annotations

import datetime
import importlib.util
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from sft_recipes.data.formats import Message

Tools = list[dict[str, Any]] | None


class UnclearError(Exception):
    """The assistant's turns cannot be told for certain; the message says why, without the row's place."""


class OtherwiseError(UnclearError):
    """The template treats texts by what they say, so a shape's skeleton does not serve; a row's own may."""


class Template:
    """A compiled chat template, with what it sees besides the conversation.

    Rendering is transformers' own (`apply_chat_template` calls the same two functions); called directly, because only
    so can a template that asks for today's date get the plan's.
    """

    def __init__(self, source: str, special_tokens: dict[str, str], date: datetime.date):
        from transformers.utils.chat_template_utils import _compile_jinja_template

        day = datetime.datetime.combine(date, datetime.time())
        self.source = source
        self.tagged = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        self.reads_reasoning = re.search(r"reasoning_content|\.thinking|['\"]thinking['\"]", source) is not None
        self._compiled = _compile_jinja_template(source)
        self._variables: dict[str, Any] = {**special_tokens, "documents": None, "strftime_now": day.strftime}

    def render(self, messages: Sequence[Message], tools: Tools, add_generation_prompt: bool = False) -> str:
        """The conversation as text.

        Raises:
            UnclearError: the template refuses it.
        """
        try:
            return str(
                self._compiled.render(
                    messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, **self._variables
                )
            )
        except Exception as error:  # whatever a program of somebody else's raises
            raise UnclearError(f"the chat template refuses this conversation: {error}") from error

    def generation(self, messages: Sequence[Message], tools: Tools) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and the [start, end) characters of its generation blocks.

        Raises:
            UnclearError: the template refuses it.
        """
        from transformers.utils.chat_template_utils import _render_with_assistant_indices

        others = {key: value for key, value in self._variables.items() if key != "documents"}
        try:
            text, found = _render_with_assistant_indices(self._compiled, messages, tools, None, False, **others)
        except Exception as error:  # as above
            raise UnclearError(f"the chat template refuses this conversation: {error}") from error
        return str(text), _joined(found)


@cache
def training_templates() -> dict[str, str]:
    """TRL's training template for each template that it knows, by the template's text.

    They are read from its files: importing TRL takes seconds. trl.chat_template_utils.get_training_chat_template is
    the same by a chain of comparisons (tests/unit/test_chat_template_families.py holds the two against each other).
    """
    package = importlib.util.find_spec("trl")
    folder = Path(next(iter((package and package.submodule_search_locations) or [""]))) / "chat_templates"
    pairs = ((file, folder / f"{file.stem}_training.jinja") for file in sorted(folder.glob("*.jinja")))
    return {
        original.read_text(encoding="utf-8"): training.read_text(encoding="utf-8")
        for original, training in pairs
        if training.is_file()
    }


def _joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans without the empty ones, those that touch made one."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        elif end > start:
            joined.append((start, end))
    return joined
