"""Converts conversations to token ids and a loss mask.

The text is what the tokenizer's own chat template renders, so training and inference see the same text;
sft_recipes.data.assistant_spans locates the assistant in it. Only the template writes special tokens: the same
characters in a message become ordinary tokens.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft_recipes.data.assistant_spans import RenderedTemplate, RenderedTemplateCache
from sft_recipes.data.chat_template import (
    AmbiguousTemplateError,
    ChatTemplate,
    TemplateMismatchError,
    Tools,
    training_templates,
)
from sft_recipes.data.formats import Conversation, Message
from sft_recipes.data.tokenizer import special_tokens
from sft_recipes.runtime.errors import DataError

IGNORED = -100  # the label of a token outside the loss (torch.nn.CrossEntropyLoss.ignore_index)

_REASONING = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)  # at the beginning of an answer
_MAX_TEMPLATES = 256  # rows may have template variables of their own
_FIX = "Set model.chat_template=<a .jinja file>"


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenized conversation.

    Attributes:
        spans: the assistant's [start, end) tokens.
        location: file and line of the row.
        stop_ids: ids of the tokens that end the assistant's turns.
        note: how the text differs from the text at inference; empty if it does not.
        span_source: how the assistant spans were found.
        special_tokens_as_text: a message contains a special token's characters.
        dropped_reasoning: the template drops the reasoning of earlier turns.
        shares_prompt_token: the first token of an answer begins in the prompt.
        generated_call_ids: its tool calls got ids that the row does not have.
    """

    input_ids: list[int]
    spans: tuple[tuple[int, int], ...]
    location: str = ""
    stop_ids: frozenset[int] = frozenset()
    note: str = ""
    span_source: str = ""
    special_tokens_as_text: bool = False
    dropped_reasoning: bool = False
    shares_prompt_token: bool = False
    generated_call_ids: bool = False

    @property
    def labels(self) -> list[int]:
        """The token ids in the loss, IGNORED elsewhere."""
        labels = [IGNORED] * len(self.input_ids)
        for start, end in self.spans:
            labels[start:end] = self.input_ids[start:end]
        return labels

    def supervised_tokens(self) -> int:
        """Return the number of tokens in the loss, without the first of the row, which nothing predicts."""
        return sum(end - max(start, 1) for start, end in self.spans)

    def truncate(self, length: int) -> Example:
        """Return the first `length` tokens, or fewer so that no question is left whose answer is cut off."""
        if len(self.input_ids) <= length:
            return self
        spans = tuple((start, min(end, length)) for start, end in self.spans if start < length)
        end = spans[-1][1] if spans and len(spans) < len(self.spans) else length
        return Example(self.input_ids[:end], spans, self.location)


@dataclass(frozen=True, slots=True)
class _RenderedConversation:
    """A rendered conversation.

    Attributes:
        spans: the assistant's [start, end) characters.
        escapes: where special tokens begin that are only text.
        special_token_count: the number of special tokens that its ids may contain.
        generated_call_ids: as in `Example`.
    """

    text: str
    spans: list[tuple[int, int]]
    escapes: tuple[int, ...] = ()
    rendered: RenderedTemplate | None = None
    special_token_count: int = 0
    note: str = ""
    generated_call_ids: bool = False

    def escaped_text(self) -> str:
        """Return the text with a placeholder at each escape, so that no tokenizer finds a special token there.

        Tokenizing in pieces would work for byte-level tokenizers; others put a space before each piece.
        """
        if not self.escapes:
            return self.text
        characters, placeholder = list(self.text), self.placeholder()
        for position in self.escapes:
            characters[position] = placeholder
        return "".join(characters)

    def placeholder(self) -> str:
        """Return a private-use character that is not in the text."""
        return next(character for character in map(chr, range(0xE000, 0xF8FF)) if character not in self.text)


class ConversationTokenizer:
    """A tokenizer with its chat template, from conversations to token ids and assistant spans."""

    def __init__(self, tokenizer: Any, date: datetime.date):
        """Give templates that write today's date `date`, the plan's, so that a resumed run gets the same tokens."""
        self.tokenizer = tokenizer
        self._date = date
        self._encoder = tokenizer.backend_tokenizer  # what tokenizer(…) calls, without its copies of every list
        self._encoder.no_truncation()
        self._encoder.no_padding()
        registered, special = special_tokens(tokenizer)
        self._special_ids = frozenset(tokenizer.convert_tokens_to_ids(sorted(special)))
        longest_first = sorted(special, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._registered = registered
        self._adds_bos = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
        self._by_source: dict[tuple[str, str], RenderedTemplateCache] = {}
        self._literal_counts: dict[int, tuple[RenderedTemplate, int, str]] = {}

    def tokenize(self, conversations: Sequence[Conversation]) -> list[Example]:
        """Tokenize conversations and locate the assistant's tokens in them, end of turn included.

        Special tokens are not added: the template wrote the ones it needs, so there is one BOS, never two.

        Raises:
            DataError: the template rejects a conversation, its assistant turns cannot be located with certainty, or a
                turn does not end with a special token.
        """
        examples = self.tokenize_or_reject(conversations)
        return [_raise_rejection(example) for example in examples]

    def tokenize_or_reject(self, conversations: Sequence[Conversation]) -> list[Example | DataError]:
        """Tokenize conversations as `tokenize`; a rejected one is its error."""
        rendered = [_try(self._render, conversation) for conversation in conversations]
        accepted = [conversation for conversation in rendered if not isinstance(conversation, DataError)]
        encoded = iter(self._encode([conversation.escaped_text() for conversation in accepted]))
        return [
            row if isinstance(row, DataError) else _try(self._make_example, conversation.location, row, next(encoded))
            for conversation, row in zip(conversations, rendered, strict=True)
        ]

    def tokenize_prompt(
        self,
        messages: Sequence[Message],
        tools: Tools = None,
        location: str = "the prompt",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the token ids of a conversation with the generation prompt.

        Raises:
            DataError: the template rejects the conversation.
        """
        templates = self._templates(tools, template_kwargs or {})
        prepared = [self._split_reasoning(message, templates) for message in messages]
        try:
            prepared, text, _ = _with_ids_if_needed(
                prepared, templates, lambda given: templates.template.render(given, tools, add_generation_prompt=True)
            )
        except AmbiguousTemplateError as error:
            raise DataError(f"{location}: chat template: {error}. {_FIX}") from error
        escapes, position = [], 0
        for message in prepared:
            content = message["content"].strip()
            start = text.find(content, position) if content else -1
            if start >= 0:
                escapes += [start + match.start() for match in self._special_pattern.finditer(content)]
                position = start + len(content)
        rendered = _RenderedConversation(text, [], tuple(escapes))
        return self._unescape(rendered, self._encode([rendered.escaped_text()])[0])[0]

    def _templates(self, tools: Tools, template_kwargs: Mapping[str, Any]) -> RenderedTemplateCache:
        try:
            source = self.tokenizer.get_chat_template(None, tools)
        except ValueError as error:
            raise DataError(f"model.name_or_path: {error}") from error
        key = source, json.dumps(template_kwargs, sort_keys=True) if template_kwargs else ""
        if key not in self._by_source:
            if len(self._by_source) >= _MAX_TEMPLATES:
                self._by_source.clear()
            variables = {**self.tokenizer.special_tokens_map, **template_kwargs}
            shipped = training_templates().get(source)
            try:
                template = ChatTemplate(source, variables, self._date)
                training = ChatTemplate(shipped, variables, self._date) if shipped else None
            except Exception as error:  # a Jinja syntax error, or any other error of its compiler
                raise DataError(f"chat template: not valid Jinja: {error}. {_FIX}") from error
            self._by_source[key] = RenderedTemplateCache(template, training, self._registered, self._special_pattern)
        return self._by_source[key]

    @staticmethod
    def _split_reasoning(message: Message, templates: RenderedTemplateCache) -> Message:
        """Move reasoning to its own field if the template reads one, under both names that templates read."""
        content = message["content"]
        if templates.template.reads_reasoning and message["role"] == "assistant" and "reasoning_content" not in message:
            match = _REASONING.match(content)
            if match:
                message = {**message, "content": content[match.end() :].lstrip("\n")}
                if match[1].strip():  # an empty block means no reasoning
                    message["reasoning_content"] = match[1].strip("\n")
        if "reasoning_content" in message:
            return {**message, "thinking": message["reasoning_content"]}  # as apply_chat_template does
        return message

    def _render(self, conversation: Conversation) -> _RenderedConversation:
        templates = self._templates(conversation.tools, conversation.template_kwargs)
        messages = [self._split_reasoning(message, templates) for message in conversation.messages]
        try:
            self._check_calls(messages, conversation.tools)
            messages, filled, generated_ids = _with_ids_if_needed(
                messages, templates, lambda given: self._fill(templates, given, conversation)
            )
            rendered, text, spans, slots = filled
        except AmbiguousTemplateError as error:
            hint = " (does it read </think> in a text as the end of reasoning?)" if "</think>" in str(messages) else ""
            raise DataError(f"{conversation.location}: chat template: {error}{hint}. {_FIX}") from error
        literal_count, note = self._count_in_literals(rendered, messages, conversation)
        escapes, reasoning_count = [], 0
        for (start, end), slot in zip(slots, rendered.slots, strict=True):
            if self._special_pattern.search(slot.text(messages)):
                content = text[start:end]
                reasoning = _REASONING.match(content) if messages[slot.message]["role"] == "assistant" else None
                tags = {reasoning.start(1) - len("<think>"), reasoning.end(1)} if reasoning else set()
                positions = [match.start() for match in self._special_pattern.finditer(content)]
                escapes += [start + position for position in positions if position not in tags]
                reasoning_count += sum(position in tags for position in positions)
        special_tokens = literal_count + reasoning_count
        return _RenderedConversation(text, spans, tuple(escapes), rendered, special_tokens, note, generated_ids)

    def _fill(
        self, templates: RenderedTemplateCache, messages: Sequence[Message], conversation: Conversation
    ) -> tuple[RenderedTemplate, str, list[tuple[int, int]], list[tuple[int, int]]]:
        """Return a rendered template that, once filled, equals the template's output: the shape's, or the row's own."""
        mismatch = None
        for make in (templates.for_shape, templates.for_conversation, templates.for_training_template):
            try:
                rendered = make(messages, conversation.tools, conversation.untrained)
                text, spans, slots = rendered.fill(messages)
                if text == rendered.template.render(messages, conversation.tools):
                    return rendered, text, spans, slots
            except TemplateMismatchError as error:
                mismatch = mismatch or error
        raise mismatch or AmbiguousTemplateError(
            "the template renders this conversation differently from others of its shape"
        )

    def _check_calls(self, messages: Sequence[Message], tools: Tools) -> None:
        """Check that calls and tools contain no special tokens; the template writes them unescaped."""
        other_fields = [[message.get(key) for key in ("tool_calls", "name", "tool_call_id")] for message in messages]
        for number, value in enumerate([tools, *other_fields]):
            match = self._special_pattern.search(str(value)) if value else None
            if match:
                is_call = number and messages[number - 1].get("tool_calls")
                field = f"turn {number}: tool {'call' if is_call else 'name'}" if number else "tools"
                raise AmbiguousTemplateError(f"{field}: found the special token {match.group()!r}, expected plain text")

    def _count_in_literals(
        self, rendered: RenderedTemplate, messages: Sequence[Message], conversation: Conversation
    ) -> tuple[int, str]:
        """Return how many special tokens the template itself writes, and a note on its BOS."""
        cached = self._literal_counts.get(id(rendered))
        if cached and cached[0] is rendered:
            return cached[1:]
        with_slot = {slot.message for slot in rendered.slots}
        for number, message in enumerate(messages):
            match = None if number in with_slot else self._special_pattern.search(message["content"])
            if match:
                raise DataError(
                    f"{conversation.location}: turn {number + 1}: found the special token {match.group()!r} in a row "
                    f"that the chat template renders differently from others of its shape. Remove it from the text"
                )
        ids = self._ids("x".join(rendered.literals))
        bos, bos_id = self.tokenizer.bos_token, self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos_id, bos_id]:
            raise DataError(f"{conversation.location}: chat template: found {bos} twice, expected it once. {_FIX}")
        note = f"the template writes no {bos}, which the tokenizer adds to other texts"
        count = sum(id in self._special_ids for id in ids), note if self._adds_bos and bos_id not in ids else ""
        if len(self._literal_counts) > 4096:
            self._literal_counts.clear()
        self._literal_counts[id(rendered)] = (rendered, *count)
        return count

    def _make_example(self, location: str, conversation: _RenderedConversation, encoding: Any) -> Example:
        rendered = conversation.rendered
        assert rendered is not None
        ids, index = self._unescape(conversation, encoding) if conversation.escapes else (encoding.ids, None)
        tokens = [_token_span(encoding, start, end) for start, end in conversation.spans]
        shares_prompt_token = any(
            encoding.token_to_chars(first)[0] < start
            for (first, last), (start, _) in zip(tokens, conversation.spans, strict=True)
            if last > first
        )
        special_token_count = sum(map(self._special_ids.__contains__, ids))
        if special_token_count != conversation.special_token_count or not self._decodes(conversation, encoding, ids):
            raise DataError(
                f"{location}: found a special token in a text that this tokenizer cannot encode as ordinary tokens. "
                f"Remove it from the row"
            )
        return Example(
            ids,
            tuple((index[first], index[last]) for first, last in tokens) if index else tuple(tokens),
            location,
            frozenset(self.tokenizer.convert_tokens_to_ids(list(rendered.stop_tokens))),
            "; ".join(filter(None, (rendered.note, conversation.note))),
            rendered.span_source,
            bool(conversation.escapes),
            rendered.dropped_reasoning > 0,
            shares_prompt_token,
            conversation.generated_call_ids,
        )

    def _decodes(self, conversation: _RenderedConversation, encoding: Any, ids: list[int]) -> bool:
        """Return whether the ids decode to the escaped text with each placeholder replaced by its character."""
        if not conversation.escapes:
            return True
        pieces = self.tokenizer.decode(encoding.ids).split(conversation.placeholder())
        characters = [conversation.text[position] for position in sorted(conversation.escapes)]
        if len(pieces) != len(characters) + 1:
            return False  # the tokenizer cannot encode the placeholder
        expected = pieces[0] + "".join(map("".join, zip(characters, pieces[1:], strict=True)))
        return bool(self.tokenizer.decode(ids) == expected)

    def _unescape(self, conversation: _RenderedConversation, encoding: Any) -> tuple[list[int], list[int]]:
        """Return the ids with each placeholder replaced by its character, and the new index of each id."""
        escapes, ids, index, last = set(conversation.escapes), [], [], -1
        for token, id in enumerate(encoding.ids):
            start, end = encoding.token_to_chars(token) or (-1, -1)
            index.append(len(ids))
            if start not in escapes or end != start + 1:
                ids.append(id)
            elif start != last:  # a placeholder may be several bytes
                ids.append(self._encoder.token_to_id(conversation.text[start]) or id)
                last = start
        return ids, [*index, len(ids)]

    def _ids(self, text: str) -> list[int]:
        return list(self._encode([text])[0].ids)

    def _encode(self, texts: list[str]) -> list[Any]:
        return list(self._encoder.encode_batch(texts, add_special_tokens=False))


def _try(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the function's result, or the DataError that it raises."""
    try:
        return function(*arguments)
    except DataError as error:
        return error


def _raise_rejection(example: Example | DataError) -> Example:
    if isinstance(example, DataError):
        raise example
    return example


def _with_ids_if_needed(
    messages: list[Message], templates: RenderedTemplateCache, render: Callable[[list[Message]], Any]
) -> tuple[list[Message], Any, bool]:
    """Return the messages, what `render` returns for them, and whether their tool calls got generated ids.

    They do if the template reads ids and the row has none, or if it rejects those of the row.
    """
    generated = templates.template.reads_call_ids and _lacks_call_ids(messages)
    messages = _with_call_ids(messages, keep=True) if generated else messages
    try:
        return messages, render(messages), generated
    except AmbiguousTemplateError:
        if not templates.template.reads_call_ids or not any(message.get("tool_calls") for message in messages):
            raise
    messages = _with_call_ids(messages, keep=False)
    return messages, render(messages), True


def _lacks_call_ids(messages: Sequence[Message]) -> bool:
    """Return whether a tool call has no id, or a tool's answer no id of its call."""
    calls = (call for message in messages for call in message.get("tool_calls", ()))
    answers = (message for message in messages if message["role"] == "tool")
    return any("id" not in call for call in calls) or any("tool_call_id" not in answer for answer in answers)


def _with_call_ids(messages: Sequence[Message], keep: bool) -> list[Message]:
    """Return the messages with an id in each tool call and its answer: nine letters and digits, as Mistral's templates
    require.

    An answer without an id belongs to the next unanswered call of its name, or of any name.

    Args:
        keep: keep the ids that the row has.
    """
    result, open_calls = [], []
    for number, message in enumerate(messages):
        if message.get("tool_calls"):
            calls = []
            for index, call in enumerate(message["tool_calls"]):
                text = json.dumps([number, index, call["function"]], sort_keys=True)
                new = call["id"] if keep and "id" in call else hashlib.sha256(text.encode()).hexdigest()[:9]
                open_calls.append((call.get("id"), call["function"]["name"], new))
                calls.append({**call, "id": new})
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool" and open_calls:
            by_id = [call for call in open_calls if call[0] and call[0] == message.get("tool_call_id")]
            by_name = [call for call in open_calls if call[1] == message.get("name")]
            answered = (by_id or by_name or open_calls)[0]
            open_calls.remove(answered)
            message = {**message, "tool_call_id": answered[2]}
        result.append(message)
    return result


def _token_span(encoding: Any, start: int, end: int) -> tuple[int, int]:
    """Return the [first, last + 1) tokens of the characters [start, end), ignoring characters without a token.

    A token that the first character shares with the text before it is included; one that extends beyond the end is not.
    """
    first, at = None, start
    while at < end and (first := encoding.char_to_token(at)) is None:
        at += 1
    last, at = None, end
    while at > start and (last := encoding.char_to_token(at - 1)) is None:
        at -= 1
    if first is None or last is None:
        return 0, 0
    characters = encoding.token_to_chars(last)
    while last + 1 < len(encoding) and encoding.token_to_chars(last + 1) == characters:
        last += 1  # the other bytes of a character that is several tokens
    while last >= first and encoding.token_to_chars(last)[1] > end:
        last -= 1
    return first, last + 1
