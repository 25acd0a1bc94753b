"""Which columns and turns of a row are trained: mapping, accounting, flags, conventions, rejected rows."""

import dataclasses
import datetime
import json

import pytest
from helpers.examples import labels_of, tokenize_all

from sft_recipes.config import loader
from sft_recipes.config.schema import DataSource
from sft_recipes.data import tokenize_rows
from sft_recipes.data.formats import conversation_of
from sft_recipes.data.rows import RowStore
from sft_recipes.data.sources import RawRow, Source
from sft_recipes.data.tokenize import GENERATED_IDS, IGNORED, ConversationTokenizer
from sft_recipes.data.tokenizer import load_tokenizer
from sft_recipes.runtime.errors import UserError

USER, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
BAD = {"role": "assistant", "content": "BAD"}
QUESTION = {"question": "Who?", "context": "Ana sat.", "answer": "Ana"}


def convert(values, **settings):
    return conversation_of(RawRow(values, "here:1"), DataSource("", **settings))


def in_loss(conversation_tokenizer, conversation):
    """The text in the loss, by the ids of the labels."""
    example = tokenize_all(conversation_tokenizer, [conversation])[0]
    return conversation_tokenizer.tokenizer.decode([label for label in labels_of(example) if label != IGNORED])


@pytest.fixture
def chatml(model_folder):
    return ConversationTokenizer(load_tokenizer(str(model_folder), None, False), datetime.date(2026, 1, 1))


def with_template(conversation_tokenizer, template):
    conversation_tokenizer.tokenizer.chat_template = template
    return ConversationTokenizer(conversation_tokenizer.tokenizer, datetime.date(2026, 1, 1))


@pytest.mark.parametrize("key", ["train", "trainable", "loss", "weight", "loss_weight"])
@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_flagged_turns_are_context_only(chatml, key, form):
    turns = [USER, {**BAD, key: 0}, USER, {**ANSWER, key: 1}]
    if form == "conversations":
        turns = [
            {"from": turn["role"], "value": turn["content"], **{k: turn[k] for k in turn if k == key}} for turn in turns
        ]
    conversation = convert({form: turns})
    assert in_loss(chatml, conversation) == "4<|im_end|>\n"
    assert conversation.conventions == ("assistant turns marked as context or in the prompt: not in the loss",)
    example = tokenize_all(chatml, [conversation])[0]
    assert "BAD" in chatml.tokenizer.decode(example.input_ids), "it stays in the context"


def test_flagged_turn_is_context_only_with_generation_blocks(chatml):
    blocks = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    turns = [USER, {**BAD, "train": False}, USER, ANSWER]
    assert in_loss(with_template(chatml, blocks), convert({"messages": turns})) == "4<|im_end|>"


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({**ANSWER, "weight": 0.5}, "turn 2: weight: found 0.5, expected 0 or 1"),
        ({**ANSWER, "train": "no"}, "turn 2: train: found 'no', expected 0 or 1"),
    ],
)
def test_other_weights_are_rejected(turn, message):
    with pytest.raises(UserError, match=f"here:1: {message}"):
        convert({"messages": [USER, turn]})
    with pytest.raises(UserError, match="turn 1: train: found true in a user turn"):
        convert({"messages": [{**USER, "train": True}, ANSWER]})


def test_only_the_completion_is_in_the_loss(chatml):
    assert in_loss(chatml, convert({"prompt": [USER, BAD, USER], "completion": [ANSWER]})) == "4<|im_end|>\n"


def test_greeting_is_context_if_the_template_renders_it(chatml):
    conversation = convert({"messages": [BAD, USER, ANSWER]})
    assert in_loss(chatml, conversation) == "4<|im_end|>\n"
    assert conversation.conventions == ("assistant turns before the first user turn: context, not in the loss",)
    only = convert({"messages": [{"role": "system", "content": "s"}, ANSWER]})
    assert in_loss(chatml, only) == ""
    assert "no assistant turn in the loss: not used" in only.conventions


def test_template_variables_reach_the_template(chatml):
    template = "{{ mode | default('plain') }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tokenizer = with_template(chatml, template)
    row = {"messages": [USER, ANSWER]}
    for values, settings, expected in (
        (row, {}, "plain"),
        (row, {"chat_template_kwargs": {"mode": "all"}}, "all"),
        ({**row, "chat_template_kwargs": {"mode": "mine"}}, {"chat_template_kwargs": {"mode": "all"}}, "mine"),
    ):
        conversation = convert(values, **settings)
        ids = tokenize_all(tokenizer, [conversation])[0].input_ids
        assert tokenizer.tokenizer.decode(ids).startswith(f"{expected}<|im_start|>")
        prompt = tokenizer.tokenize_prompt(dataclasses.replace(conversation, messages=conversation.messages[:1]))
        assert ids[: len(prompt)] == prompt, "as at inference"
    with pytest.raises(UserError, match="chat_template_kwargs: found .*tools"):
        convert({**row, "chat_template_kwargs": {"tools": []}})


def test_columns_are_mapped_by_format_strings():
    columns = {"system": "Be short.", "prompt": "{context}\n\n{question}", "completion": "{answer}"}
    texts = [message["content"] for message in convert(QUESTION, columns=columns).messages]
    assert texts == ["Be short.", "Ana sat.\n\nWho?", "Ana"]
    without = convert({**QUESTION, "context": ""}, columns=columns)
    assert without.messages[1]["content"] == "Who?", "no separator without what it separates"
    turns = convert({"chat": [USER, ANSWER], "extra": 1}, columns={"messages": "{chat}"})
    assert turns.messages == [USER, ANSWER]
    with pytest.raises(UserError, match=r"here:1: row keys: found question, .* in data.columns.prompt={qestion}"):
        convert(QUESTION, columns={"prompt": "{qestion}", "completion": "{answer}"}, ignore_columns=["context"])
    with pytest.raises(UserError, match=r"data.columns.prompt: found a column name .* Set '{question}'"):
        convert(QUESTION, columns={"prompt": "question", "completion": "{answer}"}, ignore_columns=["context"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("{prompt: '{a.b}', completion: '{c}'}", "found the field {a.b}, expected a plain column name"),
        ("{prompt: '{a[0]}', completion: '{c}'}", "found the field {a\\[0\\]}"),
        ("{prompt: '{a!r}', completion: '{c}'}", "found the field {a}, expected a plain"),
        ("{prompt: '{a', completion: '{c}'}", "expected '}'"),
        ("{prompt: '{a}'}", "found prompt, expected prompt and completion, or messages"),
        ("{prompt: '{a}', answer: '{c}'}", "answer.*: found 'answer', expected 'system', 'prompt'"),
        ("{prompt: '{a}', completion: 'c'}", "completion: found 'c', expected a column name in braces"),
    ],
)
def test_invalid_column_mapping_is_rejected(columns, message):
    with pytest.raises(UserError, match=f"command line: data.columns.*{message}"):
        loader.load("tiny", [f"data.columns={columns}"])


def test_reserved_template_variables_are_rejected_for_all_rows_and_for_one_source():
    for override in (
        "data.chat_template_kwargs={tools: []}",
        "data.train=[{path: a.jsonl, chat_template_kwargs: {tools: []}}]",
    ):
        with pytest.raises(UserError, match="chat_template_kwargs: found tools, which is set for each row"):
            loader.load("tiny", [override])


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        (QUESTION, "column context: .*map it with data.columns, or set data.ignore_columns=.context."),
        ({"system_prompt": "s", "question": "a", "answer": "b"}, "column system_prompt: .*map it with data.columns"),
        ({"messages": [USER, ANSWER], "context": "c"}, "column context: .*Put it into the messages"),
        ({"messages": [USER, ANSWER], "persona": "c"}, "column persona: .*Put it into the messages"),
        ({"messages": [USER], "chosen": ANSWER}, "column chosen: .*preference set"),
        ({"messages": [USER, ANSWER], "images": ["a.jpg"]}, "column images: .*Only text is trained"),
        ({"messages": [USER, ANSWER], "label": False}, "column label: .*preference set"),
        ({"messages": [{**USER, "images": ["a.jpg"]}, ANSWER]}, "message key images: .*Only text is trained"),
        ({"prompt": "a", "completion": "b", "retrieved_documents": ["x"]}, "column retrieved_documents"),
    ],
)
def test_columns_that_change_the_meaning_are_rejected_until_named(values, advice):
    with pytest.raises(UserError, match=f"here:1: {advice}"):
        convert(values)
    if "chosen" in values:
        mapped = convert(values, columns={"prompt": "{messages}", "completion": "{chosen}"})
        assert mapped.messages == [USER, ANSWER]
        return
    ignored = ["context", "persona", "system_prompt", "images", "label", "retrieved_documents"]
    assert convert(values, ignore_columns=ignored).messages[-1]["role"] == "assistant"
    metadata = {"prompt": "a", "completion": "b", "document_id": 7, "context_length": 3, "images": [], "system": ""}
    assert convert(metadata).messages[0]["content"] == "a"


def read(tmp_path, chatml, rows, max_rejected=0.0, **settings):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    source = Source(files=(file,), settings=DataSource(str(file), **settings))
    store = RowStore()
    report = tokenize_rows.tokenize_source(source, chatml, "data.train", store, 128, max_rejected)
    return store.read(), report


def test_every_column_and_message_key_is_accounted_for(tmp_path, chatml):
    rows = [{"prompt": f"{n}?", "completion": "x", "id": n, "note": None} for n in range(3)]
    rows += [{"messages": [{**USER, "votes": 2}, ANSWER], "id": "a", "source": "web"}]
    _, report = read(tmp_path, chatml, rows)
    assert report["used"] == {"prompt": 3, "completion": 3, "messages": 1}
    assert report["ignored"] == {"id": 4, "source": 1, "messages[].votes": 1}
    _, report = read(tmp_path, chatml, rows[:3], columns={"prompt": "{id}: {prompt}", "completion": "{completion}"})
    assert report["used"] == {"id as prompt": 3, "prompt": 3, "completion": 3}


def test_rejected_rows_are_counted_by_reason_up_to_a_fraction(tmp_path, chatml):
    rows = [{"prompt": f"{n}?", "completion": "x"} for n in range(7)]
    rows += [{"prompt": "8?", "completion": ""}, "{broken\n", {"prompt": "9?", "completion": " "}]
    message = r"rows.jsonl:8: turn 2: .* \(3 of 10 rows rejected; data.max_rejected_fraction=0.3 leaves them out\)"
    with pytest.raises(UserError, match=message):
        read(tmp_path, chatml, rows, 0.2)
    tokenized, report = read(tmp_path, chatml, rows, 0.3)
    assert len(tokenized) == 7
    assert sorted((count, place[-2:]) for count, place in report["rejected"].values()) == [(1, ":9"), (2, ":8")]
    context = [*rows[:9], {**QUESTION}]
    with pytest.raises(UserError, match="column context"):  # no fraction allows a column that changes the meaning
        read(tmp_path, chatml, context, 1.0)


def test_call_ids_are_generated_where_the_template_needs_them(chatml):
    template = (
        "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}{% if c.id | length != 9 %}"
        "{{ raise_exception('ids have 9 characters') }}{% endif %}<|im_start|>assistant\n{{ c.id }} {{ c.function.name }} "
        "{{ c.function.arguments | tojson }}<|im_end|>{% endfor %}{% elif m.role == 'tool' %}<|im_start|>tool\n"
        "{{ m.tool_call_id }} {{ m.content }}<|im_end|>{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = with_template(chatml, template)
    calls = [{"name": name, "arguments": {"a": 1}} for name in ("first", "second")]
    answers = [{"role": "tool", "name": name, "content": name} for name in ("second", "first")]
    without = {"messages": [USER, {"role": "assistant", "tool_calls": calls}, *answers, ANSWER]}
    short = json.loads(json.dumps(without))
    for number, call in enumerate(short["messages"][1]["tool_calls"]):
        call["id"] = f"c{number}"
        short["messages"][3 - number]["tool_call_id"] = f"c{number}"
    for values in (without, short):
        example = tokenize_all(tokenizer, [convert(values)])[0]
        lines = tokenizer.tokenizer.decode(example.input_ids).split("<|im_end|>")
        ids = {line.split()[2]: line.split()[1] for line in lines[1:3]}
        assert [line.split()[1] for line in lines[3:5]] == [ids["second"], ids["first"]], "answers have their call's id"
        assert GENERATED_IDS in example.conventions and len(set(ids.values())) == 2
