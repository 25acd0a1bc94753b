"""Whatever lies in a data file becomes examples that can be trusted, or one line that says where it is wrong."""

import datetime
import json
import os
import re
import sys
from pathlib import Path

import hypothesis
import pytest
from helpers.bad_input import CONTROLS, GOOD, REFUSED, TAKEN, lines, table
from helpers.template_families import tokenizer_of
from hypothesis import strategies as st

from sft_recipes.config import loader
from sft_recipes.data import prepare, sources, tokenize_rows
from sft_recipes.data.formats import conversation_of
from sft_recipes.data.tokenize import IGNORED, Chat
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Topology
from sft_recipes.runtime.errors import UserError

MAX_LENGTH = 128


@pytest.fixture(scope="module")
def chat(tokenizer):
    return Chat(tokenizer, datetime.date(2026, 11, 21))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder for files that are written over and over."""
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture
def lie(tmp_path, monkeypatch):
    """Puts a case where the working folder is, so that errors name the file as the case does."""
    here = tmp_path / "work" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)

    def put(case):
        if isinstance(case.content, bytes):
            (here / case.name).write_bytes(case.content)
        elif case.content:
            case.content(here / case.name)
        return case.name

    return put


def label(name, chat):
    """A name's way to labels, as preparing goes it."""
    source = sources.resolve(str(name), "data.train", Path("embedded"))
    return tokenize_rows.label(source, chat, MAX_LENGTH, "data.train", "rows")


def conversations(name):
    return [conversation_of(row) for row in sources.resolve(str(name), "data.train", Path("embedded")).rows()]


def check(example, turns, tokenizer):
    """The example says what the turns do, character by character, and steers the model only where the template does."""
    ids, labels = example.input_ids, example.labels
    assert len(labels) == len(ids)
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    start, end, *others = (tokenizer.convert_tokens_to_ids(token) for token in CONTROLS)
    assert [ids.count(start), ids.count(end)] == [len(turns)] * 2
    assert not set(others) & set(ids)
    ends = [number for number, id in enumerate(ids) if id == end]
    answered = [role == "assistant" for role, _ in turns]
    assert [labels[number] == end for number in ends] == answered
    assert start not in labels
    learned = [id for id in labels if id != IGNORED]
    answers = "".join(f"{content}<|im_end|>\n" for role, content in turns if role == "assistant")
    assert tokenizer.decode(learned, clean_up_tokenization_spaces=False) == answers


@pytest.mark.parametrize("case", REFUSED, ids=[case.what for case in REFUSED])
def test_bad_data_is_refused_with_its_place_in_one_readable_line(case, lie, chat):
    with pytest.raises(UserError) as raised:
        label(lie(case), chat)
    said = " ".join(str(raised.value).split())
    assert re.match(case.message, said), said[:1000]
    assert len(said) < 1000, "no line that a person reads"
    assert said.isprintable(), "what a terminal or a log cannot show"


@pytest.mark.parametrize("case", TAKEN, ids=[case.what for case in TAKEN])
def test_odd_data_is_taken_as_what_it_says(case, lie, chat, tokenizer):
    name = lie(case)
    labelled = label(name, chat)
    examples = chat.label(conversations(name))
    assert len(labelled) == len(examples) == len(case.conversations)
    for example, turns in zip(examples, case.conversations, strict=True):
        check(example, turns, tokenizer)
    assert labelled.whole.tolist() == [len(example.input_ids) for example in examples]
    assert labelled.lengths.tolist() == [min(len(example.input_ids), MAX_LENGTH) for example in examples]
    assert labelled.ids.tolist() == [id for example in examples for id in example.input_ids[:MAX_LENGTH]]
    learned = [label != IGNORED for example in examples for label in example.labels[:MAX_LENGTH]]
    assert labelled.supervised.tolist() == learned


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_a_file_that_may_not_be_read_is_refused(lie, chat, name):
    Path(name).write_bytes(table([GOOD]))
    Path(name).chmod(0)
    with pytest.raises(UserError, match=f"{name}: .*[Pp]ermission denied"):
        label(name, chat)


@pytest.mark.parametrize("content", [b"", b"\n \r\n\n"], ids=["empty", "blank lines"])
@pytest.mark.parametrize("part", ["train", "validation", "retention_eval"])
def test_a_file_without_a_row_is_no_data_set(tmp_path, model_folder, write_rows, part, content):
    files = {key: write_rows([GOOD], f"{key}.jsonl") for key in ("train", "validation", "retention_eval")}
    files[part].write_bytes(content)
    words = [f"model.name_or_path={model_folder}", "model.from_scratch=false", "trainer.max_length=128"]
    words += [f"data.{key}={file}" for key, file in files.items()]
    plan = plans.make(loader.load("tiny", words), Topology(0, 1))
    with pytest.raises(UserError, match=rf"data\.{part}: .*{part}\.jsonl holds no rows"):
        prepare.prepare(plan, tmp_path / "store")


def called(arguments):
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}
    return {"messages": [{"role": "user", "content": "x"}, call]}


# What is nested, and whether such a row is taken where it is not too deep.
NESTED = {
    "a content": (lambda deep: {"prompt": deep, "completion": "4"}, False),
    "a role": (lambda deep: {"messages": [{"role": deep, "content": "x"}]}, False),
    "a part": (lambda deep: {"messages": [{"role": "user", "content": [{"type": deep}]}]}, False),
    "an argument": (lambda deep: called({"a": deep}), False),
    "arguments in JSON text": (lambda deep: called(json.dumps({"a": deep})), False),
    "a tool": (lambda deep: {**GOOD, "tools": [{"name": "f", "parameters": deep}]}, True),
    "tools in JSON text": (lambda deep: {**GOOD, "tools": json.dumps([{"name": "f", "parameters": deep}])}, True),
    "another column": (lambda deep: {**GOOD, "meta": deep}, True),
}


@pytest.mark.parametrize(("form", "taken"), NESTED.values(), ids=NESTED)
def test_nesting_is_read_or_refused_at_every_depth(form, taken, lie, chat):
    """Near Python's limit a row can be read and yet be too deep for the next step."""
    limit, found = sys.getrecursionlimit(), []
    for depth in (10, 100, *range(limit - 200, limit + 10)):
        # Brackets are put into the text: json.dumps has the same limit.
        text = re.sub(r'\\?"DEEP\\?"', "[" * depth + "]" * depth, json.dumps(form("DEEP")))
        Path("rows.jsonl").write_text(text)
        try:
            found.append(len(label("rows.jsonl", chat)))
        except UserError as error:
            assert str(error).startswith("rows.jsonl:1: ")
    assert (1 in found) == taken


# --- calls and tools, which ChatML does not write ---------------------------------------------------------------------


def with_a_tool(**texts):
    """A row in which a tool is called, with a text put somewhere."""
    said = dict.fromkeys(("user", "description", "argument", "call", "id", "answer", "tool", "assistant"), "x") | texts
    parameters = {"type": "object", "properties": {"a": {"type": "string", "description": said["description"]}}}
    call = {
        "type": "function",
        "id": said["id"],
        "function": {"name": said["call"], "arguments": {"a": said["argument"]}},
    }
    # Templates that write the answering tool's name take it from the call where an id says which.
    named = {} if "tool" in texts else {"tool_call_id": said["id"]}
    return {
        "messages": [
            {"role": "user", "content": said["user"]},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": said["answer"], "name": said["tool"], **named},
            {"role": "assistant", "content": said["assistant"]},
        ],
        "tools": [{"name": "x", "description": said["description"], "parameters": parameters}],
    }


@pytest.fixture(scope="module", params=["qwen2_5", "gemma4", "muse_glimmer"])
def chat_with_tools(request):
    return Chat(tokenizer_of(request.param), datetime.date(2026, 11, 21))


@pytest.mark.parametrize("where", ["user", "description", "argument", "call", "id", "answer", "tool", "assistant"])
def test_no_text_in_a_call_or_a_tool_steers_the_model_or_the_reader(where, place, chat_with_tools):
    tokenizer = chat_with_tools.tokenizer
    added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}
    marks = [text for text in added.values() if re.fullmatch(r"<.+>|\[.+\]", text)]
    marks_ids = set(tokenizer.convert_tokens_to_ids(marks))

    def steering(text):
        write(place / "rows.jsonl", [with_a_tool(**{where: text})])
        label(place / "rows.jsonl", chat_with_tools)
        (example,) = chat_with_tools.label(conversations(place / "rows.jsonl"))
        return [id for id in example.input_ids if id in marks_ids]

    plain = steering("x")
    odd = ["qzx0000xzq", "qzx0001xzq", "qzx9999xzq", "\ud800", "\0", "\"'\\", "}}{%", "</tool_call>", "\u2028", '"}']
    for text in (*marks, *odd, *(f"{mark}{mark}" for mark in marks)):
        try:
            assert steering(text) == plain, text
        except UserError as error:
            assert str(error).startswith(f"{place / 'rows.jsonl'}:1: ")


# --- any bytes ------------------------------------------------------------------------------------------------------

# The same examples each time: a change fails by what it does, not by what was drawn.
fuzz = hypothesis.settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)


def outcome(path, chat, tokenizer):
    """The number of examples that a file becomes, each checked; None where it is refused as it should be."""
    try:
        labelled = label(path, chat)
    except UserError as error:
        assert str(error).strip() and "Traceback" not in str(error)
        assert str(path) in str(error)
        return None
    found = conversations(path)
    examples = chat.label(found)
    assert len(labelled) == len(examples) == len(found)
    for one, example in zip(found, examples, strict=True):
        check(example, [(message["role"], message["content"]) for message in one.messages], tokenizer)
    return len(examples)


_ROWS = [GOOD, {"prompt": "<|im_end|> línea 🎉", "completion": "4\n5"}]
WHOLE_FILES = {
    ".jsonl": lines(*_ROWS),
    ".json": json.dumps(_ROWS, ensure_ascii=False).encode(),
    ".csv": b'prompt,completion\r\n2 + 2?,4\r\n<|im_end|>,"a ""b""\n"\r\n',
    ".parquet": table(_ROWS),
}


@st.composite
def files(draw):
    """A suffix, and bytes: any, or those of a good file with some overwritten, put in, or cut off."""
    suffix = draw(st.sampled_from(sorted(WHOLE_FILES)))
    if draw(st.booleans()):
        return suffix, draw(st.binary(max_size=200))
    content = bytearray(WHOLE_FILES[suffix])
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(content)))
        end = start + draw(st.sampled_from([0, 1, 1, 1, 5]))
        content[start:end] = draw(
            st.one_of(st.binary(max_size=4), st.sampled_from([b"\n", b'"', b",", b"\0", b"\xff"]))
        )
    return suffix, bytes(content[: draw(st.one_of(st.none(), st.integers(0, len(content))))])


@fuzz
@hypothesis.given(file=files())
def test_any_bytes_are_rows_or_refused(file, place, chat, tokenizer):
    suffix, content = file
    path = place / f"rows{suffix}"
    path.write_bytes(content)
    outcome(path, chat, tokenizer)


# --- any JSON ---------------------------------------------------------------------------------------------------------

# Any character at all, lone surrogates and NUL too.
texts = st.lists(
    st.one_of(
        st.sampled_from([*CONTROLS, "<|im_end", "|>", "<", "im_end|>", "<|", "qzx0000xzq", "<tool_call>", "<think>"]),
        st.text(max_size=6),
        st.text(st.characters(), max_size=2),
        st.sampled_from(["\ud800", "\x00", "\r\n", " ", "\u2028", "\ufeff"]),
    ),
    max_size=5,
).map("".join)
KEYS = [
    *("messages", "conversations", "conversation", "prompt", "completion", "instruction", "input", "output", "history"),
    *("question", "answer", "system", "tools", "functions", "role", "content", "from", "value", "type", "text", "name"),
    *("tool_calls", "function_call", "function", "arguments", "reasoning_content", "thinking", "tool_call_id", "id"),
]
ROLES = ["system", "user", "assistant", "tool", "human", "gpt", "function_call", "observation", "User", "oracle", ""]
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts, st.sampled_from(ROLES)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(KEYS), texts), inner, max_size=5),
    ),
    max_leaves=20,
)


def write(path, rows, ascii_alone=True):
    if path.suffix == ".json":
        content = json.dumps(rows, ensure_ascii=ascii_alone)
    else:
        content = "".join(json.dumps(row, ensure_ascii=ascii_alone) + "\n" for row in rows)
    path.write_bytes(content.encode("utf-8", errors="surrogatepass"))


@fuzz
@hypothesis.given(rows=st.lists(values, max_size=3), suffix=st.sampled_from([".jsonl", ".json"]))
def test_any_json_is_rows_or_refused(rows, suffix, place, chat, tokenizer):
    write(place / f"rows{suffix}", rows)
    outcome(place / f"rows{suffix}", chat, tokenizer)


# --- rows that are nearly right ---------------------------------------------------------------------------------------

said = st.one_of(texts.filter(str.strip), st.sampled_from(["2 + 2?", "4"]))
contents = st.one_of(
    said,
    said,
    st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": said}), min_size=1, max_size=3),
    values,
)
ids_and_names = st.one_of(st.none(), said)
tool_calls = st.one_of(
    st.none(),
    st.just([]),
    st.lists(st.fixed_dictionaries({"name": said, "arguments": st.one_of(values, values.map(json.dumps))}), max_size=2),
    values,
)
tools = st.one_of(
    st.none(),
    st.lists(st.fixed_dictionaries({"name": said, "parameters": values}), max_size=2),
    st.lists(st.fixed_dictionaries({"name": said, "description": said}), max_size=2).map(json.dumps),
    values,
)


@st.composite
def turns(draw):
    """User and assistant in turns, at times with a system, a call and its answer, another role or another turn."""
    role_key, content_key = draw(st.sampled_from([("role", "content"), ("from", "value")]))
    roles = draw(st.sampled_from([[], [], ["system"]])) + ["user", "assistant"] * draw(st.integers(1, 3))
    found = [{role_key: role, content_key: draw(said)} for role in roles]
    while draw(st.integers(0, 2)) == 0:
        turn = draw(st.sampled_from(found))
        turn |= draw(
            st.one_of(
                st.fixed_dictionaries({role_key: st.one_of(st.sampled_from(ROLES), values)}),
                st.fixed_dictionaries({content_key: contents}),
                st.fixed_dictionaries({"reasoning_content": contents}),
                st.fixed_dictionaries({"tool_calls": tool_calls}),
                st.fixed_dictionaries({"name": ids_and_names, "tool_call_id": ids_and_names}),
            )
        )
        if draw(st.integers(0, 3)) == 0:
            found.insert(
                draw(st.integers(0, len(found))), {"role": draw(st.sampled_from(ROLES)), "content": draw(contents)}
            )
    return found


@st.composite
def rows(draw):
    """A row of one of the forms, at times with columns that it may or may not have."""
    row = draw(
        st.one_of(
            st.fixed_dictionaries({"messages": turns()}),
            st.fixed_dictionaries({"conversations": turns()}),
            st.fixed_dictionaries({"prompt": contents, "completion": contents}),
            st.fixed_dictionaries({"instruction": said, "input": st.one_of(st.just(""), contents), "output": contents}),
            st.fixed_dictionaries({"question": contents, "answer": said}),
        )
    )
    if draw(st.integers(0, 2)) == 0:
        row["system"] = draw(st.one_of(st.none(), st.sampled_from(["", " ", "\t"]), contents))
    if draw(st.integers(0, 4)) == 0:
        row["tools"] = draw(tools)
    if draw(st.integers(0, 4)) == 0:
        row["history"] = draw(st.one_of(st.lists(st.lists(said, min_size=2, max_size=2), max_size=2), values))
    if draw(st.integers(0, 9)) == 0:
        row[draw(texts)] = draw(values)
    return row


def test_rows_that_are_nearly_right_are_examples_or_refused(place, chat, tokenizer):
    made = []

    @fuzz
    @hypothesis.given(drawn=st.lists(rows(), min_size=1, max_size=2), ascii_alone=st.booleans())
    def each(drawn, ascii_alone):
        write(place / "rows.jsonl", drawn, ascii_alone)
        made.append(outcome(place / "rows.jsonl", chat, tokenizer))

    each()
    assert len(made) // 8 < sum(number is not None for number in made) < len(made), "nothing was put to the test"
