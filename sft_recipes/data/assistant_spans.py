"""Locates the assistant's turns, to the character, in the text that a chat template renders.

A template is a program, so its source does not show where an answer begins. Each *shape* of conversation (roles, which
fields are set, tools) is rendered once with a probe string in place of every text. The probes show which literals the
template writes and how it trims its inputs: a `RenderedTemplate`. The assistant spans of a rendered template come from
the first of these strategies that works:

1. the template's own `{% generation %}` blocks;
2. the blocks of the training template that TRL ships for it, if both render the shape identically;
3. a comparison with the template's other renderings: a turn begins where the rendering of the preceding turns plus the
   generation prompt diverges; it ends after its end-of-turn token, where the rendering that stops at this turn ends;
4. the blocks of TRL's training template although it renders the shape differently, which is noted and reported.

Each row is then rendered by the template itself and compared with the filled rendered template, character by character.
If they differ, the row gets its own rendered template; if that differs too, the row is rejected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sft_recipes.data.chat_template import AmbiguousTemplateError, ChatTemplate, TemplateMismatchError, Tools
from sft_recipes.data.formats import Message

Position = tuple[int, int]  # index of a literal, and an offset in characters into it

OWN_BLOCKS, TRL_BLOCKS, COMPARED = "its own generation blocks", "TRL's training template", "compared renderings"
DIFFERS = "which renders these rows differently from the inference template"
_PROBE = re.compile(r"qzx(\d{4})xzq")
# White space around a probe shows what a template trims: nothing, line feeds, or all. No template writes these spaces.
_LEFT = {"keep": "\n\u2003", "newlines": "\u2003", "strip": ""}
_RIGHT = {"keep": "\u2002\n", "newlines": "\u2002", "strip": ""}
# What a generation prompt may open and an earlier turn may lack: templates drop old reasoning.
_OPENS_REASONING = re.compile(r"\s*(<[^<>\s]*think[^<>\s]*>|\[THINK\])?\s*(</[^<>\s]*think[^<>\s]*>\s*)?")


@dataclass(frozen=True)
class ContentSlot:
    """Where a rendered template inserts a text of the conversation: which message and field, and how it is trimmed."""

    message: int
    field: str
    left: str = "keep"
    right: str = "keep"

    def text(self, messages: Sequence[Message]) -> str:
        """Return the text that the template inserts here for a conversation of this shape."""
        text = _field(messages[self.message], self.field)
        text = text.lstrip() if self.left == "strip" else text.lstrip("\n") if self.left == "newlines" else text
        return text.rstrip() if self.right == "strip" else text.rstrip("\n") if self.right == "newlines" else text


@dataclass(frozen=True)
class RenderedTemplate:
    """The text of one shape: literals[0] slots[0] literals[1] … literals[n].

    Attributes:
        spans: the assistant's [start, end) positions.
        stop_tokens: the special tokens that end the assistant's turns.
        span_source: the strategy that found the spans.
        note: how the text differs from the text at inference; empty if it does not.
    """

    template: ChatTemplate
    literals: tuple[str, ...]
    slots: tuple[ContentSlot, ...]
    spans: tuple[tuple[Position, Position], ...]
    stop_tokens: tuple[str, ...]
    span_source: str
    note: str = ""
    dropped_reasoning: int = 0

    def fill(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]], list[tuple[int, int]]]:
        """Return a conversation's text, and the [start, end) characters of the assistant spans and of the slots."""
        parts, starts, slots, position = [], [], [], 0
        for literal, slot in zip(self.literals, self.slots, strict=False):
            starts.append(position)
            text = slot.text(messages)
            parts += [literal, text]
            position += len(literal)
            slots.append((position, position + len(text)))
            position += len(text)
        starts.append(position)
        parts.append(self.literals[-1])
        spans = [(starts[a[0]] + a[1], starts[b[0]] + b[1]) for a, b in self.spans]
        return "".join(parts), spans, slots


class RenderedTemplateCache:
    """The rendered templates of a chat template, one per shape, made on first use.

    Args:
        template: the template that the tokenizer renders at inference.
        training: TRL's training template for it, if TRL ships one.
        stop_tokens: texts of the tokens that can end a turn.
        special_tokens: matches every special token.
    """

    _MAX_SIZE = 4096

    def __init__(
        self,
        template: ChatTemplate,
        training: ChatTemplate | None,
        stop_tokens: Iterable[str],
        special_tokens: re.Pattern[str],
    ):
        self.template = template
        self.training = training
        self.stop_tokens = sorted(stop_tokens, key=len, reverse=True)
        self.special_tokens = special_tokens
        self._by_shape: dict[Any, RenderedTemplate] = {}

    def for_shape(
        self, messages: Sequence[Message], tools: Tools, untrained: frozenset[int] = frozenset()
    ) -> RenderedTemplate:
        """Return the rendered template for conversations of this shape.

        Args:
            untrained: numbers of the assistant messages that get no span; the first message is 0.

        Raises:
            AmbiguousTemplateError: the assistant's turns cannot be located, or do not end with a special token.
        """
        shape = (_shape(messages, tools), untrained)
        if shape not in self._by_shape:
            if len(self._by_shape) >= self._MAX_SIZE:
                self._by_shape.clear()
            self._by_shape[shape] = self._make(_ProbedConversation(messages, tools, untrained))
        return self._by_shape[shape]

    def for_conversation(
        self, messages: Sequence[Message], tools: Tools, untrained: frozenset[int] = frozenset()
    ) -> RenderedTemplate:
        """Return the rendered template of this conversation alone, with slots for the assistant's texts only."""
        return self._make(_ProbedConversation(messages, tools, untrained, only_assistant=True))

    def for_training_template(
        self, messages: Sequence[Message], tools: Tools, untrained: frozenset[int] = frozenset()
    ) -> RenderedTemplate:
        """Return the rendered TRL training template, which keeps what the inference template drops."""
        if self.training is None:
            raise TemplateMismatchError("the template renders this conversation differently from others of its shape")
        return self._from_differing_trl_template(_ProbedConversation(messages, tools, untrained))

    def _make(self, probed: _ProbedConversation) -> RenderedTemplate:
        strategies = [self._from_blocks(self.template, OWN_BLOCKS, "")] if self.template.has_generation_blocks else []
        if not strategies:
            strategies = [self._from_trl_template] if self.training else []
            strategies.append(self._from_comparison)
            strategies += [self._from_differing_trl_template] if self.training else []
        failure = None
        for strategy in strategies:
            try:
                return strategy(probed)
            except TemplateMismatchError:
                raise
            except AmbiguousTemplateError as error:
                failure = failure or error if strategy == self._from_differing_trl_template else error
        raise failure or AmbiguousTemplateError("no strategy applies")

    def _from_trl_template(self, probed: _ProbedConversation) -> RenderedTemplate:
        assert self.training is not None
        if self.training.render(probed.plain, probed.tools) != self.template.render(probed.plain, probed.tools):
            raise AmbiguousTemplateError("TRL's training template renders this conversation differently")
        return self._from_blocks(self.training, TRL_BLOCKS, "", self.template)(probed)

    def _from_differing_trl_template(self, probed: _ProbedConversation) -> RenderedTemplate:
        assert self.training is not None
        note = f"{TRL_BLOCKS}, {DIFFERS}"
        return self._from_blocks(self.training, note, note)(probed)

    def _from_blocks(
        self, tagged: ChatTemplate, span_source: str, note: str, rendered_by: ChatTemplate | None = None
    ) -> Callable[[_ProbedConversation], RenderedTemplate]:
        def strategy(probed: _ProbedConversation) -> RenderedTemplate:
            text, blocks = tagged.render_with_generation_spans(probed.plain, probed.tools)
            spans = [block for block in blocks if probed.is_block_trained(text, *block)]
            return self._split(rendered_by or tagged, probed, text, spans, span_source, note)

        return strategy

    def _from_comparison(self, probed: _ProbedConversation) -> RenderedTemplate:
        """Locate the spans by the template's other renderings."""
        text = self.template.render(probed.plain, probed.tools)
        probed.check_all_rendered(text)
        spans = [
            (self._find_start(probed, text, number), self._find_end(probed, text, number)) for number in probed.trained
        ]
        return self._split(self.template, probed, text, spans, COMPARED, "")

    def _find_start(self, probed: _ProbedConversation, text: str, number: int) -> int:
        """Return where turn `number` begins: where the generation prompt ends or opens what the turn does not have."""
        before = probed.plain[:number]
        prompt = self.template.render(before, probed.tools, add_generation_prompt=True)
        common = _common_length(prompt, text)
        first = next(match for match in _PROBE.finditer(text) if probed.message_of(match) == number)
        content_start = first.start()
        if _PROBE.search(prompt, common) or not _OPENS_REASONING.fullmatch(prompt, common):
            raise AmbiguousTemplateError(
                f"turn {number + 1}: start of the answer is ambiguous: the template renders the preceding turns "
                f"differently once an answer follows"
            )
        without_prompt = self.template.render(before, probed.tools)
        is_call = probed.probes[first.group()][1].startswith("call ")  # the model itself writes a call's special tokens
        if prompt == without_prompt and text[common:content_start].strip() and not is_call:
            raise AmbiguousTemplateError(
                f"turn {number + 1}: the template writes {text[common:content_start]!r} before the answer and no "
                f"generation prompt, so the model would have to generate it at inference"
            )
        return min(common, content_start)

    def _find_end(self, probed: _ProbedConversation, text: str, number: int) -> int:
        """Return where turn `number` ends: the common text after its last probe of `text` and of the rendering that
        stops at this turn."""
        through = self.template.render(probed.plain[: number + 1], probed.tools)
        matches = [match for match in _PROBE.finditer(through) if probed.message_of(match) == number]
        probe = matches[-1].group() if matches else ""
        occurrence = sum(match.group() == probe for match in matches)
        ends = [match.end() for match in _PROBE.finditer(text) if match.group() == probe]
        if not matches or len(ends) < occurrence:
            raise AmbiguousTemplateError(
                f"turn {number + 1}: end of the answer is ambiguous: the template renders it differently once more "
                f"turns follow"
            )
        tail, tail_when_last = text[ends[occurrence - 1] :], through[matches[-1].end() :]
        length = _common_length(tail, tail_when_last)
        split_token = next((m for m in self.special_tokens.finditer(tail) if m.start() < length < m.end()), None)
        length = split_token.start() if split_token else length
        if not self._trailing_stop_tokens(tail[:length]):
            # A last turn may end with another special token than earlier ones (gpt-oss: <|return|>, <|end|>). It is not
            # the header of the next turn if that turn's own special token follows it.
            stops = [self._stop_token_at(rest, length) for rest in (tail, tail_when_last)]
            following = tail[length + len(stops[0]) :].lstrip()
            length += len(stops[0]) if all(stops) and self._stop_token_at(following, 0) else 0
        return ends[occurrence - 1] + length

    def _stop_token_at(self, text: str, position: int) -> str:
        return next((token for token in self.stop_tokens if text.startswith(token, position)), "")

    def _find_stop_tokens(
        self, probed: _ProbedConversation, text: str, matches: list[re.Match[str]], spans: list[tuple[int, int]]
    ) -> tuple[str, ...]:
        """Return the tokens that generation stops at: the outermost of the last turn and of each turn with a tool call.

        Others do not end a generation: the end of one call of several, or of the reasoning (gpt-oss: <|end|>).
        """
        tokens = []
        for number in probed.trained:
            if probed.plain[number].get("tool_calls") or number == len(probed.plain) - 1:
                ends = [match.end() for match in matches if probed.message_of(match) == number]
                tails = [(position, end) for position in ends for start, end in spans if start <= position <= end]
                tokens += self._trailing_stop_tokens(text[slice(*max(tails))])[:1]
        return tuple(dict.fromkeys(tokens))

    def _trailing_stop_tokens(self, tail: str) -> tuple[str, ...]:
        """Return the stop tokens at the end of a text, ignoring white space."""
        tokens: list[str] = []
        while (tail := tail.rstrip()) and (
            token := next((token for token in self.stop_tokens if tail.endswith(token)), "")
        ):
            tokens.append(token)
            tail = tail[: -len(token)]
        return tuple(tokens)

    def _split(
        self,
        template: ChatTemplate,
        probed: _ProbedConversation,
        text: str,
        spans: list[tuple[int, int]],
        span_source: str,
        note: str,
    ) -> RenderedTemplate:
        """Split a rendered shape into literals and slots after checking its spans."""
        matches = list(_PROBE.finditer(text))
        probed.check_all_rendered(text)
        probed.check_arguments(template)
        self._check_spans(probed, text, matches, spans)
        bounds = [0, *(match.end() for match in matches)], [*(match.start() for match in matches), len(text)]
        literals = tuple(text[start:end] for start, end in zip(*bounds, strict=True))
        slots = _find_trimming(probed, literals, matches, template.render(probed.padded, probed.tools))

        def to_position(character: int) -> Position:
            for number, (start, end) in enumerate(zip(*bounds, strict=True)):
                if start <= character <= end:
                    return number, character - start
            raise AmbiguousTemplateError("an assistant span begins or ends inside a message")

        notes = (note or self._note_on_prompt(probed, text), _note_on_tools(template, probed, text))
        return RenderedTemplate(
            template=template,
            literals=literals,
            slots=slots,
            spans=tuple((to_position(start), to_position(end)) for start, end in spans),
            stop_tokens=self._find_stop_tokens(probed, text, matches, spans),
            span_source=span_source,
            note="; ".join(filter(None, notes)),
            dropped_reasoning=len(probed.reasoning - {match.group() for match in matches}),
        )

    def _note_on_prompt(self, probed: _ProbedConversation, text: str) -> str:
        """Return what the generation prompts have and the rows do not; empty if the rows contain the prompts."""
        rests = []
        for number in probed.trained:
            prompt = self.template.render(probed.plain[:number], probed.tools, add_generation_prompt=True)
            rests.append(prompt[_common_length(prompt, text) :])
        rest = next(filter(None, rests), "")
        return f"at inference the generation prompt ends with {rest!r}, which these rows do not contain" if rest else ""

    def _check_spans(
        self, probed: _ProbedConversation, text: str, matches: list[re.Match[str]], spans: list[tuple[int, int]]
    ) -> None:
        """Check that every text of the assistant is in a span with its end of turn, and no other text is.

        Raises:
            AmbiguousTemplateError: one is not.
        """
        tails: dict[int, tuple[int, int]] = {}
        traced: set[str] = set()
        for match in matches:
            if match.group() not in probed.probes:
                raise AmbiguousTemplateError(f"the row contains {match.group()!r}, which is reserved for probing")
            number, field = probed.probes[match.group()]
            span = next(((a, b) for a, b in spans if a <= match.start() and match.end() <= b), None)
            is_trained = number in probed.trained
            if span and not is_trained:
                role = probed.plain[number]["role"]
                raise AmbiguousTemplateError(f"turn {number + 1}: the generation block contains the {role}'s text")
            if is_trained and not span and field in ("content", "reasoning_content"):
                raise AmbiguousTemplateError(f"turn {number + 1}: the generation block omits the assistant's text")
            if span:
                tails[number] = (match.end(), span[1])
                traced.add(match.group())
        for probe, (number, field) in probed.probes.items():
            # A call's name may also be in the header of the tool's answer, which is not the assistant's.
            if field.startswith("call ") and probe not in traced and number in probed.trained:
                raise AmbiguousTemplateError(f"turn {number + 1}: the generation block omits the tool call")
        for number in probed.trained:
            start, end = tails.get(number, (0, 0))
            if not self._trailing_stop_tokens(text[start:end]):
                following = text[start : start + 16].partition("qzx")[0]
                outside = f" (followed by {following!r})" if following and end == start else ""
                raise AmbiguousTemplateError(
                    f"turn {number + 1}: end of the assistant's turn: found {text[max(end - 12, start) : end]!r}"
                    f"{outside}, expected a special token, without which the model never learns to stop"
                )


def _note_on_tools(template: ChatTemplate, probed: _ProbedConversation, text: str) -> str:
    """Return a note if the template does not render the tools of a row; it does not at inference either."""
    if probed.tools is None:
        return ""
    try:
        ignored = template.render(probed.plain, None) == text
    except AmbiguousTemplateError:  # it fails without tools, so it reads them
        return ""
    return "the chat template does not render the tools that rows offer" if ignored else ""


class _ProbedConversation:
    """A conversation with a probe string in place of every text: `plain`, and `padded` with white space around.

    Attributes:
        trained: numbers of the assistant messages that are in the loss; the first message is 0.
    """

    def __init__(
        self, messages: Sequence[Message], tools: Tools, untrained: frozenset[int], only_assistant: bool = False
    ):
        def has_slot(message: Message) -> bool:
            return not only_assistant or message["role"] == "assistant"

        self.tools = tools
        self.untrained = untrained
        assistant = (number for number, message in enumerate(messages) if message["role"] == "assistant")
        self.trained = [number for number in assistant if number not in untrained]
        self.probes: dict[str, tuple[int, str]] = {}
        self.plain, self.padded = (
            [self._replace(number, message, padded) if has_slot(message) else dict(message)
             for number, message in enumerate(messages)]
            for padded in (False, True)
        )  # fmt: skip
        self.reasoning = {probe for probe, (_, field) in self.probes.items() if field == "reasoning_content"}

    def message_of(self, match: re.Match[str]) -> int:
        return self.probes[match.group()][0] if match.group() in self.probes else -1

    def is_block_trained(self, text: str, start: int, end: int) -> bool:
        """Return whether the turns in a generation block, [start, end) characters, are in the loss.

        Raises:
            AmbiguousTemplateError: some are and some are not.
        """
        numbers = {self.message_of(match) for match in _PROBE.finditer(text, start, end)}
        untrained = numbers & self.untrained
        if untrained and untrained != numbers:
            raise AmbiguousTemplateError(
                f"turn {min(untrained) + 1}: found in one generation block with a turn in the loss, so it cannot be "
                f"left out of the loss"
            )
        return not untrained

    def check_all_rendered(self, text: str) -> None:
        """Check that every probe is in `text`; templates drop old reasoning by design, all else would be lost silently.

        Raises:
            AmbiguousTemplateError: the template omits a text.
        """
        rendered = {match.group() for match in _PROBE.finditer(text)}
        for probe, (number, field) in self.probes.items():
            if probe in rendered or (field == "reasoning_content" and number < len(self.plain) - 1):
                continue
            names = {"content": f"the {self.plain[number]['role']}'s text", "reasoning_content": "the reasoning"}
            raise AmbiguousTemplateError(f"turn {number + 1}: the template omits {names.get(field, 'the tool call')}")

    def check_arguments(self, template: ChatTemplate) -> None:
        """Check that the template renders the arguments of calls; training without them would teach empty calls.

        Raises:
            AmbiguousTemplateError: a text in a call's arguments is not in the rendered text.
        """
        probes: list[str] = []
        traced = [
            {**message, "tool_calls": [_probed_call(call, probes) for call in message["tool_calls"]]}
            if message.get("tool_calls")
            else message
            for message in self.plain
        ]
        text = template.render(traced, self.tools) if probes else ""
        if any(probe not in text for probe in probes):
            raise AmbiguousTemplateError("the template omits the arguments of a tool call")

    def _replace(self, number: int, message: Message, padded: bool) -> Message:
        left, right = (_LEFT["keep"], _RIGHT["keep"]) if padded else ("", "")
        replaced = dict(message)
        for field in ("content", "reasoning_content"):
            if str(message.get(field) or "").strip():
                replaced[field] = left + self._probe(number, field) + right
        if "thinking" in replaced:
            replaced["thinking"] = replaced["reasoning_content"]
        if message.get("tool_calls"):
            replaced["tool_calls"] = [
                {**call, "function": {**call["function"], "name": self._probe(number, f"call {index}")}}
                for index, call in enumerate(message["tool_calls"])
            ]
        return replaced

    def _probe(self, number: int, field: str) -> str:
        known = next((probe for probe, source in self.probes.items() if source == (number, field)), None)
        if known is None:
            known = f"qzx{len(self.probes):04}xzq"
            self.probes[known] = (number, field)
        return known


def _probed_call(call: dict[str, Any], probes: list[str]) -> dict[str, Any]:
    """Return the call with a probe in place of each text among its arguments; append the probes to `probes`."""
    arguments = dict(call["function"]["arguments"])
    for key, value in arguments.items():
        if isinstance(value, str) and value:
            probes.append(f"zxq{len(probes):04}qxz")
            arguments[key] = probes[-1]
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _shape(messages: Sequence[Message], tools: Tools) -> Any:
    """Return a key that is equal for conversations which differ in their texts only."""
    if tools is None and all(len(message) == 2 for message in messages):
        return tuple((message["role"], bool(message["content"].strip()) or message["content"]) for message in messages)
    texts = ("content", "reasoning_content", "thinking")
    bare = [
        {key: bool(str(value).strip()) if key in texts else value for key, value in message.items()}
        for message in messages
    ]
    return json.dumps([bare, tools], sort_keys=True)


def _field(message: Message, field: str) -> str:
    if field.startswith("call "):
        return str(message["tool_calls"][int(field[5:])]["function"]["name"])
    return str(message[field])


def _find_trimming(
    probed: _ProbedConversation, literals: tuple[str, ...], matches: list[re.Match[str]], padded: str
) -> tuple[ContentSlot, ...]:
    """Return the slots, with the trimming that the rendering of the padded probes shows."""
    pieces = _PROBE.split(padded)
    gaps, probes = pieces[::2], [f"qzx{number}xzq" for number in pieces[1::2]]
    if probes != [match.group() for match in matches]:
        raise TemplateMismatchError("the template renders texts differently if white space surrounds them")
    trims = [_trimming_around(literal, gap) for literal, gap in zip(literals, gaps, strict=True)]
    sources = [probed.probes[probe] for probe in probes]
    return tuple(
        ContentSlot(*source)
        if source[1].startswith("call ")
        else ContentSlot(*source, left=trims[number][1], right=trims[number + 1][0])
        for number, source in enumerate(sources)
    )


def _trimming_around(literal: str, gap: str) -> tuple[str, str]:
    """Return how the text before a literal is trimmed at its right, and the text after it at its left."""
    for right, at_right in _RIGHT.items():
        for left, at_left in _LEFT.items():
            if at_right + literal + at_left == gap:
                return right, left
    raise TemplateMismatchError("the template modifies the texts of the conversation")


def _common_length(first: str, second: str) -> int:
    """Return the length of the common prefix of two texts."""
    shorter = min(len(first), len(second))
    return next((index for index in range(shorter) if first[index] != second[index]), shorter)
