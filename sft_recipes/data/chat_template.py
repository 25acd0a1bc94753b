"""Compiled chat templates with the variables they get at inference, and the training templates that TRL ships."""

import datetime
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from sft_recipes.data.formats import Message

Tools = list[dict[str, Any]] | None
Span = tuple[int, int]  # [start, end) characters


class AmbiguousTemplateError(Exception):
    """The assistant's turns cannot be located with certainty. The message does not name the row."""


class ChatTemplate:
    """A compiled chat template with its variables.

    Rendering is transformers' own, both ways of `apply_chat_template`, called directly so that a template which writes
    today's date can get the plan's date.
    """

    def __init__(self, source: str, variables: Mapping[str, Any], date: datetime.date):
        """Compile `source`; `variables` are the tokenizer's special tokens and the row's chat_template_kwargs."""
        from transformers.utils.chat_template_utils import _compile_jinja_template

        day = datetime.datetime.combine(date, datetime.time())
        self.source = source
        self.has_generation_blocks = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        self.reads_reasoning = re.search(r"reasoning_content|\.thinking|['\"]thinking['\"]", source) is not None
        self.reads_call_ids = re.search(r"tool_call_id|\.id\b|\[['\"]id['\"]\]", source) is not None
        self._compiled = _compile_jinja_template(source)
        self._compiled.globals = dict(self._compiled.globals)  # copied by each rendering; a ChainMap is slow
        self._variables: dict[str, Any] = {"documents": None, **variables, "strftime_now": day.strftime}

    def render(self, messages: Sequence[Message], tools: Tools, add_generation_prompt: bool = False) -> str:
        """Return the conversation as text.

        Raises:
            AmbiguousTemplateError: the template raises an error.
        """
        given = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        return str(self._call(self._compiled.render, **given))

    def render_with_spans(self, messages: Sequence[Message], tools: Tools) -> tuple[str, list[Span]]:
        """Return the conversation as text and the [start, end) characters of its generation blocks.

        Raises:
            AmbiguousTemplateError: the template raises an error.
        """
        from transformers.utils.chat_template_utils import _render_with_assistant_indices as render

        text, spans = self._call(render, self._compiled, messages, tools, add_generation_prompt=False)
        return text, _merge_spans(spans)

    def _call(self, render: Callable[..., Any], *arguments: Any, **given: Any) -> Any:
        try:
            return render(*arguments, **given, **self._variables)
        except Exception as error:  # a template can raise any exception
            raise AmbiguousTemplateError(f"the template raises an error: {error}") from error


@cache
def training_templates() -> dict[str, str]:
    """Return TRL's training template for each template it knows, keyed by that template's text.

    They are read from TRL's files: importing TRL takes seconds. `trl.chat_template_utils.get_training_chat_template`
    selects the same ones (compared in tests/unit/test_chat_template_families.py).
    """
    package = importlib.util.find_spec("trl")
    folder = Path(str(package and package.origin)).parent / "chat_templates"
    texts = {file.stem: file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.jinja"))}
    return {text: texts[f"{name}_training"] for name, text in texts.items() if f"{name}_training" in texts}


def _merge_spans(spans: Iterable[Span]) -> list[Span]:
    """Drop empty spans and merge adjacent ones."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif end > start:
            merged.append((start, end))
    return merged
