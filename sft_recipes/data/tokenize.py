"""Turns conversations into token ids and labels: what the loss looks at, and what it does not.

The text is what the tokenizer's own chat template renders, so what is trained is what is seen at inference
(sft_recipes.data.assistant_spans finds the assistant in it). Control tokens are only those that the template writes:
the same characters in a message become ordinary tokens.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sft_recipes.data.assistant_spans import Skeleton, Skeletons
from sft_recipes.data.chat_template import OtherwiseError, Template, Tools, UnclearError, training_templates
from sft_recipes.data.formats import Conversation, Message
from sft_recipes.data.tokenizer import control_tokens
from sft_recipes.runtime.errors import DataError

IGNORED = -100  # the label of a token that the loss does not look at (torch.nn.CrossEntropyLoss.ignore_index)

_REASONING = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)  # at the beginning of an answer
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
    markers_as_text: bool = False
    dropped_reasoning: bool = False
    shares_a_token: bool = False

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
        """Its first `length` tokens; fewer where those would end in a question whose answer is cut."""
        if len(self.input_ids) <= length:
            return self
        spans = tuple((start, min(end, length)) for start, end in self.spans if start < length)
        end = spans[-1][1] if spans and len(spans) < len(self.spans) else length
        return Example(self.input_ids[:end], spans, self.where)


@dataclass(frozen=True, slots=True)
class _Placed:
    """A rendered conversation: the assistant's [start, end) characters, where control tokens begin that are only text
    (`marks`), and how many control tokens it may hold."""

    text: str
    spans: list[tuple[int, int]]
    marks: tuple[int, ...] = ()
    skeleton: Skeleton | None = None
    steering: int = 0
    note: str = ""

    def masked(self) -> str:
        """The text with another character at each mark, so that no tokenizer finds a control token there.

        Tokenizing in pieces would do for byte-level tokenizers; others put a space before each piece.
        """
        if not self.marks:
            return self.text
        characters, mask = list(self.text), self.mask()
        for place in self.marks:
            characters[place] = mask
        return "".join(characters)

    def mask(self) -> str:
        """A character for private use that the text does not hold."""
        return next(mask for mask in map(chr, range(0xE000, 0xF8FF)) if mask not in self.text)


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
        self._adds_bos = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
        self._by_source: dict[str, Skeletons] = {}
        self._written: dict[int, tuple[Skeleton, int, str]] = {}

    def label(self, conversations: Sequence[Conversation]) -> list[Example]:
        """Token ids and the assistant's places in them, end of turn included.

        Special tokens are not added: the template wrote those that belong there, so there is one BOS, never two.

        Raises:
            DataError: the template refuses a conversation, its assistant's turns cannot be told for certain, or a
                turn ends with no special token.
        """
        placed = [self._place(one) for one in conversations]
        encoded = self._encode([one.masked() for one in placed])
        rows = zip(conversations, placed, encoded, strict=True)
        return [self._example(one.where, place, encoding) for one, place, encoding in rows]

    def prompt(self, messages: Sequence[Message], tools: Tools = None, where: str = "the prompt") -> list[int]:
        """Token ids of a conversation that waits for the assistant's answer."""
        skeletons = self._skeletons(tools)
        said = [self._as_the_template_has_it(message, skeletons) for message in messages]
        try:
            text = skeletons.template.render(said, tools, add_generation_prompt=True)
        except UnclearError as error:
            raise DataError(f"{where}: {error}") from error
        marks, position = [], 0
        for message in said:
            content = message["content"].strip()
            found = text.find(content, position) if content else -1
            if found >= 0:
                marks += [found + match.start() for match in self._controls.finditer(content)]
                position = found + len(content)
        placed = _Placed(text, [], tuple(marks))
        return self._unmasked(placed, self._encode([placed.masked()])[0])[0]

    def _skeletons(self, tools: Tools) -> Skeletons:
        try:
            source = self.tokenizer.get_chat_template(None, tools)
        except ValueError as error:
            raise DataError(f"model.name_or_path: {error}") from error
        if source not in self._by_source:
            special = self.tokenizer.special_tokens_map
            shipped = training_templates().get(source)
            try:
                template = Template(source, special, self._date)
                training = Template(shipped, special, self._date) if shipped else None
            except Exception as error:  # a Jinja syntax error, or whatever else its compiler raises
                raise DataError(f"the chat template is not Jinja: {error}; {_WAY_OUT}") from error
            self._by_source[source] = Skeletons(template, training, self._specials, self._controls)
        return self._by_source[source]

    @staticmethod
    def _as_the_template_has_it(message: Message, skeletons: Skeletons) -> Message:
        """Reasoning in a field of its own where the template reads one, under both names that templates read."""
        content = message["content"]
        if skeletons.template.reads_reasoning and message["role"] == "assistant" and "reasoning_content" not in message:
            written = _REASONING.match(content)
            if written:
                message = {**message, "content": content[written.end() :].lstrip("\n")}
                if written[1].strip():  # an empty block says that there is none
                    message["reasoning_content"] = written[1].strip("\n")
        if "reasoning_content" in message:
            return {**message, "thinking": message["reasoning_content"]}  # as apply_chat_template does
        return message

    def _place(self, one: Conversation) -> _Placed:
        skeletons = self._skeletons(one.tools)
        messages = [self._as_the_template_has_it(message, skeletons) for message in one.messages]
        try:
            self._check_calls(messages, one.tools)
            skeleton, text, spans, slots = self._filled(skeletons, messages, one.tools)
        except UnclearError as error:
            hint = " (it may read </think> in a text as the end of reasoning)" if "</think>" in str(messages) else ""
            raise DataError(f"{one.where}: {error}{hint}; {_WAY_OUT}") from error
        written, note = self._written_by(skeleton, messages, one)
        marks, meant = [], 0
        for (start, end), slot in zip(slots, skeleton.slots, strict=True):
            if self._controls.search(slot.text(messages)):
                said = text[start:end]
                reasoning = _REASONING.match(said) if messages[slot.message]["role"] == "assistant" else None
                own = {reasoning.start(1) - len("<think>"), reasoning.end(1)} if reasoning else set()
                found = [match.start() for match in self._controls.finditer(said)]
                marks += [start + place for place in found if place not in own]
                meant += sum(place in own for place in found)
        return _Placed(text, spans, tuple(marks), skeleton, written + meant, note)

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

    def _written_by(self, skeleton: Skeleton, messages: Sequence[Message], one: Conversation) -> tuple[int, str]:
        """How many control tokens the template itself writes, and what to note of them."""
        known = self._written.get(id(skeleton))
        if known and known[0] is skeleton:
            return known[1:]
        open_ = {slot.message for slot in skeleton.slots}
        for number, message in enumerate(messages):
            found = None if number in open_ else self._controls.search(message["content"])
            if found:
                raise DataError(
                    f"{one.where}: turn {number + 1} holds {found.group()!r}, a control token, and the chat template "
                    f"renders this row in a way of its own; take the token out of the text"
                )
        ids = self._ids("x".join(skeleton.literals))
        bos, bos_id = self.tokenizer.bos_token, self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos_id, bos_id]:
            raise DataError(f"{one.where}: the chat template begins with {bos} twice; wanted it once; {_WAY_OUT}")
        note = f"the template writes no {bos}, which the tokenizer puts before other texts"
        written = sum(id in self._control_ids for id in ids), note if self._adds_bos and bos_id not in ids else ""
        if len(self._written) > 4096:
            self._written.clear()
        self._written[id(skeleton)] = (skeleton, *written)
        return written

    def _example(self, where: str, placed: _Placed, encoding: Any) -> Example:
        skeleton = placed.skeleton
        assert skeleton is not None
        ids, index = self._unmasked(placed, encoding) if placed.marks else (encoding.ids, None)
        tokens = [_tokens(encoding, start, end) for start, end in placed.spans]
        shared = any(
            encoding.token_to_chars(first)[0] < start
            for (first, last), (start, _) in zip(tokens, placed.spans, strict=True)
            if last > first
        )
        if sum(map(self._control_ids.__contains__, ids)) != placed.steering or not self._says(placed, encoding, ids):
            raise DataError(
                f"{where}: a text in it holds a control token that this tokenizer cannot write as ordinary tokens; "
                f"take it out of the row"
            )
        return Example(
            ids,
            tuple((index[first], index[last]) for first, last in tokens) if index else tuple(tokens),
            where,
            frozenset(self.tokenizer.convert_tokens_to_ids(list(skeleton.stops))),
            "; ".join(filter(None, (skeleton.note, placed.note))),
            skeleton.how,
            bool(placed.marks),
            skeleton.dropped_reasoning > 0,
            shared,
        )

    def _says(self, placed: _Placed, encoding: Any, ids: list[int]) -> bool:
        """Whether the tokens say what the masked text does, with each mask the character that it stands for."""
        if not placed.marks:
            return True
        pieces = self.tokenizer.decode(encoding.ids).split(placed.mask())
        characters = [placed.text[place] for place in sorted(placed.marks)]
        if len(pieces) != len(characters) + 1:
            return False  # a tokenizer that cannot write the mask
        meant = pieces[0] + "".join(map("".join, zip(characters, pieces[1:], strict=True)))
        return bool(self.tokenizer.decode(ids) == meant)

    def _unmasked(self, placed: _Placed, encoding: Any) -> tuple[list[int], list[int]]:
        """The tokens with each mask's put back to those of the character that it stands for, and where each old token
        now is."""
        masked, ids, index, last = set(placed.marks), [], [], -1
        for token, id in enumerate(encoding.ids):
            start, end = encoding.token_to_chars(token) or (-1, -1)
            index.append(len(ids))
            if start not in masked or end != start + 1:
                ids.append(id)
            elif start != last:  # a mask may be several bytes
                ids.append(self._encoder.token_to_id(placed.text[start]) or id)
                last = start
        return ids, [*index, len(ids)]

    def _ids(self, text: str) -> list[int]:
        return list(self._encode([text])[0].ids)

    def _encode(self, texts: list[str]) -> list[Any]:
        return list(self._encoder.encode_batch(texts, add_special_tokens=False))


def _tokens(encoding: Any, start: int, end: int) -> tuple[int, int]:
    """The [first, last + 1) tokens of the characters [start, end); characters that no token owns are passed over.

    A token that the first character shares with what stands before it is in; one that reaches beyond the end is not.
    """
    first, at = None, start
    while at < end and (first := encoding.char_to_token(at)) is None:
        at += 1
    last, at = None, end
    while at > start and (last := encoding.char_to_token(at - 1)) is None:
        at -= 1
    if first is None or last is None:
        return 0, 0
    place = encoding.token_to_chars(last)
    while last + 1 < len(encoding) and encoding.token_to_chars(last + 1) == place:
        last += 1  # the other bytes of a character that is several tokens
    while last >= first and encoding.token_to_chars(last)[1] > end:
        last -= 1
    return first, last + 1
