"""Converts conversations to token ids and a loss mask.

The text is what the tokenizer's own chat template renders, so training and inference see the same text;
sft_recipes.data.assistant_spans locates the assistant in it. Only the template writes special tokens: the same
characters in a message become ordinary tokens.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy

from sft_recipes.data.assistant_spans import Layout, RenderedRow, SpanFinder
from sft_recipes.data.chat_template import AmbiguousTemplateError, ChatTemplate, Tools, training_templates
from sft_recipes.data.formats import Conversation, Message
from sft_recipes.data.sources import attempt
from sft_recipes.data.tokenizer import special_tokens
from sft_recipes.runtime.errors import DataError

AS_TEXT = "special tokens in a text: encoded as text"
GENERATED_IDS = "tool call ids generated"
DROPPED_REASONING = "reasoning of earlier turns dropped, as at inference"
IGNORED = -100  # the label of a token outside the loss (torch.nn.CrossEntropyLoss.ignore_index)

_REASONING = re.compile(r"(\s*<think>)(.*?)(</think>)", re.DOTALL)  # at the beginning of an answer
_MAX_TEMPLATES, _MAX_LAYOUTS = 256, 4096  # in the cache: rows may have template variables and tools of their own
_PLACEHOLDER = 0xEF00  # the first of some private-use characters
_FIX = "Set model.chat_template=<a .jinja file>"


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenized conversation.

    Attributes:
        input_ids: int32 [tokens].
        spans: the assistant's [start, end) tokens.
        stop_ids: ids of the tokens that end the assistant's turns.
        note: how the text differs from the text at inference; empty if it does not.
        span_source: how the assistant spans were found.
        conventions: what was done to the conversation, in addition to `Conversation.conventions`.
    """

    input_ids: numpy.ndarray
    spans: tuple[tuple[int, int], ...]
    stop_ids: frozenset[int] = frozenset()
    note: str = ""
    span_source: str = ""
    conventions: tuple[str, ...] = ()

    def supervised_tokens(self) -> int:
        """Return the number of tokens in the loss, without the first of the row, which nothing predicts."""
        return sum(end - max(start, 1) for start, end in self.spans)

    def truncate(self, length: int) -> "Example":
        """Return the first `length` tokens, or fewer so that no question is left whose answer is cut off."""
        if len(self.input_ids) <= length:
            return self
        spans = tuple((start, min(end, length)) for start, end in self.spans if start < length)
        end = spans[-1][1] if spans and len(spans) < len(self.spans) else length
        return Example(self.input_ids[:end], spans)


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
        self._stop_tokens = _matching(registered)
        self._is_special = numpy.zeros(max(tokenizer.get_vocab().values()) + 1, bool)  # by id
        self._is_special[tokenizer.convert_tokens_to_ids(sorted(special))] = True
        self._special_pattern = _matching(special)
        characters = sorted({token[0] for token in special})
        self._placeholders = {character: chr(_PLACEHOLDER + index) for index, character in enumerate(characters)}
        self._originals = {ord(placeholder): character for character, placeholder in self._placeholders.items()}
        self._finder = lru_cache(_MAX_TEMPLATES)(self._make_finder)
        self._tokens_of = lru_cache(_MAX_LAYOUTS)(self._find_tokens)

    def tokenize(self, conversations: Sequence[Conversation | DataError]) -> list[Example | DataError]:
        """Tokenize conversations and locate the assistant's tokens in them, end of turn included.

        Special tokens are not added: the template wrote the ones it needs, so there is one BOS, never two.

        Returns:
            For each an example, or an error: its own, or the template rejects it, its assistant turns cannot be located
            with certainty, or a turn does not end with a special token.
        """
        rows = [row if isinstance(row, DataError) else attempt(self._render, row) for row in conversations]
        encodings = iter(self._encode([row.text for row in rows if isinstance(row, RenderedRow)]))
        return [
            attempt(self._make_example, row, next(encodings)) if isinstance(row, RenderedRow) else row for row in rows
        ]

    def tokenize_prompt(self, conversation: Conversation) -> list[int]:
        """Return the token ids of a conversation with the generation prompt.

        Raises:
            DataError: the template rejects the conversation.
        """
        row = self._render(conversation, is_prompt=True)
        encoding = self._encode([row.text])[0]
        return self._unescape(row, encoding, encoding.ids)[0]

    def _make_finder(self, source: str, template_kwargs: str) -> SpanFinder:
        variables = {**self.tokenizer.special_tokens_map, **json.loads(template_kwargs)}
        shipped = training_templates().get(source)
        try:
            template = ChatTemplate(source, variables, self._date)
            training = ChatTemplate(shipped, variables, self._date) if shipped else None
        except Exception as error:  # a Jinja syntax error, or any other error of its compiler
            raise DataError(f"chat template: not valid Jinja: {error}. {_FIX}") from error
        return SpanFinder(template, training, self._stop_tokens, self._special_pattern, self._originals)

    def _render(self, conversation: Conversation, is_prompt: bool = False) -> RenderedRow:
        try:
            source = self.tokenizer.get_chat_template(None, conversation.tools)
        except ValueError as error:
            raise DataError(f"model.name_or_path: {error}") from error
        finder = self._finder(source, json.dumps(conversation.template_kwargs, sort_keys=True))
        messages = [_split_reasoning(message, finder.template) for message in conversation.messages]
        failure = AmbiguousTemplateError("")
        for given, generated_ids in _with_possible_ids(messages, finder.template):
            escaped = [self._escape(message) for message in given]
            try:
                self._check_calls(given, conversation.tools)
                if is_prompt:
                    text = finder.template.render(escaped, conversation.tools, add_generation_prompt=True)
                    return RenderedRow(conversation.location, text, escaped != given)
                row = finder.find(conversation, given, escaped)
                self._tokens_of(row.layout)
                return replace(row, generated_call_ids=True) if generated_ids else row
            except AmbiguousTemplateError as error:
                failure = error
        raise DataError(f"{conversation.location}: chat template: {failure}. {_FIX}") from failure

    def _check_calls(self, messages: Sequence[Message], tools: Tools) -> None:
        """Check that calls and tools contain no special tokens; the template writes them unescaped."""
        others = [message for message in messages if len(message) > 2]  # most are a role and a content
        written = [message.get(key) for message in others for key in ("tool_calls", "name", "tool_call_id")]
        if (tools or others) and (match := self._special_pattern.search(str([tools, *written]))):
            raise AmbiguousTemplateError(f"tools or calls: found the special token {match[0]!r}, expected plain text")

    def _escape(self, message: Message) -> Message:
        """Return a message with a placeholder at each special token in its texts, except in the tags of reasoning."""

        def escape(text: str) -> str:
            return self._special_pattern.sub(lambda token: self._placeholders[token[0][0]] + token[0][1:], text)

        fields = [field for field in ("content", "reasoning_content", "thinking") if message.get(field)]
        if not any(self._special_pattern.search(message[field]) for field in fields):
            return message
        escaped = {**message, **{field: escape(message[field]) for field in fields}}
        if message["role"] == "assistant" and (tags := _REASONING.match(message["content"])):
            escaped["content"] = tags[1] + escape(tags[2]) + tags[3] + escape(message["content"][tags.end() :])
        return escaped

    def _find_tokens(self, layout: Layout) -> tuple[int, frozenset[int]]:
        """Return how many special tokens the template itself writes, and the ids of those that end turns.

        Raises:
            AmbiguousTemplateError: it writes BOS twice.
        """
        ids = self._encode(["x".join(layout.literals)])[0].ids
        if ids[:2] == [self.tokenizer.bos_token_id] * 2:
            raise AmbiguousTemplateError(f"found {self.tokenizer.bos_token} twice, expected it once")
        stop_ids = frozenset(self.tokenizer.convert_tokens_to_ids(list(layout.stop_tokens)))
        return int(self._is_special[ids].sum()), stop_ids

    def _make_example(self, row: RenderedRow, encoding: Any) -> Example:
        encoded = encoding.ids  # a new list each time
        ids, index = self._unescape(row, encoding, encoded)
        tokens = [_token_span(encoding, start, end) for start, end in row.spans]
        count, stop_ids = self._tokens_of(row.layout)
        if row.is_escaped or "<think>" in row.text:
            count += sum(len(self._special_pattern.findall(text)) for text in row.texts)  # the tags of reasoning
        input_ids = numpy.array(ids, numpy.int32)
        found = numpy.count_nonzero(self._is_special[input_ids])
        if found != count or not self._decodes(row, encoded, ids):
            raise DataError(f"{row.location}: found a special token that cannot be encoded as text. Remove it")
        layout = row.layout
        applied = {AS_TEXT: row.is_escaped, GENERATED_IDS: row.generated_call_ids}
        applied[DROPPED_REASONING] = layout.dropped_reasoning
        conventions = tuple(convention for convention, holds in applied.items() if holds)
        spans = tuple((index[first], index[last]) for first, last in tokens)
        return Example(input_ids, spans, stop_ids, layout.note, layout.span_source, conventions)

    def _decodes(self, row: RenderedRow, escaped_ids: list[int], ids: list[int]) -> bool:
        """Return whether the ids decode to the escaped text with each placeholder replaced by its character."""
        if not row.is_escaped:
            return True
        decoded = self.tokenizer.decode(escaped_ids)
        counts = [sum(text.count(chr(code)) for code in self._originals) for text in (decoded, row.text)]
        return counts[0] == counts[1] and self.tokenizer.decode(ids) == decoded.translate(self._originals)

    def _unescape(self, row: RenderedRow, encoding: Any, encoded: list[int]) -> tuple[list[int], Sequence[int]]:
        """Return the encoded ids with each placeholder replaced by its character, and the new index of each id."""
        if not row.is_escaped:
            return encoded, range(len(encoded) + 1)
        ids: list[int] = []
        index: list[int] = []
        last = -1
        for token, id in enumerate(encoded):
            start, end = encoding.token_to_chars(token) or (-1, -1)
            index.append(len(ids))
            original = self._originals.get(ord(row.text[start])) if end == start + 1 else None
            if original is None:
                ids.append(id)
            elif start != last:  # a placeholder may be several bytes
                ids.append(self._encoder.token_to_id(original) or id)
                last = start
        return ids, [*index, len(ids)]

    def _encode(self, texts: list[str]) -> list[Any]:
        return list(self._encoder.encode_batch(texts, add_special_tokens=False))


def _matching(tokens: set[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of the tokens, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _split_reasoning(message: Message, template: ChatTemplate) -> Message:
    """Move reasoning to its own field if the template reads one, under both names that templates read."""
    is_split = message["role"] != "assistant" or "reasoning_content" in message
    if template.reads_reasoning and not is_split and (match := _REASONING.match(message["content"])):
        message = {**message, "content": message["content"][match.end() :].lstrip("\n")}
        if match[2].strip():  # an empty block means no reasoning
            message["reasoning_content"] = match[2].strip("\n")
    if "reasoning_content" in message:
        return {**message, "thinking": message["reasoning_content"]}  # as apply_chat_template does
    return message


def _with_possible_ids(messages: list[Message], template: ChatTemplate) -> Iterator[tuple[list[Message], bool]]:
    """Yield the messages as they are, and with generated ids of their calls; the flag says which.

    They need generated ones if the template reads ids and the row has none, or if it rejects those of the row.
    """
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    ids = [message.get("tool_call_id") for message in messages if message["role"] == "tool"]
    if not template.reads_call_ids or None not in [*ids, *(call.get("id") for call in calls)]:
        yield messages, False
    if template.reads_call_ids and calls:
        yield with_call_ids(messages), True


def with_call_ids(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with new ids for calls and answers: nine letters and digits, as Mistral's templates require.

    An answer without an id belongs to the next unanswered call of its name, or of any name.
    """
    result, open_calls = [], []
    for number, message in enumerate(messages):
        if message.get("tool_calls"):
            calls = []
            for index, call in enumerate(message["tool_calls"]):
                text = json.dumps([number, index, call["function"]], sort_keys=True)
                new = hashlib.sha256(text.encode()).hexdigest()[:9]
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
    first, last, final = None, None, end - 1
    while start < end and (first := encoding.char_to_token(start)) is None:
        start += 1
    while start <= final and (last := encoding.char_to_token(final)) is None:
        final -= 1
    if first is None or last is None:
        return 0, 0
    characters = encoding.token_to_chars(last)
    while last + 1 < len(encoding) and encoding.token_to_chars(last + 1) == characters:
        last += 1  # the other bytes of a character that is several tokens
    while last >= first and encoding.token_to_chars(last)[1] > end:
        last -= 1
    return first, last + 1
