"""The families' chat templates, one by one: which tokens are supervised, and whether the text is that of inference.

`PYTHONPATH=.:tests .venv/bin/python tests/unit/test_chat_template_families.py` writes the table of docs/chat-templates.md anew.
"""

# ruff: noqa: RUF001  DeepSeek writes its marks with a wide bar

from __future__ import annotations

import datetime
import functools
import itertools

import pytest
from helpers.template_families import CONVERSATIONS, SHIPPED, WITH_IMAGES, families, templates_folder, tokenizer_of
from helpers.workplace import REPOSITORY

from sft_recipes.data.chat_template import training_templates
from sft_recipes.data.formats import Conversation
from sft_recipes.data.tokenize import IGNORED, Chat
from sft_recipes.runtime.errors import UserError

PAGE = REPOSITORY / "docs" / "chat-templates.md"
BEGIN, END = "<!-- the table: tests/unit/test_chat_template_families.py -->", "<!-- end of the table -->"
TODAY = datetime.date.today()  # local time, as transformers asks for
SAID = {
    "assistant": ("bravo 2.", "delta 4", "golf 7", "Zagreb"),
    "others": ("alpha 1?", "charlie", "echo 5.", "foxtrot"),
}
WAYS = {
    "its own generation blocks": "blocks",
    "TRL's training template": "TRL",
    "compared renderings": "compared",
}


@functools.cache
def looked_at(family, kind):
    """The tokenizer, the labelled example, and the text of inference; the refusal where there is one."""
    tokenizer = tokenizer_of(family)
    messages, tools = CONVERSATIONS[kind]
    try:
        (example,) = Chat(tokenizer, TODAY).label([Conversation(messages, "here:1", tools)])
    except UserError as error:
        return tokenizer, str(error), None
    try:
        inference = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    except TypeError:  # deepseekv3's wants arguments as text, which no tool of transformers gives it
        inference = None
    return tokenizer, example, inference


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("family", families())
def test_the_assistants_words_and_ends_are_supervised_and_nobody_elses(family, kind):
    tokenizer, example, inference = looked_at(family, kind)
    if isinstance(example, str):
        assert _reason(example), example
        return
    pairs = list(zip(example.input_ids, example.labels, strict=True))
    supervised = tokenizer.decode([id for id, label in pairs if label != IGNORED])
    read = tokenizer.decode([id for id, label in pairs if label == IGNORED])
    whole = tokenizer.decode(example.input_ids)
    said = [word for word in SAID["assistant"] if word in whole]
    turns = [message for message in CONVERSATIONS[kind][0] if message["role"] == "assistant"]
    assert said and all(turn["content"] in said for turn in turns if turn["content"])
    for word in said:
        assert supervised.count(word) == 1 and word not in read
    assert not [word for word in SAID["others"] if word in supervised]
    assert len(example.spans) == len(turns)
    specials = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    ends = [tokenizer.decode(example.input_ids[start:end]).rstrip() for start, end in example.spans]
    assert all(end.endswith((*specials, "<tool_call|>")) for end in ends)
    assert ends[-1].endswith(specials) and example.stop_ids
    assert (whole == inference) or "otherwise than the inference template" in example.note
    bos = tokenizer.bos_token_id
    assert bos is None or example.input_ids[:2] != [bos, bos]


def test_every_text_family_of_trl_is_looked_at():
    there = {file.stem for file in templates_folder().glob("*.jinja") if not file.stem.endswith("_training")}
    assert there == {*SHIPPED, *WITH_IMAGES}
    assert len(SHIPPED) >= 30


def test_the_pairs_read_from_trls_files_are_those_that_trl_chooses():
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
def test_labels_are_those_of_trls_masks_where_its_template_renders_the_row_as_inference_does(family, kind):
    tokenizer, example, inference = looked_at(family, kind)
    training = training_templates().get(tokenizer.chat_template, tokenizer.chat_template)
    if training == tokenizer.chat_template and "{% generation" not in training.replace("{%-", "{%"):
        pytest.skip("TRL ships no training template for it and cannot mask it")
    if not example.how.startswith(("TRL's training template", "its own")):
        pytest.skip("TRL's training template renders these turns otherwise than the inference template")
    messages = CONVERSATIONS[kind][0]
    stock = tokenizer.apply_chat_template(
        messages, chat_template=training, return_dict=True, return_assistant_tokens_mask=True
    )
    assert tokenizer.decode(stock["input_ids"]) == inference
    labels = [id if mask else IGNORED for id, mask in zip(stock["input_ids"], stock["assistant_masks"], strict=True)]
    assert example.labels == labels


def test_what_is_trained_has_the_plans_date_and_tomorrow_the_same():
    tokenizer = tokenizer_of("Llama 3.2, with today's date")
    conversation = Conversation(CONVERSATIONS["one turn"][0], "here:1")
    day = datetime.date(2026, 11, 21)
    (example,) = Chat(tokenizer, day).label([conversation])
    assert "Today Date: 21 Nov 2026" in tokenizer.decode(example.input_ids)
    assert Chat(tokenizer, day).label([conversation])[0].input_ids == example.input_ids


def test_the_page_is_what_the_templates_gave():
    assert _table() in PAGE.read_text(encoding="utf-8"), f"run {__doc__.split('`')[1]}"


def beyond(family, kind):
    """What is supervised although the generation prompt writes it; TRL's blocks begin before its end in places."""
    tokenizer, example, _ = looked_at(family, kind)
    if isinstance(example, str):
        return set()
    messages, tools = CONVERSATIONS[kind]
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    found = set()
    for number, (start, end) in zip(answers, example.spans, strict=True):
        before, said = tokenizer.decode(example.input_ids[:start]), tokenizer.decode(example.input_ids[start:end])
        prompt = tokenizer.apply_chat_template(
            messages[:number], tools=tools, tokenize=False, add_generation_prompt=True
        )
        shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt[len(before) :], said, strict=False))
        header = "".join(character for character, _ in shared)
        if prompt.startswith(before) and header:
            found.add(header)
    return found


def besides(family):
    return set().union(*(beyond(family, kind) for kind in CONVERSATIONS if kind != "tools"))


def test_nothing_of_the_prompt_is_supervised_but_where_trls_own_blocks_begin_in_it():
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
    assert {family: besides(family) for family in families() if besides(family)} == known


def _reason(refusal):
    """Why a template cannot train a conversation, in few words; nothing where that is not the template's own limit."""
    for said, reason in (
        ("refuses this conversation: System role not", "refuses it"),
        ("refuses this conversation: Conversation roles must alternate", "refuses it"),
        ("leaves out the tool call", "has none"),
        ("leaves out the reasoning", "has none"),
    ):
        if said in refusal:
            return reason
    return ""


def _table():
    kinds = list(CONVERSATIONS)
    rows = [["family", *kinds, "supervised besides", "ends with", "text of inference"], ["---"] * (len(kinds) + 4)]
    for family in families():
        cells, ends, notes = [], set(), []
        for kind in kinds:
            tokenizer, example, _ = looked_at(family, kind)
            if isinstance(example, str):
                cells.append(f"no: {_reason(example)}")
                continue
            ends |= set(tokenizer.convert_ids_to_tokens(sorted(example.stop_ids)))
            cells.append(next(short for way, short in WAYS.items() if example.how.startswith(way)))
            if example.note and example.note not in notes:
                notes.append(example.note)
        equal = "no; " if any("otherwise" in note for note in notes) else "yes; " if notes else "yes"
        shown = " ".join(f"`{end}`" for end in sorted(ends))
        said = "; ".join(notes).replace("\n", "\\n").replace("|", "\\|")
        header = " ".join(f"`{text}`" for text in sorted(besides(family))).replace("\n", "\\n").replace("|", "\\|")
        rows.append([family, *cells, header or "nothing", shown.replace("|", "\\|"), equal + said])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    head, _, rest = page.partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{_table()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
