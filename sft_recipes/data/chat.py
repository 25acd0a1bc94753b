"""Turns conversations into token ids and labels: what the loss looks at, and what it does not.

The text is what the tokenizer's own chat template renders, so what is trained is what is seen at inference
(sft_recipes.data.spans finds the assistant in it). Control tokens are only those that the template writes: the same
characters in somebody's message become ordinary tokens.
"""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sft_recipes.data.formats import Conversation, Message
from sft_recipes.data.spans import Skeleton, Skeletons
from sft_recipes.data.template import OtherwiseError, Template, Tools, UnclearError, training_templates
from sft_recipes.data.tokenizer import control_tokens
from sft_recipes.planning.schema import RecipeError

IGNORED = -100  # the label of a token that the loss does not look at (torch.nn.CrossEntropyLoss.ignore_index)

_WAY_OUT = "give a template that can be followed (model.chat_template=<a .jinja file>)"


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids, the [start, end) tokens that are the assistant's, and what was met on the way."""

    input_ids: list[int]
    spans: tuple[tuple[int, int], ...]
    where: str = ""
    stop_ids: frozenset[int] = frozenset()
    note: str = ""
    how: str = ""
    markers_as_text: int = 0
    dropped_reasoning: int = 0

    @property
    def labels(self) -> list[int]:
        """The id where the loss looks, IGNORED elsewhere."""
        labels = [IGNORED] * len(self.input_ids)
        for start, end in self.spans:
            labels[start:end] = self.input_ids[start:end]
        return labels

    def supervised(self) -> int:
        """Tokens that the loss looks at; the first of a row is predicted from nothing, so it is none."""
        return sum(end - max(start, 1) for start, end in self.spans)

    def cut(self, length: int) -> Example:
        """Its first `length` tokens."""
        if len(self.input_ids) <= length:
            return self
        spans = tuple((start, min(end, length)) for start, end in self.spans if start < length)
        return Example(self.input_ids[:length], spans, self.where)


class Chat:
    """A tokenizer with its template, turning conversations into labelled tokens."""

    def __init__(self, tokenizer: Any, date: datetime.date):
        """`date` is what a template that writes today's date gets, so that a resumed run sees the same tokens."""
        self.tokenizer = tokenizer
        self._date = date
        self._encoder = tokenizer.backend_tokenizer  # what tokenizer(…) calls, without its copies of every list
        self._encoder.no_truncation()
        self._encoder.no_padding()
        specials, controls = control_tokens(tokenizer)
        self._control_ids = frozenset(tokenizer.convert_tokens_to_ids(sorted(controls)))
        longest_first = sorted(controls, key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._specials = specials
        self._by_source: dict[str, Skeletons] = {}
        self._written: dict[int, tuple[Skeleton, int]] = {}

    def label(self, conversations: Sequence[Conversation]) -> list[Example]:
        """Token ids and the assistant's places in them, end of turn included.

        Special tokens are not added: the template wrote those that belong there, so there is one BOS, never two.

        Raises:
            RecipeError: the template refuses a conversation, its assistant's turns cannot be told for certain, or a
                turn ends with no special token.
        """
        placed = [self._place(one) for one in conversations]
        encoded = self._encode([text for text, *_ in placed])
        return [
            self._example(one, *place, encoding)
            for one, place, encoding in zip(conversations, placed, encoded, strict=True)
        ]

    def prompt(self, messages: Sequence[Message], tools: Tools = None, where: str = "the prompt") -> list[int]:
        """Token ids of a conversation that waits for the assistant's answer."""
        skeletons = self._skeletons(tools)
        said = [self._as_the_template_has_it(message, skeletons) for message in messages]
        try:
            text = skeletons.template.render(said, tools, add_generation_prompt=True)
        except UnclearError as error:
            raise RecipeError(f"{where}: {error}") from error
        cuts, position = [], 0
        for message in said:
            content = message["content"].strip()
            found = text.find(content, position) if content else -1
            if found >= 0:
                cuts += [found + match.start() + 1 for match in self._controls.finditer(content)]
                position = found + len(content)
        return [id for piece in _pieces(text, cuts) for id in self._ids(piece)]

    def _skeletons(self, tools: Tools) -> Skeletons:
        try:
            source = self.tokenizer.get_chat_template(None, tools)
        except ValueError as error:
            raise RecipeError(f"model.name_or_path: {error}") from error
        if source not in self._by_source:
            special = self.tokenizer.special_tokens_map
            shipped = training_templates().get(source)
            try:
                template = Template(source, special, self._date)
                training = Template(shipped, special, self._date) if shipped else None
            except Exception as error:  # a Jinja syntax error, or whatever else its compiler raises
                raise RecipeError(f"the chat template is not Jinja: {error}; {_WAY_OUT}") from error
            self._by_source[source] = Skeletons(template, training, self._specials, self._controls)
        return self._by_source[source]

    @staticmethod
    def _as_the_template_has_it(message: Message, skeletons: Skeletons) -> Message:
        """Reasoning in a field of its own where the template reads one, under both names that templates read."""
        source = skeletons.template.source
        reads = (
            "reasoning_content" in source or ".thinking" in source or "'thinking'" in source or '"thinking"' in source
        )
        content = message["content"]
        if reads and message["role"] == "assistant" and "reasoning_content" not in message:
            opened, closed, answer = content.partition("</think>")
            if closed and opened.lstrip().startswith("<think>") and opened.strip() != "<think>":
                reasoning = opened.lstrip().removeprefix("<think>").strip("\n")
                message = {**message, "content": answer.lstrip("\n"), "reasoning_content": reasoning}
        if "reasoning_content" in message:
            return {**message, "thinking": message["reasoning_content"]}  # as apply_chat_template does
        return message

    def _place(self, one: Conversation) -> tuple[str, list[tuple[int, int]], Skeleton, list[int], int]:
        """The text, the assistant's characters, the skeleton, and where to cut control tokens that are only text."""
        skeletons = self._skeletons(one.tools)
        messages = [self._as_the_template_has_it(message, skeletons) for message in one.messages]
        try:
            self._check_calls(messages, one.tools)
            skeleton, text, spans, slots = self._filled(skeletons, messages, one.tools)
        except UnclearError as error:
            raise RecipeError(f"{one.where}: {error}; {_WAY_OUT}") from error
        cuts = [
            start + match.start() + 1
            for (start, end), slot in zip(slots, skeleton.slots, strict=True)
            if self._controls.search(slot.text(messages))
            for match in self._controls.finditer(text[start:end])
        ]
        return text, spans, skeleton, cuts, self._written_by(skeleton, messages, one)

    def _filled(
        self, skeletons: Skeletons, messages: Sequence[Message], tools: Tools
    ) -> tuple[Skeleton, str, list[tuple[int, int]], list[tuple[int, int]]]:
        """A skeleton that gives, filled in, what the template renders; the row's own where its shape's does not."""
        refused = None
        for make in (skeletons.of, skeletons.of_this, skeletons.of_training):
            try:
                skeleton = make(messages, tools)
                text, spans, slots = skeleton.fill(messages)
                if text == skeleton.template.render(messages, tools):
                    return skeleton, text, spans, slots
            except OtherwiseError as error:
                refused = refused or error
        raise refused or UnclearError("the chat template renders this conversation otherwise than others of its shape")

    def _check_calls(self, messages: Sequence[Message], tools: Tools) -> None:
        """Calls and tools are written by the template as they are, control tokens in them too."""
        beside = [[message.get(key) for key in ("tool_calls", "name", "tool_call_id")] for message in messages]
        for number, said in enumerate([tools, *beside]):
            found = self._controls.search(str(said)) if said else None
            if found:
                called = number and messages[number - 1].get("tool_calls")
                what = f"the {'call' if called else 'name'} in turn {number}" if number else "a tool's description"
                raise UnclearError(f"{what} holds {found.group()!r}, a control token")

    def _written_by(self, skeleton: Skeleton, messages: Sequence[Message], one: Conversation) -> int:
        """How many control tokens the template itself writes."""
        known = self._written.get(id(skeleton))
        if known and known[0] is skeleton:
            return known[1]
        open_ = {slot.message for slot in skeleton.slots}
        for number, message in enumerate(messages):
            found = None if number in open_ else self._controls.search(message["content"])
            if found:
                raise RecipeError(
                    f"{one.where}: turn {number + 1} holds {found.group()!r}, a control token, and the chat template "
                    f"renders this row in a way of its own; take the token out of the text"
                )
        ids = self._ids("x".join(skeleton.literals))
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise RecipeError(
                f"{one.where}: the chat template begins with {self.tokenizer.bos_token} twice; wanted it once; "
                f"{_WAY_OUT}"
            )
        written = sum(id in self._control_ids for id in ids)
        if len(self._written) > 4096:
            self._written.clear()
        self._written[id(skeleton)] = (skeleton, written)
        return written

    def _example(
        self,
        one: Conversation,
        text: str,
        spans: list[tuple[int, int]],
        skeleton: Skeleton,
        cuts: list[int],
        written: int,
        encoding: Any,
    ) -> Example:
        if cuts:
            ids, token_spans = self._in_pieces(text, spans, cuts)
        else:
            ids, token_spans = encoding.ids, [_tokens(encoding, start, end) for start, end in spans]
        if sum(map(self._control_ids.__contains__, ids)) != written or (cuts and not self._same_text(ids, text)):
            raise RecipeError(
                f"{one.where}: the text holds a control token of {type(self.tokenizer).__name__} that cannot be "
                f"written as ordinary tokens; take it out of the row"
            )
        return Example(
            ids,
            tuple(token_spans),
            one.where,
            frozenset(self.tokenizer.convert_tokens_to_ids(list(skeleton.stops))),
            skeleton.note,
            skeleton.how,
            len(cuts),
            skeleton.dropped_reasoning,
        )

    def _ids(self, text: str) -> list[int]:
        return list(self._encode([text])[0].ids)

    def _encode(self, texts: list[str]) -> list[Any]:
        return list(self._encoder.encode_batch(texts, add_special_tokens=False))

    def _in_pieces(
        self, text: str, spans: list[tuple[int, int]], cuts: list[int]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of a text that is cut inside each control token that is only text, so that none is read as one."""
        ids: list[int] = []
        found = [[-1, -1] for _ in spans]
        position = 0
        for piece in _pieces(text, cuts):
            (encoding,) = self._encode([piece])
            for number, (start, end) in enumerate(spans):
                if start < position + len(piece) and end > position:
                    first, last = _tokens(encoding, max(start - position, 0), min(end - position, len(piece)))
                    if found[number][0] < 0:
                        found[number][0] = len(ids) + first
                    found[number][1] = len(ids) + last
            ids += encoding.ids
            position += len(piece)
        return ids, [(first, last) for first, last in found]

    def _same_text(self, ids: list[int], text: str) -> bool:
        """Whether the pieces read as the whole does; a tokenizer that begins each text with a space would differ."""
        return bool(self.tokenizer.decode(ids) == self.tokenizer.decode(self._ids(text)))


def _pieces(text: str, cuts: Sequence[int]) -> list[str]:
    bounds = [0, *sorted(set(cuts)), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(bounds) if end > start]


def _tokens(encoding: Any, start: int, end: int) -> tuple[int, int]:
    """The [first, last + 1) tokens of the characters [start, end); characters that no token owns are passed over."""
    first = last = None
    while start < end and (first := encoding.char_to_token(start)) is None:
        start += 1
    while start < end and (last := encoding.char_to_token(end - 1)) is None:
        end -= 1
    if first is None or last is None:
        return 0, 0
    place = encoding.token_to_chars(last)
    while last + 1 < len(encoding) and encoding.token_to_chars(last + 1) == place:
        last += 1  # the other bytes of a character that is several tokens
    return first, last + 1
