"""Renders a conversation with the tokenizer's own chat template and finds, to the character, what the assistant says.

The template is never replaced: what is trained is what the tokenizer renders at inference. Three renderings give each
assistant turn its place: the conversation up to the turn with the generation prompt (where the model starts to write),
up to the turn with its answer (where it stops), and whole. A template that renders an earlier turn otherwise than a
last one, so that no place can be trusted, is refused rather than guessed at.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.data.formats import Message
from sft_recipes.planning.schema import RecipeError

_PROBE = "qzx probe xzq"

IGNORED = -100  # the label of a token that the loss does not look at (torch.nn.CrossEntropyLoss.ignore_index)

# Padding tokens that well-known tokenizers hold without naming them as such.
_PADDING_TOKENS = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|endoftext|>", "<unk>")


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation and the [start, end) characters of its assistant turns, end of turn included."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Tokenized:
    """Token ids, and labels of the same length: the id where the loss looks, IGNORED elsewhere."""

    input_ids: list[int]
    labels: list[int]


def load_tokenizer(name_or_path: str, revision: str | None, chat_template: str | None, trust_remote_code: bool) -> Any:
    """The tokenizer with a chat template and a padding token, not the end of turn where there is another.

    Raises:
        RecipeError: it cannot be loaded, has no chat template and the recipe gives none, or cannot tell offsets.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # OSError, ValueError, Hub and tokenizer errors alike: it is not to be had
        raise RecipeError(
            f"model.name_or_path: the tokenizer of {name_or_path} cannot be loaded "
            f"({str(error).splitlines()[0]}); name a "
            f"folder that holds it, or check the Hub name, the network and HF_TOKEN"
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
    if not tokenizer.chat_template:
        raise RecipeError(
            f"model.name_or_path: the tokenizer of {name_or_path} has no chat template (a base model?); say "
            f"model.chat_template=<a .jinja file>, or take the instruct model"
        )
    if not tokenizer.is_fast:
        raise RecipeError(
            f"model.name_or_path: the tokenizer of {name_or_path} is a slow one, which cannot tell where a token "
            "stands; "
            f"it needs a tokenizer.json"
        )
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        tokenizer.pad_token = next((token for token in _PADDING_TOKENS if token in vocabulary), tokenizer.eos_token)
    return tokenizer


def _read_template(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"model.chat_template: {file} cannot be read ({error})") from error


class Chat:
    """A tokenizer with its template, turning conversations into labelled tokens."""

    def __init__(self, tokenizer: Any, date: datetime.date):
        """`date` is what a template that writes today's date gets, so that a resumed run sees the same tokens."""
        self.tokenizer = tokenizer
        dated = "strftime_now" in str(tokenizer.chat_template)
        self._variables = {"date_string": date.strftime("%d %b %Y")} if dated else {}
        self._end_tokens = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._end_tokens |= set(tokenizer.all_special_ids)
        self._end_texts = [text for text in tokenizer.convert_ids_to_tokens(sorted(self._end_tokens)) if text]
        self._behind: dict[tuple[str, ...], str] = {}

    def render(self, messages: Sequence[Message], where: str) -> Rendered:
        """The conversation as text, with the places that the assistant wrote.

        Raises:
            RecipeError: the template refuses the conversation, or an assistant turn's place cannot be told.
        """
        text = self._apply(messages, where)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = len(self._prefix(text, messages[:number], where, number))
            end = self._end_of_turn(text, start, messages[: number + 1], where)
            spans.append((start, end))
        return Rendered(text, tuple(spans))

    def prompt(self, messages: Sequence[Message], where: str = "the prompt") -> list[int]:
        """Token ids of a conversation that waits for the assistant's answer."""
        text = self._apply(messages, where, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def tokenize(self, rendered: Sequence[Rendered], where: Sequence[str]) -> list[Tokenized]:
        """Labelled tokens of many conversations; a token counts as the assistant's where it overlaps a span.

        Special tokens are not added: the template wrote those that belong there, so there is one BOS, never two.

        Raises:
            RecipeError: an assistant turn ends with no special token, so that the model would never learn to stop.
        """
        encoded = self.tokenizer([one.text for one in rendered], add_special_tokens=False, return_offsets_mapping=True)
        columns = zip(rendered, encoded["input_ids"], encoded["offset_mapping"], where, strict=True)
        return [self._labelled(*row) for row in columns]

    def _labelled(self, rendered: Rendered, ids: list[int], offsets: list[tuple[int, int]], where: str) -> Tokenized:
        labels = [IGNORED] * len(ids)
        token = 0
        for start, end in rendered.spans:
            while token < len(ids) and offsets[token][1] <= start:
                token += 1
            last = None
            while token < len(ids) and offsets[token][0] < end:
                if offsets[token][1] > offsets[token][0]:
                    labels[token] = last = ids[token]
                token += 1
            if last not in self._end_tokens:
                turn = rendered.text[start:end]
                raise RecipeError(
                    f"{where}: the chat template ends the assistant's turn with {turn[-12:]!r}, no special token, "
                    "so the "
                    f"model would never learn to stop; give a template that writes one (model.chat_template=…)"
                )
        return Tokenized(ids, labels)

    def end_of_turn_ids(self, tokenized: Tokenized) -> set[int]:
        """Ids of the tokens with which the assistant's turns end."""
        labels = tokenized.labels
        return {
            label
            for label, after in zip(labels, [*labels[1:], IGNORED], strict=True)
            if label != IGNORED and after == IGNORED
        }

    def _apply(self, messages: Sequence[Message], where: str, add_generation_prompt: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            rendered = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **self._variables
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise RecipeError(f"{where}: the chat template refuses this conversation: {error}") from error
        return str(rendered)

    def _prefix(self, text: str, before: Sequence[Message], where: str, number: int) -> str:
        prefix = self._apply(before, where, add_generation_prompt=True)
        if not text.startswith(prefix):
            raise RecipeError(
                f"{where}: the chat template renders what comes before turn {number + 1} otherwise when an answer "
                "follows, so "
                f"its start cannot be told; give a template that does not (model.chat_template=…)"
            )
        return prefix

    def _end_of_turn(self, text: str, start: int, through: Sequence[Message], where: str) -> int:
        """Where the turn ends: behind its end-of-turn token, before what the template writes after that."""
        upto = self._apply(through, where)
        behind = self._behind_the_answer(through, where)
        marker = self._up_to_the_first_special(behind)
        head = upto.removesuffix(behind) + marker
        if upto.endswith(behind) and text.startswith(head):
            return len(head)
        # Some templates render a last turn with an empty reasoning block that an earlier turn does not get.
        for content in (through[-1]["content"], through[-1]["content"].strip()):
            if text.startswith(content + marker, start):
                return start + len(content) + len(marker)
        raise RecipeError(
            f"{where}: the chat template renders an assistant's turn otherwise when more turns follow, so its end "
            f"cannot be told; give a template that does not (model.chat_template=…)"
        )

    def _behind_the_answer(self, through: Sequence[Message], where: str) -> str:
        """What the template writes behind a last answer, seen on an answer that no template would write itself."""
        roles = tuple(message["role"] for message in through)
        if roles not in self._behind:
            probed = self._apply([*through[:-1], {**through[-1], "content": _PROBE}], where)
            self._behind[roles] = probed.rpartition(_PROBE)[2]
        return self._behind[roles]

    def _up_to_the_first_special(self, behind: str) -> str:
        ends = [behind.find(token) + len(token) for token in self._end_texts if token in behind]
        return behind[: min(ends)] if ends else behind.rstrip() or behind
