"""The loss mask for the chat templates of common model families, and whether the text equals the text at inference.

`PYTHONPATH=.:tests .venv/bin/python tests/unit/test_chat_template_families.py` updates the table of docs/chat-templates.md.
"""

# ruff: noqa: RUF001  DeepSeek writes its special tokens with a wide bar

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools

import pytest
from helpers.examples import labels_of, tokenize_all
from helpers.template_families import CONVERSATIONS, SHIPPED, WITH_IMAGES, families, templates_folder, tokenizer_of
from helpers.workplace import REPOSITORY

from sft_recipes.data.assistant_spans import COMPARED, DIFFERS, OWN_BLOCKS, TRL_BLOCKS
from sft_recipes.data.chat_template import training_templates
from sft_recipes.data.formats import Conversation
from sft_recipes.data.tokenize import IGNORED, ConversationTokenizer
from sft_recipes.runtime.errors import UserError

PAGE = REPOSITORY / "docs" / "chat-templates.md"
BEGIN, END = "<!-- the table: tests/unit/test_chat_template_families.py -->", "<!-- end of the table -->"
TODAY = datetime.date.today()  # local time, as in transformers
TEXTS = {
    "assistant": ("bravo 2.", "delta 4", "golf 7", "Zagreb"),
    "others": ("alpha 1?", "charlie", "echo 5.", "foxtrot"),
}
SPAN_SOURCES = {
    OWN_BLOCKS: "blocks",
    TRL_BLOCKS: "TRL",
    COMPARED: "compared",
}


@functools.cache
def tokenizers(family):
    """Return the tokenizer of a family; nothing may change it."""
    return tokenizer_of(family)


@functools.cache
def tokenized(family, kind):
    """Return the tokenizer, the example (or the error), and the text at inference."""
    tokenizer = tokenizers(family)
    messages, tools = CONVERSATIONS[kind]
    try:
        (example,) = tokenize_all(ConversationTokenizer(tokenizer, TODAY), [Conversation(messages, "here:1", tools)])
    except UserError as error:
        return tokenizer, str(error), None
    try:
        inference = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    except TypeError:  # deepseekv3's template expects arguments as text, which transformers does not pass
        inference = None
    return tokenizer, example, inference


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("family", families())
def test_loss_mask_covers_assistant_text_only(family, kind):
    tokenizer, example, inference = tokenized(family, kind)
    if isinstance(example, str):
        assert _reason(example), example
        return
    pairs = list(zip(example.input_ids, labels_of(example), strict=True))
    in_loss = tokenizer.decode([id for id, label in pairs if label != IGNORED])
    context = tokenizer.decode([id for id, label in pairs if label == IGNORED])
    text = tokenizer.decode(example.input_ids)
    answers = [answer for answer in TEXTS["assistant"] if answer in text]
    turns = [message for message in CONVERSATIONS[kind][0] if message["role"] == "assistant"]
    assert answers and all(turn["content"] in answers for turn in turns if turn["content"])
    for answer in answers:
        assert in_loss.count(answer) == 1 and answer not in context
    assert not [other for other in TEXTS["others"] if other in in_loss]
    assert len(example.spans) == len(turns)
    specials = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    ends = [tokenizer.decode(example.input_ids[start:end]).rstrip() for start, end in example.spans]
    assert all(end.endswith((*specials, "<tool_call|>")) for end in ends)
    assert ends[-1].endswith(specials) and example.stop_ids
    assert text == inference or DIFFERS in example.note
    bos = tokenizer.bos_token_id
    assert bos is None or example.input_ids[:2] != [bos, bos]


@pytest.mark.parametrize("family", families())
def test_rows_are_tokenized_alike_after_rows_with_the_same_turns(family):
    """A row whose texts stand between the same literals as those of an earlier row is rendered once only."""
    shared = ConversationTokenizer(tokenizers(family), TODAY)
    for kind, (messages, tools) in CONVERSATIONS.items():
        for before in ("other ", "<think>\n\n</think>\n\n", "\n"):
            others = [
                {**message, "content": message["content"] and before + message["content"]} for message in messages
            ]
            given = [Conversation(each, "here:1", tools) for each in (others, messages)]
            found = shared.tokenize(given)[1]
            expected = tokenized(family, kind)[1]
            if isinstance(expected, str):
                assert str(found) == expected
            else:
                assert dataclasses.replace(found, input_ids=found.input_ids.tolist()) == expected


def test_every_text_family_of_trl_is_tokenized():
    shipped = {file.stem for file in templates_folder().glob("*.jinja") if not file.stem.endswith("_training")}
    assert shipped == {*SHIPPED, *WITH_IMAGES}
    assert len(SHIPPED) >= 30


def test_training_templates_equal_those_of_trl():
    from trl.chat_template_utils import get_training_chat_template

    tokenizer, compared = tokenizer_of("ChatML"), 0
    for name in SHIPPED:
        tokenizer.chat_template = families()[name][2]
        ours = training_templates().get(tokenizer.chat_template)
        try:
            theirs = get_training_chat_template(tokenizer)
        except ValueError:
            theirs = None
        assert ours == theirs, name
        compared += ours is not None
    assert compared >= 20


@pytest.mark.parametrize("kind", ["one turn", "several"])
@pytest.mark.parametrize("family", [name for name in SHIPPED if name not in ("glm4moe", "deepseek_r1_distill")])
def test_labels_equal_assistant_masks_of_trl(family, kind):
    tokenizer, example, inference = tokenized(family, kind)
    training = training_templates().get(tokenizer.chat_template, tokenizer.chat_template)
    if training == tokenizer.chat_template and "{% generation" not in training.replace("{%-", "{%"):
        pytest.skip("TRL ships no training template for this family")
    if not example.span_source.startswith((TRL_BLOCKS, OWN_BLOCKS)):
        pytest.skip("TRL's training template renders these turns differently from the inference template")
    messages = CONVERSATIONS[kind][0]
    trl = tokenizer.apply_chat_template(
        messages, chat_template=training, return_dict=True, return_assistant_tokens_mask=True
    )
    assert tokenizer.decode(trl["input_ids"]) == inference
    labels = [id if mask else IGNORED for id, mask in zip(trl["input_ids"], trl["assistant_masks"], strict=True)]
    assert labels_of(example) == labels


def test_template_date_is_fixed_by_plan():
    tokenizer = tokenizer_of("Llama 3.2, with today's date")
    conversation = Conversation(CONVERSATIONS["one turn"][0], "here:1")
    day = datetime.date(2026, 11, 21)
    (example,) = tokenize_all(ConversationTokenizer(tokenizer, day), [conversation])
    assert "Today Date: 21 Nov 2026" in tokenizer.decode(example.input_ids)
    assert tokenize_all(ConversationTokenizer(tokenizer, day), [conversation])[0].input_ids == example.input_ids


def test_templates_page_is_current():
    assert _table() in PAGE.read_text(encoding="utf-8"), f"run {__doc__.split('`')[1]}"


def prompt_tokens_in_loss(family, kind):
    """Return text in the loss that the generation prompt already contains: some of TRL's blocks begin before its end."""
    tokenizer, example, _ = tokenized(family, kind)
    if isinstance(example, str):
        return set()
    messages, tools = CONVERSATIONS[kind]
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    headers = set()
    for number, (start, end) in zip(answers, example.spans, strict=True):
        before, answer = (tokenizer.decode(example.input_ids[part]) for part in (slice(start), slice(start, end)))
        prompt = tokenizer.apply_chat_template(
            messages[:number], tools=tools, tokenize=False, add_generation_prompt=True
        )
        shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt[len(before) :], answer, strict=False))
        header = "".join(character for character, _ in shared)
        if prompt.startswith(before) and header:
            headers.add(header)
    return headers


def all_prompt_tokens_in_loss(family):
    return set().union(*(prompt_tokens_in_loss(family, kind) for kind in CONVERSATIONS if kind != "tools"))


def test_prompt_tokens_in_loss_are_known():
    think = "<think>\n"
    known = {
        "qwen2_5": {"\n"},
        "deepseekv3": {"<｜Assistant｜>"},
        "deepseek_r1_distill": {"<｜Assistant｜>"},
        "gptoss": {"<|start|>assistant"},
        "muse_glimmer": {"<|start|>assistant"},
        "qwen3_5_nothink": {think, "<think>\n\n</think>\n\n"},
        **{family: {think} for family in ("qwen3_5_think", "qwen3_6", "qwen3_8")},
        **{f"nemotron_3_{kind}": {think, "<think>"} for kind in ("nano", "super", "ultra", "5_lightning")},
    }
    assert {
        family: all_prompt_tokens_in_loss(family) for family in families() if all_prompt_tokens_in_loss(family)
    } == known


def _reason(error):
    """Return why a template cannot render a conversation; empty if that is not the template's own limit."""
    for message, reason in (
        ("the template raises an error: System role not", "rejects it"),
        ("the template raises an error: Conversation roles must alternate", "rejects it"),
        ("the template omits the tool call", "not rendered"),
        ("the template omits the reasoning", "not rendered"),
    ):
        if message in error:
            return reason
    return ""


def _table():
    kinds = list(CONVERSATIONS)
    rows = [
        ["family", *kinds, "prompt tokens in the loss", "end of turn", "same text as inference"],
        ["---"] * (len(kinds) + 4),
    ]
    for family in families():
        cells, ends, notes = [], set(), []
        for kind in kinds:
            tokenizer, example, _ = tokenized(family, kind)
            if isinstance(example, str):
                cells.append(f"no: {_reason(example)}")
                continue
            ends |= set(tokenizer.convert_ids_to_tokens(sorted(example.stop_ids)))
            cells.append(
                next(short for source, short in SPAN_SOURCES.items() if example.span_source.startswith(source))
            )
            if example.note and example.note not in notes:
                notes.append(example.note)
        equal = "no; " if any(DIFFERS in note for note in notes) else "yes; " if notes else "yes"
        shown = " ".join(f"`{end}`" for end in sorted(ends))
        described = "; ".join(notes).replace("\n", "\\n").replace("|", "\\|")
        header = (
            " ".join(f"`{text}`" for text in sorted(all_prompt_tokens_in_loss(family)))
            .replace("\n", "\\n")
            .replace("|", "\\|")
        )
        rows.append([family, *cells, header or "none", shown.replace("|", "\\|"), equal + described])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    head, _, rest = page.partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{_table()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
