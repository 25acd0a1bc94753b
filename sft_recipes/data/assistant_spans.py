"""Locates the assistant's turns, to the character, in the text that a chat template renders.

A template is a program, so its source does not show where an answer begins. A conversation is rendered as it is, and
again with *markers* (a pair of private-use characters) around each of its texts, inside the white space that a template
may trim. Without the markers both must be equal, so the markers show where every text is, and the literals that the
template writes between them. Markers are not needed where the text is that of the latest conversation with the same
roles, with other texts between the same literals. The assistant spans come from the first of these that works:

1. the template's own `{% generation %}` blocks;
2. the blocks of the training template that TRL ships for it, if both render the conversation identically;
3. a comparison with the template's other renderings: a turn begins where the rendering of the preceding turns plus the
   generation prompt diverges; it ends after its end-of-turn token, where the rendering that stops at this turn ends;
4. the blocks of TRL's training template although it renders the conversation differently, which is noted and reported.

Conversations with the same literals share one result, a `Layout`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sft_recipes.data.chat_template import AmbiguousTemplateError, ChatTemplate, Span
from sft_recipes.data.formats import Conversation, Message

Position = tuple[int, int]  # index of a literal, and an offset in characters into it

OWN_BLOCKS, TRL_BLOCKS, COMPARED = "its own generation blocks", "TRL's training template", "compared renderings"
DIFFERS = "which renders these rows differently from the inference template"
_FIRST_MARKER, _LAST_MARKER = 0x10C000, chr(0x10FFFD)  # the last of Unicode's private-use characters
_MARKERS = f"{chr(_FIRST_MARKER)}-{_LAST_MARKER}"
_MARKER = re.compile(f"([{_MARKERS}])")
_MARKED_TEXT = re.compile(f"[{_MARKERS}][^{_MARKERS}]*[{_MARKERS}]")
# What a generation prompt may open and an earlier turn may lack: templates drop old reasoning.
_OPENS_REASONING = re.compile(r"\s*(<[^<>\s]*think[^<>\s]*>|\[THINK\])?\s*(</[^<>\s]*think[^<>\s]*>\s*)?")
_MAX_LAYOUTS = 4096


@dataclasses.dataclass(frozen=True, slots=True, eq=False)  # a key of caches
class Layout:
    """What conversations share whose texts stand between the same literals: literals[0] text literals[1] text ….

    Attributes:
        spans: the assistant's [start, end) positions.
        stop_tokens: the special tokens that end the assistant's turns.
        span_source: how the spans were found.
        note: how the text differs from the text at inference; empty if it does not.
        dropped_reasoning: the template drops the reasoning of earlier turns.
    """

    literals: tuple[str, ...]
    spans: tuple[tuple[Position, Position], ...]
    stop_tokens: tuple[str, ...]
    span_source: str
    note: str
    dropped_reasoning: bool


@dataclasses.dataclass(frozen=True, slots=True)
class RenderedRow:
    """A conversation as text.

    Attributes:
        location: file and line of the row.
        text: with a placeholder in place of the first character of each special token that is only text, so that no
            tokenizer finds it. Tokenizing in pieces would work for byte-level tokenizers only.
        is_escaped: there are placeholders.
        spans: the assistant's, none in a prompt.
        texts: the messages' texts in order.
        generated_call_ids: its tool calls got ids that the row does not have.
    """

    location: str
    text: str
    is_escaped: bool
    spans: Sequence[Span] = ()
    texts: Sequence[str] = ()
    layout: Layout = Layout((), (), (), "", "", False)
    generated_call_ids: bool = False


@dataclasses.dataclass
class SpanFinder:
    """Renders the conversations of one chat template and locates the assistant in them.

    Attributes:
        template: the template that the tokenizer renders at inference.
        training: TRL's training template for it, if TRL ships one.
        stop_tokens: matches the tokens that can end a turn.
        special_tokens: matches every special token.
        placeholders: the character that each placeholder is for, by its code point.
    """

    template: ChatTemplate
    training: ChatTemplate | None
    stop_tokens: re.Pattern[str]
    special_tokens: re.Pattern[str]
    placeholders: Mapping[int, str]
    _layouts: dict[Any, Layout] = dataclasses.field(default_factory=dict)
    _latest: dict[Any, Layout] = dataclasses.field(default_factory=dict)  # by the roles of messages that are texts

    def find(self, conversation: Conversation, messages: list[Message], escaped: list[Message]) -> RenderedRow:
        """Render a conversation and locate its assistant turns, except the untrained ones.

        Args:
            messages: those of the conversation, as the template reads them.
            escaped: the same with placeholders for special tokens; these are rendered.

        Raises:
            AmbiguousTemplateError: the assistant's turns cannot be located, or do not end with a special token.
        """
        failures = []
        for template in filter(None, (self.template, self.training)):
            try:
                return self._find(template, conversation, messages, escaped)
            except AmbiguousTemplateError as error:
                failures.append(error)
        raise failures[0]

    def _find(
        self, template: ChatTemplate, conversation: Conversation, messages: list[Message], escaped: list[Message]
    ) -> RenderedRow:
        tools, is_escaped = conversation.tools, escaped != messages
        text = template.render(escaped, tools)
        if is_escaped and text.translate(self.placeholders) != template.render(messages, tools):
            raise AmbiguousTemplateError("it treats special tokens in a text, such as </think>, as its own")
        contents = [(message["content"] or "").strip() for message in escaped]
        cores, turns = [content for content in contents if content], None
        roles = tuple(message["role"] for message in messages)
        if all(len(message) == 2 for message in escaped):  # a role and a content
            turns = (template.source, roles, *map(bool, contents), conversation.untrained, tools is None)
            layout = self._latest.get(turns)
            # Markers in the text itself: the second rendering finds them, and rejects the row.
            plain = text.isascii() or not _MARKER.search(text)
            if layout and plain:
                pieces = [""] * (2 * len(cores) + 1)
                pieces[::2], pieces[1::2] = layout.literals, cores
                if text == "".join(pieces):  # as in the latest such row
                    return _make_row(conversation, text, is_escaped, layout, pieces)
        # If the template reads what other roles' texts contain, the assistant's alone are marked.
        for only_assistant in (False, True):
            marked = _MarkedConversation(template, conversation, escaped, only_assistant)
            if "".join(marked.pieces[::2]) == text and marked.is_paired():
                break
        else:
            raise AmbiguousTemplateError("the template modifies the texts of the conversation, or reads their content")
        literals, markers, fields = marked.pieces[::4], marked.pieces[1::4], marked.fields.values()
        key = (template.source, *literals, *markers, *fields, roles, conversation.untrained, tools is None)
        if key not in self._layouts:
            if len(self._layouts) >= _MAX_LAYOUTS:
                self._layouts.clear()
                self._latest.clear()
            self._layouts[key] = self._locate(marked)
        layout = self._layouts[key]
        if turns and marked.pieces[2::4] == cores:
            self._latest[turns] = layout
        return _make_row(conversation, text, is_escaped, layout, marked.pieces[::2])

    def _locate(self, marked: _MarkedConversation) -> Layout:
        """Locate the spans by the first way that works."""
        if marked.template is self.training:
            return self._from_blocks(marked, marked.template, f"{TRL_BLOCKS}, {DIFFERS}")
        if marked.template.has_generation_blocks:
            return self._from_blocks(marked, marked.template, OWN_BLOCKS)
        if self.training is not None:
            with contextlib.suppress(AmbiguousTemplateError):
                return self._from_blocks(marked, self.training, TRL_BLOCKS)
        marked.check_all_rendered()
        spans = [(self._find_start(marked, number), self._find_end(marked, number)) for number in marked.trained]
        return self._make_layout(marked, spans, COMPARED)

    def _from_blocks(self, marked: _MarkedConversation, tagged: ChatTemplate, span_source: str) -> Layout:
        text, blocks = tagged.render_with_spans(marked.messages, marked.tools)
        if text != marked.text:
            raise AmbiguousTemplateError("the training template renders this conversation differently")
        spans = [block for block in blocks if marked.is_block_trained(*block)]
        return self._make_layout(marked, spans, span_source)

    def _find_start(self, marked: _MarkedConversation, number: int) -> int:
        """Return where turn `number` begins: where the generation prompt ends or opens what the turn does not have."""
        before = marked.messages[:number]
        prompt = self.template.render(before, marked.tools, add_generation_prompt=True)
        common = _common_length(prompt, marked.text)
        _, field, content_start, _ = next(slot for slot in marked.slots if slot[0] == number)
        if _MARKER.search(prompt, common) or not _OPENS_REASONING.fullmatch(prompt, common):
            raise _error(number, "start of the answer is ambiguous: earlier turns differ once an answer follows")
        written = marked.text[common:content_start]
        is_call = field.startswith("call ")  # the model itself writes a call's special tokens
        if written.strip() and not is_call and prompt == self.template.render(before, marked.tools):
            raise _error(number, f"the template writes {written!r} before the answer and no generation prompt")
        return min(common, content_start)

    def _find_end(self, marked: _MarkedConversation, number: int) -> int:
        """Return where turn `number` ends: the common text after its last marker of the text and of the rendering that
        stops at this turn."""
        text, through = marked.text, self.template.render(marked.messages[: number + 1], marked.tools)
        markers = [match for match in _MARKER.finditer(through) if marked.fields[match.group()][0] == number]
        last = markers[-1].group() if markers else ""
        occurrence = through.count(last)
        ends = [match.end() for match in _MARKER.finditer(text) if match.group() == last]
        if not markers or len(ends) < occurrence:
            raise _error(number, "end of the answer is ambiguous: it differs once more turns follow")
        tail, tail_when_last = text[ends[occurrence - 1] :], through[markers[-1].end() :]
        length = _common_length(tail, tail_when_last)
        split_token = next((m for m in self.special_tokens.finditer(tail) if m.start() < length < m.end()), None)
        length = split_token.start() if split_token else length
        if not self._last_stop_token(tail[:length]):
            # A last turn may end with another special token than earlier ones (gpt-oss: <|return|>, <|end|>). It is not
            # the header of the next turn if that turn's own special token follows it.
            stop, other = (self.stop_tokens.match(rest, length) for rest in (tail, tail_when_last))
            if stop and other and self.stop_tokens.match(tail[stop.end() :].lstrip()):
                length = stop.end()
        return ends[occurrence - 1] + length

    def _last_stop_token(self, text: str) -> str:
        """Return the stop token at the end of a text, ignoring white space."""
        match = re.search(f"({self.stop_tokens.pattern})\\s*\\Z", text)
        return match[1] if match else ""

    def _make_layout(self, marked: _MarkedConversation, spans: list[Span], span_source: str) -> Layout:
        """Make a layout after checking its spans."""
        marked.check_all_rendered()
        stop_tokens = self._check_spans(marked, spans)
        note = span_source if marked.template is self.training else self._note_on_prompt(marked)
        return Layout(
            literals=tuple(marked.pieces[::4]),
            spans=tuple((marked.position_of(start), marked.position_of(end)) for start, end in spans),
            stop_tokens=stop_tokens,
            span_source=span_source,
            note="; ".join(filter(None, (note, _note_on_tools(marked)))),
            dropped_reasoning=any(field == "reasoning_content" for _, field in marked.omitted()),
        )

    def _note_on_prompt(self, marked: _MarkedConversation) -> str:
        """Return what the generation prompts have and the rows do not; empty if the rows contain the prompts."""
        for number in marked.trained:
            prompt = self.template.render(marked.messages[:number], marked.tools, add_generation_prompt=True)
            if rest := prompt[_common_length(prompt, marked.text) :]:
                shown = _MARKER.sub("", _MARKED_TEXT.sub("…", rest))
                return f"at inference the generation prompt ends with {shown!r}, which these rows do not contain"
        return ""

    def _check_spans(self, marked: _MarkedConversation, spans: list[Span]) -> tuple[str, ...]:
        """Check that every text of the assistant is in a span with its end of turn, and no other text is.

        Returns:
            The tokens that generation stops at: the outermost of the last turn and of each turn with a tool call.
            Others do not end a generation: the end of one call of several, or of the reasoning (gpt-oss: <|end|>).

        Raises:
            AmbiguousTemplateError: a text is on the wrong side, or a turn does not end with a special token.
        """
        tails: dict[int, Span] = {}
        inside = set()
        for number, field, start, end in marked.slots:
            span = next(((a, b) for a, b in spans if a <= start and end <= b), None)
            if span and number not in marked.trained:
                raise _error(number, f"the generation block contains the {marked.messages[number]['role']}'s text")
            if span:
                tails[number] = (end, span[1])
                inside.add((number, field))
            elif number in marked.trained and not field.startswith("call "):
                raise _error(number, "the generation block omits the assistant's text")
        for number, field in marked.fields.values():
            # A call's name may also be in the header of the tool's answer, which is not the assistant's.
            if number in marked.trained and field.startswith("call ") and (number, field) not in inside:
                raise _error(number, "the generation block omits the tool call")
        stop_tokens = []
        for number in marked.trained:
            start, end = tails.get(number, (0, 0))
            stop_token = self._last_stop_token(marked.text[start:end])
            if not stop_token:
                found = marked.text[max(end - 12, start) : end]
                raise _error(number, f"end of the assistant's turn: found {found!r}, expected a special token")
            if marked.messages[number].get("tool_calls") or number == len(marked.messages) - 1:
                stop_tokens.append(stop_token)
        return tuple(dict.fromkeys(stop_tokens))


def _error(number: int, problem: str) -> AmbiguousTemplateError:
    return AmbiguousTemplateError(f"turn {number + 1}: {problem}")


def _note_on_tools(marked: _MarkedConversation) -> str:
    """Return a note if the template does not render the tools of a row; it does not at inference either."""
    if marked.tools is not None:
        with contextlib.suppress(AmbiguousTemplateError):  # it fails without tools, so it reads them
            if marked.template.render(marked.messages, None) == marked.text:
                return "the chat template does not render the tools that rows offer"
    return ""


class _MarkedConversation:
    """A rendered conversation with markers around its texts.

    Attributes:
        fields: the number of the message and the field that each marker is for; the first message is 0.
        pieces: the text, split at its markers: literal, marker, message's text, marker, literal, ….
        slots: message, field and [start, end) characters of each text, markers included.
        trained: numbers of the assistant messages that are in the loss.
    """

    def __init__(
        self, template: ChatTemplate, conversation: Conversation, messages: Sequence[Message], only_assistant: bool
    ):
        self.fields: dict[str, tuple[int, str]] = {}
        self._texts: dict[str, tuple[str, str]] = {}
        self.template, self.tools, self.untrained = template, conversation.tools, conversation.untrained
        self.messages: list[Message] = []
        self.trained: list[int] = []
        for number, message in enumerate(messages):
            is_assistant = message["role"] == "assistant"
            self.messages.append(self._mark_message(number, message) if is_assistant or not only_assistant else message)
            if is_assistant and number not in self.untrained:
                self.trained.append(number)
        self.text = template.render(self.messages, self.tools)
        self.pieces = _MARKER.split(self.text)

    @functools.cached_property
    def slots(self) -> list[tuple[int, str, int, int]]:
        ends = [*itertools.accumulate(map(len, self.pieces))]
        texts = zip(self.pieces[1::4], ends[1::4], ends[2::4], strict=False)
        return [(*self.fields[marker], a - 1, b + 1) for marker, a, b in texts if marker in self.fields]

    def is_paired(self) -> bool:
        """Return whether each marker is followed by its partner, and the assistant's texts are what the row has."""
        if len(self.pieces) % 4 != 1:
            return False
        for start, text, end in zip(self.pieces[1::4], self.pieces[2::4], self.pieces[3::4], strict=True):
            partner, core = self._texts.get(start, ("", ""))
            number, field = self.fields[end]
            is_answer = self.messages[number]["role"] == "assistant" and not field.startswith("call ")
            if partner != end or (is_answer and text != core):
                return False
        return True

    def position_of(self, character: int) -> Position:
        """Return the position of a character that is in no text."""
        ends = [*itertools.accumulate(map(len, self.pieces))]
        for number, (start, end) in enumerate(zip([0, *ends][::4], ends[::4], strict=True)):
            if start <= character <= end:
                return number, character - start
        raise AmbiguousTemplateError("an assistant span begins or ends inside a message")

    def is_block_trained(self, start: int, end: int) -> bool:
        """Return whether the turns in a generation block, [start, end) characters, are in the loss.

        Raises:
            AmbiguousTemplateError: some are and some are not.
        """
        numbers = {self.fields[match.group()][0] for match in _MARKER.finditer(self.text, start, end)}
        untrained = numbers & self.untrained
        if untrained and untrained != numbers:
            raise _error(min(untrained), "found in one generation block with a turn in the loss")
        return not untrained

    def omitted(self) -> list[tuple[int, str]]:
        """Return message and field of each text that the template does not render."""
        rendered = {slot[:2] for slot in self.slots}
        return [field for field in dict.fromkeys(self.fields.values()) if field not in rendered]

    def check_all_rendered(self) -> None:
        """Check that every text is rendered; templates drop old reasoning by design, all else would be lost silently.

        Raises:
            AmbiguousTemplateError: the template omits a text.
        """
        for number, field in self.omitted():
            if field != "reasoning_content" or number == len(self.messages) - 1:
                names = {"content": f"the {self.messages[number]['role']}'s text", "reasoning_content": "the reasoning"}
                call = "the arguments of a tool call" if "argument" in field else "the tool call"
                raise _error(number, f"the template omits {names.get(field, call)}")

    def _mark_message(self, number: int, message: Message) -> Message:
        marked = dict(message)
        for field in ("content", "reasoning_content"):
            if message.get(field):
                marked[field] = self._mark_text(number, field, message[field])
        if "thinking" in marked:
            marked["thinking"] = marked["reasoning_content"]
        if calls := message.get("tool_calls"):
            marked["tool_calls"] = [self._mark_call(number, f"call {n}", call) for n, call in enumerate(calls)]
        return marked

    def _mark_call(self, number: int, field: str, call: dict[str, Any]) -> dict[str, Any]:
        function = {**call["function"], "name": self._mark_text(number, field, call["function"]["name"])}
        function["arguments"] = {
            key: self._mark_text(number, f"{field} argument {key}", value) if isinstance(value, str) else value
            for key, value in function["arguments"].items()
        }
        return {**call, "function": function}

    def _mark_text(self, number: int, field: str, text: str) -> str:
        core = text.strip()
        if not core:
            return text
        start, end = (chr(_FIRST_MARKER + len(self.fields) + offset) for offset in (0, 1))
        if end > _LAST_MARKER:
            raise AmbiguousTemplateError(f"found more than {len(self._texts)} texts in a row")
        self.fields[start] = self.fields[end] = (number, field)
        self._texts[start] = (end, core)
        before, _, after = text.partition(core)
        return f"{before}{start}{core}{end}{after}"


def _make_row(
    conversation: Conversation, text: str, is_escaped: bool, layout: Layout, pieces: Sequence[str]
) -> RenderedRow:
    """Return a row whose text is these pieces: literals[0], a text, literals[1], …."""
    starts = [0, *itertools.accumulate(map(len, pieces))][::2]
    spans = [(starts[a[0]] + a[1], starts[b[0]] + b[1]) for a, b in layout.spans]
    return RenderedRow(conversation.location, text, is_escaped, spans, pieces[1::2], layout)


def _common_length(first: str, second: str) -> int:
    """Return the length of the common prefix of two texts."""
    shorter = min(len(first), len(second))
    return next((index for index in range(shorter) if first[index] != second[index]), shorter)
