"""Finds, to the character, what the assistant writes in what a chat template renders.

A template is a program, so its text alone does not say where an answer begins. Each *shape* of conversation (its roles,
which fields are filled, its tools) is rendered once with a probe word in place of every text. The probes show which
pieces the template itself writes and how it trims what it is given: the shape's skeleton. Where the assistant's turns
begin and end in a skeleton is told, in this order,

1. by the template's own `{% generation %}` blocks;
2. by those of the training template that TRL ships for it, where that one renders the shape as this one does;
3. by the template's other renderings: a turn begins where the rendering of what comes before it, with the generation
   prompt, stops being the same; it ends where the rendering that stops at this turn does, behind its end of turn;
4. by TRL's training template although it renders the shape differently, which is noted and reported.

A row is then rendered by the template itself and compared with its skeleton filled in, character by character. Where
they differ the row gets a skeleton of its own; where that differs too it is refused. Nothing is guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sft_recipes.data.chat_template import OtherwiseError, Template, Tools, UnclearError
from sft_recipes.data.formats import Message

Place = tuple[int, int]  # which literal of a skeleton, and how many characters into it

DIFFERS = "which renders this otherwise than the inference template"
_PROBE = re.compile(r"qzx(\d{4})xzq")
# White space around a probe shows what a template trims: nothing, line feeds, or all. No template writes these spaces.
_LEFT = {"keep": "\n\u2003", "newlines": "\u2003", "strip": ""}
_RIGHT = {"keep": "\u2002\n", "newlines": "\u2002", "strip": ""}
# What a generation prompt may open and an earlier turn may lack: templates leave old reasoning out.
_OPENS_REASONING = re.compile(r"\s*(<[^<>\s]*think[^<>\s]*>|\[THINK\])?\s*(</[^<>\s]*think[^<>\s]*>\s*)?")


@dataclass(frozen=True)
class Slot:
    """A place that a text of the conversation is written to: which message's, which field, and how it is trimmed."""

    message: int
    field: str
    left: str = "keep"
    right: str = "keep"

    def text(self, messages: Sequence[Message]) -> str:
        """What stands there in a conversation of this shape."""
        text = _field(messages[self.message], self.field)
        text = text.lstrip() if self.left == "strip" else text.lstrip("\n") if self.left == "newlines" else text
        return text.rstrip() if self.right == "strip" else text.rstrip("\n") if self.right == "newlines" else text


@dataclass(frozen=True)
class Skeleton:
    """What a template writes for one shape: literals[0] slots[0] literals[1] … literals[n].

    `spans` are the assistant's, `stops` the texts of the special tokens with which its last turn ends. `how` says by
    which road they were found, `note` how the text differs from what is rendered at inference.
    """

    template: Template
    literals: tuple[str, ...]
    slots: tuple[Slot, ...]
    spans: tuple[tuple[Place, Place], ...]
    stops: tuple[str, ...]
    how: str
    note: str = ""
    dropped_reasoning: int = 0

    def fill(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]], list[tuple[int, int]]]:
        """The text of a conversation, the assistant's [start, end) characters, and those of each slot."""
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


class Skeletons:
    """The skeletons of a template, one a shape, made when first met.

    Args:
        template: what the tokenizer renders at inference.
        training: TRL's training template for it, if there is one.
        specials: texts of the special tokens, any of which can end a turn.
        controls: finds control tokens, special or only added.
    """

    _KEPT = 4096

    def __init__(
        self, template: Template, training: Template | None, specials: Iterable[str], controls: re.Pattern[str]
    ):
        self.template = template
        self.training = training
        self.specials = sorted(specials, key=len, reverse=True)
        self.controls = controls
        self._made: dict[Any, Skeleton] = {}

    def of(self, messages: Sequence[Message], tools: Tools) -> Skeleton:
        """The skeleton for conversations of this shape.

        Raises:
            UnclearError: the assistant's turns cannot be told in it, or do not end as the model must learn to end them.
        """
        shape = _shape(messages, tools)
        if shape not in self._made:
            if len(self._made) >= self._KEPT:
                self._made.clear()
            self._made[shape] = self._make(messages, tools, lambda message: True)
        return self._made[shape]

    def of_this(self, messages: Sequence[Message], tools: Tools) -> Skeleton:
        """The skeleton of this one conversation, in which only the assistant's texts are open."""
        return self._make(messages, tools, lambda message: message["role"] == "assistant")

    def of_training(self, messages: Sequence[Message], tools: Tools) -> Skeleton:
        """The skeleton by TRL's training template, which keeps what the inference template drops."""
        if self.training is None:
            raise OtherwiseError("the chat template renders this conversation otherwise than others of its shape")
        return self._shipped_although(_Probed(messages, tools, lambda message: True))

    def _make(self, messages: Sequence[Message], tools: Tools, open_: Callable[[Message], bool]) -> Skeleton:
        roads = [self._tags_of(self.template, "its own generation blocks", "")] if self.template.tagged else []
        if not roads:
            roads = [self._shipped] if self.training else []
            roads.append(self._compared)
            roads += [self._shipped_although] if self.training else []
        probed, refused = _Probed(messages, tools, open_), None
        for road in roads:
            try:
                return road(probed)
            except OtherwiseError:
                raise
            except UnclearError as error:
                refused = refused or error if road == self._shipped_although else error
        raise refused or UnclearError("no road")

    def _shipped(self, probed: _Probed) -> Skeleton:
        assert self.training is not None
        if self.training.render(probed.plain, probed.tools) != self.template.render(probed.plain, probed.tools):
            raise UnclearError("TRL's training template renders this otherwise")
        return self._tags_of(self.training, "TRL's training template", "", self.template)(probed)

    def _shipped_although(self, probed: _Probed) -> Skeleton:
        assert self.training is not None
        note = f"TRL's training template, {DIFFERS}"
        return self._tags_of(self.training, note, note)(probed)

    def _tags_of(
        self, tagged: Template, how: str, note: str, shown: Template | None = None
    ) -> Callable[[_Probed], Skeleton]:
        def road(probed: _Probed) -> Skeleton:
            text, spans = tagged.generation(probed.plain, probed.tools)
            return self._skeleton(shown or tagged, probed, text, spans, how, note)

        return road

    def _compared(self, probed: _Probed) -> Skeleton:
        """The spans by the template's other renderings."""
        text = self.template.render(probed.plain, probed.tools)
        probed.check_that_all_is_said(text)
        spans = [
            (self._start(probed, text, number), self._end(probed, text, number))
            for number, message in enumerate(probed.plain)
            if message["role"] == "assistant"
        ]
        return self._skeleton(self.template, probed, text, spans, "compared renderings", "")

    def _start(self, probed: _Probed, text: str, number: int) -> int:
        """Where turn `number` begins: where the generation prompt ends, or begins what the turn does not have."""
        before = probed.plain[:number]
        prompt = self.template.render(before, probed.tools, add_generation_prompt=True)
        common = _common(prompt, text)
        first = next(match for match in _PROBE.finditer(text) if probed.message_of(match) == number)
        own = first.start()
        if _PROBE.search(prompt, common) or not _OPENS_REASONING.fullmatch(prompt, common):
            raise UnclearError(
                f"the chat template renders what comes before turn {number + 1} otherwise when an answer follows, so "
                f"its start cannot be told"
            )
        asked = self.template.render(before, probed.tools)
        called = probed.words[first.group()][1].startswith("call ")  # the marks of a call are the model's own to write
        if prompt == asked and text[common:own].strip() and not called:
            raise UnclearError(
                f"the chat template writes {text[common:own]!r} before an answer and no generation prompt, so at "
                f"inference the model would have to write that itself"
            )
        return min(common, own)

    def _end(self, probed: _Probed, text: str, number: int) -> int:
        """Where turn `number` ends: what the rendering that stops there has behind its last word, as far as the
        same."""
        through = self.template.render(probed.plain[: number + 1], probed.tools)
        own = [match for match in _PROBE.finditer(through) if probed.message_of(match) == number]
        word = own[-1].group() if own else ""
        occurrence = sum(match.group() == word for match in own)
        places = [match.end() for match in _PROBE.finditer(text) if match.group() == word]
        if not own or len(places) < occurrence:
            raise UnclearError(
                f"the chat template renders turn {number + 1} otherwise when more turns follow, so its end cannot be "
                f"told"
            )
        here, there = text[places[occurrence - 1] :], through[own[-1].end() :]
        length = _common(here, there)
        inside = next((m for m in self.controls.finditer(here) if m.start() < length < m.end()), None)
        length = inside.start() if inside else length
        if not self._stops(here[:length]):
            # A last turn may end with another special token than earlier ones (gpt-oss: <|return|>, <|end|>). That it
            # is no header of the next turn shows in that one's own special token behind it.
            ends = [self._special_at(tail, length) for tail in (here, there)]
            behind = here[length + len(ends[0]) :].lstrip()
            length += len(ends[0]) if all(ends) and self._special_at(behind, 0) else 0
        return places[occurrence - 1] + length

    def _special_at(self, text: str, position: int) -> str:
        return next((special for special in self.specials if text.startswith(special, position)), "")

    def _ends(
        self, probed: _Probed, text: str, found: list[re.Match[str]], spans: list[tuple[int, int]]
    ) -> tuple[str, ...]:
        """The tokens that generation stops at: the outermost of the last turn, and of each turn that calls a tool.

        Others do not end a generation: the end of one call of several, a reasoning's end (gpt-oss: <|end|>).
        """
        ends = []
        for number, message in enumerate(probed.plain):
            if message["role"] == "assistant" and (message.get("tool_calls") or number == len(probed.plain) - 1):
                own = [match.end() for match in found if probed.message_of(match) == number]
                inside = [(place, end) for place in own for start, end in spans if start <= place <= end]
                ends += self._stops(text[slice(*max(inside))])[:1]
        return tuple(dict.fromkeys(ends))

    def _stops(self, tail: str) -> tuple[str, ...]:
        """The special tokens with which a turn ends, white space aside."""
        found: list[str] = []
        while (tail := tail.rstrip()) and (
            special := next((special for special in self.specials if tail.endswith(special)), "")
        ):
            found.append(special)
            tail = tail[: -len(special)]
        return tuple(found)

    def _skeleton(
        self,
        template: Template,
        probed: _Probed,
        text: str,
        spans: list[tuple[int, int]],
        how: str,
        note: str,
    ) -> Skeleton:
        """The pieces of a rendered shape, once its spans keep the contract."""
        found = list(_PROBE.finditer(text))
        probed.check_that_all_is_said(text)
        probed.check_arguments(template)
        self._check(probed, text, found, spans)
        bounds = [0, *(match.end() for match in found)], [*(match.start() for match in found), len(text)]
        literals = tuple(text[start:end] for start, end in zip(*bounds, strict=True))
        slots = _trimmed(probed, literals, found, template.render(probed.padded, probed.tools))

        def place(position: int) -> Place:
            for number, (start, end) in enumerate(zip(*bounds, strict=True)):
                if start <= position <= end:
                    return number, position - start
            raise UnclearError("the assistant's part begins or ends inside a message")

        return Skeleton(
            template=template,
            literals=literals,
            slots=slots,
            spans=tuple((place(start), place(end)) for start, end in spans),
            stops=self._ends(probed, text, found, spans),
            how=how,
            note="; ".join(filter(None, (note or self._other_prompt(probed, text), _no_tools(template, probed, text)))),
            dropped_reasoning=len(probed.reasoning - {match.group() for match in found}),
        )

    def _other_prompt(self, probed: _Probed, text: str) -> str:
        """How the generation prompts go on where the rows do not; nothing where they are the rows' own."""
        rests = []
        for number, message in enumerate(probed.plain):
            if message["role"] == "assistant":
                prompt = self.template.render(probed.plain[:number], probed.tools, add_generation_prompt=True)
                rests.append(prompt[_common(prompt, text) :])
        rest = next(filter(None, rests), "")
        return f"at inference the prompt goes on with {rest!r}, which these rows do not have there" if rest else ""

    def _check(self, probed: _Probed, text: str, found: list[re.Match[str]], spans: list[tuple[int, int]]) -> None:
        """Every assistant's text in a span with its end of turn, and every other text in none."""
        ends: dict[int, tuple[int, int]] = {}
        traced: set[str] = set()
        for match in found:
            if match.group() not in probed.words:
                raise UnclearError(f"the row itself says {match.group()!r}, a word that texts are traced by")
            number, field = probed.words[match.group()]
            inside = next(((a, b) for a, b in spans if a <= match.start() and match.end() <= b), None)
            said = probed.plain[number]["role"] == "assistant"
            if inside and not said:
                raise UnclearError(f"the generation block holds what the {probed.plain[number]['role']} says")
            if said and not inside and field in ("content", "reasoning_content"):
                raise UnclearError(f"the generation block leaves out what the assistant says in turn {number + 1}")
            if inside:
                ends[number] = (match.end(), inside[1])
                traced.add(match.group())
        for word, (number, field) in probed.words.items():
            # A call's name may stand in its answer's header too, which is not the assistant's.
            if field.startswith("call ") and word not in traced:
                raise UnclearError(f"the generation block leaves out the tool call in turn {number + 1}")
        for number, message in enumerate(probed.plain):
            if message["role"] != "assistant":
                continue
            start, end = ends.get(number, (0, 0))
            if not self._stops(text[start:end]):
                behind = text[start : start + 16].partition("qzx")[0]
                raise UnclearError(
                    f"the chat template ends the assistant's turn with {text[max(end - 12, start) : end]!r}"
                    f"{f' (then comes {behind!r})' if behind and end == start else ''}, no special token, so the model "
                    f"would never learn to stop"
                )


def _no_tools(template: Template, probed: _Probed, text: str) -> str:
    """That a template does not write the tools that a row offers, which it does not at inference either."""
    if probed.tools is None:
        return ""
    try:
        unread = template.render(probed.plain, None) == text
    except UnclearError:  # it cannot do without tools, so it reads them
        return ""
    return "the chat template does not write the tools that rows offer" if unread else ""


class _Probed:
    """A conversation with a probe word for every text: `plain`, and `padded` with white space around."""

    def __init__(self, messages: Sequence[Message], tools: Tools, open_: Callable[[Message], bool]):
        self.tools = tools
        self.words: dict[str, tuple[int, str]] = {}
        self.plain = [self._replaced(number, message, False, open_(message)) for number, message in enumerate(messages)]
        self.padded = [self._replaced(number, message, True, open_(message)) for number, message in enumerate(messages)]
        self.reasoning = {word for word, (_, field) in self.words.items() if field == "reasoning_content"}

    def message_of(self, match: re.Match[str]) -> int:
        return self.words[match.group()][0] if match.group() in self.words else -1

    def check_that_all_is_said(self, text: str) -> None:
        """Templates leave out old reasoning by design; whatever else they leave out would be lost in silence."""
        seen = {match.group() for match in _PROBE.finditer(text)}
        for word, (number, field) in self.words.items():
            if word in seen or (field == "reasoning_content" and number < len(self.plain) - 1):
                continue
            what = {"content": f"what the {self.plain[number]['role']} says", "reasoning_content": "the reasoning"}
            raise UnclearError(f"the chat template leaves out {what.get(field, 'the tool call')} in turn {number + 1}")

    def check_arguments(self, template: Template) -> None:
        """A template that wrote calls without their arguments would teach empty calls.

        Raises:
            UnclearError: a text in a call's arguments is not in what the template writes.
        """
        words: list[str] = []
        traced = [
            {**message, "tool_calls": [_traced_call(call, words) for call in message["tool_calls"]]}
            if message.get("tool_calls")
            else message
            for message in self.plain
        ]
        text = template.render(traced, self.tools) if words else ""
        if any(word not in text for word in words):
            raise UnclearError("the chat template leaves out the arguments of a tool call")

    def _replaced(self, number: int, message: Message, padded: bool, open_: bool) -> Message:
        if not open_:
            return dict(message)
        left, right = (_LEFT["keep"], _RIGHT["keep"]) if padded else ("", "")
        replaced = dict(message)
        for field in ("content", "reasoning_content"):
            if str(message.get(field) or "").strip():
                replaced[field] = left + self._word(number, field) + right
        if "thinking" in replaced:
            replaced["thinking"] = replaced["reasoning_content"]
        if message.get("tool_calls"):
            replaced["tool_calls"] = [
                {**call, "function": {**call["function"], "name": self._word(number, f"call {place}")}}
                for place, call in enumerate(message["tool_calls"])
            ]
        return replaced

    def _word(self, number: int, field: str) -> str:
        word = f"qzx{len(self.words):04}xzq"
        known = next((word for word, meant in self.words.items() if meant == (number, field)), None)
        if known is None:
            self.words[word] = (number, field)
        return known or word


def _traced_call(call: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """The call with a word in place of each text among its arguments; the words are added to `words`."""
    arguments = dict(call["function"]["arguments"])
    for key, value in arguments.items():
        if isinstance(value, str) and value:
            words.append(f"zxq{len(words):04}qxz")
            arguments[key] = words[-1]
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _shape(messages: Sequence[Message], tools: Tools) -> Any:
    """What conversations share that a template renders alike but for their texts."""
    if tools is None and all(len(message) == 2 for message in messages):
        return tuple((message["role"], bool(message["content"].strip()) or message["content"]) for message in messages)
    filled = ("content", "reasoning_content", "thinking")
    bare = [
        {key: bool(str(value).strip()) if key in filled else value for key, value in message.items()}
        for message in messages
    ]
    return json.dumps([bare, tools], sort_keys=True)


def _field(message: Message, field: str) -> str:
    if field.startswith("call "):
        return str(message["tool_calls"][int(field[5:])]["function"]["name"])
    return str(message[field])


def _trimmed(probed: _Probed, literals: tuple[str, ...], found: list[re.Match[str]], padded: str) -> tuple[Slot, ...]:
    """The slots, with how the template trims each, told from the rendering of the padded probes."""
    pieces = _PROBE.split(padded)
    gaps, words = pieces[::2], [f"qzx{number}xzq" for number in pieces[1::2]]
    if words != [match.group() for match in found]:
        raise OtherwiseError("the chat template renders texts otherwise when white space stands around them")
    cuts = [_cut(literal, gap) for literal, gap in zip(literals, gaps, strict=True)]
    meant = [probed.words[word] for word in words]
    return tuple(
        Slot(*what, left=cuts[number][1], right=cuts[number + 1][0]) if not what[1].startswith("call ") else Slot(*what)
        for number, what in enumerate(meant)
    )


def _cut(literal: str, gap: str) -> tuple[str, str]:
    """How the text before a literal is trimmed at its right, and the text behind it at its left."""
    for right, at_right in _RIGHT.items():
        for left, at_left in _LEFT.items():
            if at_right + literal + at_left == gap:
                return right, left
    raise OtherwiseError("the chat template changes the texts that it is given")


def _common(first: str, second: str) -> int:
    """How many characters two texts begin with alike."""
    shorter = min(len(first), len(second))
    return next((place for place in range(shorter) if first[place] != second[place]), shorter)
