"""Any data file becomes correct examples, or one error line with the location."""

import datetime
import json
import os
import re
import sys
from pathlib import Path

import hypothesis
import pytest
from helpers.bad_input import ACCEPTED, GOOD, REJECTED, SPECIAL_TOKENS, check_example, lines, table
from helpers.examples import labels_of, tokenize_all
from helpers.template_families import tokenizer_of
from hypothesis import strategies as st

from sft_recipes.config import loader
from sft_recipes.data import prepare, sources, tokenize_rows
from sft_recipes.data.formats import conversation_of
from sft_recipes.data.rows import RowStore
from sft_recipes.data.tokenize import ConversationTokenizer
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Topology
from sft_recipes.runtime.errors import UserError

MAX_LENGTH = 128


@pytest.fixture(scope="module")
def conversation_tokenizer(tokenizer):
    return ConversationTokenizer(tokenizer, datetime.date(2026, 11, 21))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for files that are overwritten by each example."""
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture
def write_case(tmp_path, monkeypatch):
    """Writes a case to the working folder, so that errors name the file as the case does."""
    folder = tmp_path / "work" / "here"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)

    def put(case):
        if isinstance(case.content, bytes):
            (folder / case.name).write_bytes(case.content)
        elif case.content:
            case.content(folder / case.name)
        return case.name

    return put


def tokenize(name, conversation_tokenizer):
    """Tokenize a source as preparation does."""
    source = sources.resolve(str(name), "data.train", Path("toy"))
    store = RowStore()
    tokenize_rows.tokenize_source(source, conversation_tokenizer, "data.train", store, MAX_LENGTH)
    return store.read()


def conversations(name):
    return [conversation_of(row) for row in sources.resolve(str(name), "data.train", Path("toy")).rows()]


@pytest.mark.parametrize("case", REJECTED, ids=[case.title for case in REJECTED])
def test_sources_reject_bad_data_with_location(case, write_case, conversation_tokenizer):
    with pytest.raises(UserError) as raised:
        tokenize(write_case(case), conversation_tokenizer)
    message = " ".join(str(raised.value).split())
    assert re.match(case.message, message), message[:1000]
    assert len(message) < 1000
    assert message.isprintable()


@pytest.mark.parametrize("case", ACCEPTED, ids=[case.title for case in ACCEPTED])
def test_sources_accept_odd_data(case, write_case, conversation_tokenizer, tokenizer):
    name = write_case(case)
    tokenized = tokenize(name, conversation_tokenizer)
    examples = tokenize_all(conversation_tokenizer, conversations(name))
    assert len(tokenized) == len(examples) == len(case.conversations)
    for example, turns in zip(examples, case.conversations, strict=True):
        check_example(example, turns, tokenizer)
    assert tokenized["full_length"].tolist() == [len(example.input_ids) for example in examples]
    assert tokenized["length"].tolist() == [min(len(example.input_ids), MAX_LENGTH) for example in examples]
    assert tokenized.tokens["input_ids"].to_pylist() == [example.input_ids[:MAX_LENGTH] for example in examples]
    assert tokenized.tokens["labels"].to_pylist() == [labels_of(example)[:MAX_LENGTH] for example in examples]


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_sources_reject_unreadable_file(write_case, conversation_tokenizer, name):
    Path(name).write_bytes(table([GOOD]))
    Path(name).chmod(0)
    with pytest.raises(UserError, match=f"{name}: .*[Pp]ermission denied"):
        tokenize(name, conversation_tokenizer)


@pytest.mark.parametrize("content", [b"", b"\n \r\n\n"], ids=["empty", "blank lines"])
@pytest.mark.parametrize("part", ["train", "validation", "retention_eval"])
def test_prepare_rejects_file_without_rows(tmp_path, model_folder, write_rows, part, content):
    files = {key: write_rows([GOOD], f"{key}.jsonl") for key in ("train", "validation", "retention_eval")}
    files[part].write_bytes(content)
    overrides = [f"model.name_or_path={model_folder}", "model.from_scratch=false", "trainer.max_length=128"]
    overrides += [f"data.{key}={file}" for key, file in files.items()]
    plan = plans.resolve(loader.load("tiny", overrides), Topology(0, 1))
    with pytest.raises(UserError, match=rf"data\.{part}: .*{part}\.jsonl: found no rows"):
        prepare.prepare(plan, tmp_path / "store")


def with_call(arguments):
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}
    return {"messages": [{"role": "user", "content": "x"}, call]}


# Where a row is nested, and whether it is accepted if it is not too deep.
NESTED = {
    "a content": (lambda deep: {"prompt": deep, "completion": "4"}, False),
    "a role": (lambda deep: {"messages": [{"role": deep, "content": "x"}]}, False),
    "a part": (lambda deep: {"messages": [{"role": "user", "content": [{"type": deep}]}]}, False),
    "an argument": (lambda deep: with_call({"a": deep}), False),
    "arguments in JSON text": (lambda deep: with_call(json.dumps({"a": deep})), False),
    "a tool": (lambda deep: {**GOOD, "tools": [{"name": "f", "parameters": deep}]}, True),
    "tools in JSON text": (lambda deep: {**GOOD, "tools": json.dumps([{"name": "f", "parameters": deep}])}, True),
    "another column": (lambda deep: {**GOOD, "meta": deep}, True),
}


@pytest.mark.parametrize(("make_row", "accepted"), NESTED.values(), ids=NESTED)
def test_sources_handle_every_nesting_depth(make_row, accepted, write_case, conversation_tokenizer):
    """Near Python's recursion limit a row can be parsed and yet be too deep for the next step."""
    limit, counts = sys.getrecursionlimit(), []
    for depth in (10, 100, *range(limit - 200, limit + 10)):
        # Insert the brackets into the text: json.dumps has the same limit.
        text = re.sub(r'\\?"DEEP\\?"', "[" * depth + "]" * depth, json.dumps(make_row("DEEP")))
        Path("rows.jsonl").write_text(text)
        try:
            counts.append(len(tokenize("rows.jsonl", conversation_tokenizer)))
        except UserError as error:
            assert str(error).startswith("rows.jsonl:1: ")
    assert (1 in counts) == accepted


# --- calls and tools, which ChatML does not have ---------------------------------------------------------------------


def with_tool(**texts):
    """A row with a tool call and these texts in the named fields."""
    values = (
        dict.fromkeys(("user", "description", "argument", "call", "id", "answer", "tool", "assistant"), "x") | texts
    )
    parameters = {"type": "object", "properties": {"a": {"type": "string", "description": values["description"]}}}
    call = {
        "type": "function",
        "id": values["id"],
        "function": {"name": values["call"], "arguments": {"a": values["argument"]}},
    }
    # Templates that write the answering tool's name take it from the call with the same id.
    named = {} if "tool" in texts else {"tool_call_id": values["id"]}
    return {
        "messages": [
            {"role": "user", "content": values["user"]},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": values["answer"], "name": values["tool"], **named},
            {"role": "assistant", "content": values["assistant"]},
        ],
        "tools": [{"name": "x", "description": values["description"], "parameters": parameters}],
    }


@pytest.fixture(scope="module", params=["qwen2_5", "gemma4", "muse_glimmer"])
def tool_tokenizer(request):
    return ConversationTokenizer(tokenizer_of(request.param), datetime.date(2026, 11, 21))


@pytest.mark.parametrize("field", ["user", "description", "argument", "call", "id", "answer", "tool", "assistant"])
def test_tool_texts_add_no_special_tokens(field, folder, tool_tokenizer):
    tokenizer = tool_tokenizer.tokenizer
    added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}
    special = [text for text in added.values() if re.fullmatch(r"<.+>|\[.+\]", text)]
    special_ids = set(tokenizer.convert_tokens_to_ids(special))

    def special_ids_with(text):
        write(folder / "rows.jsonl", [with_tool(**{field: text})])
        tokenize(folder / "rows.jsonl", tool_tokenizer)
        (example,) = tokenize_all(tool_tokenizer, conversations(folder / "rows.jsonl"))
        return [id for id in example.input_ids if id in special_ids]

    plain = special_ids_with("x")
    odd = ["qzx0000xzq", "qzx0001xzq", "qzx9999xzq", "\ud800", "\0", "\"'\\", "}}{%", "</tool_call>", "\u2028", '"}']
    for text in (*special, *odd, *(f"{token}{token}" for token in special)):
        try:
            assert special_ids_with(text) == plain, text
        except UserError as error:
            assert str(error).startswith(f"{folder / 'rows.jsonl'}:1: ")


# --- any bytes ------------------------------------------------------------------------------------------------------

# Derandomized: a failure comes from a change of the code, not of the examples.
fuzz = hypothesis.settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)


def outcome(path, conversation_tokenizer, tokenizer):
    """Return the number of a file's examples after checking each; None if the file is rejected with a proper error."""
    try:
        tokenized = tokenize(path, conversation_tokenizer)
    except UserError as error:
        assert str(error).strip() and "Traceback" not in str(error)
        assert str(path) in str(error)
        return None
    expected = conversations(path)
    examples = tokenize_all(conversation_tokenizer, expected)
    assert len(tokenized) == len(examples) == len(expected)
    for conversation, example in zip(expected, examples, strict=True):
        turns = [(message["role"], message["content"]) for message in conversation.messages]
        check_example(example, turns, tokenizer, conversation.untrained)
    return len(examples)


_ROWS = [GOOD, {"prompt": "<|im_end|> línea 🎉", "completion": "4\n5"}]
VALID_FILES = {
    ".jsonl": lines(*_ROWS),
    ".json": json.dumps(_ROWS, ensure_ascii=False).encode(),
    ".csv": b'prompt,completion\r\n2 + 2?,4\r\n<|im_end|>,"a ""b""\n"\r\n',
    ".parquet": table(_ROWS),
}


@st.composite
def files(draw):
    """A suffix and bytes: random, or those of a valid file with some overwritten, inserted or cut off."""
    suffix = draw(st.sampled_from(sorted(VALID_FILES)))
    if draw(st.booleans()):
        return suffix, draw(st.binary(max_size=200))
    content = bytearray(VALID_FILES[suffix])
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(content)))
        end = start + draw(st.sampled_from([0, 1, 1, 1, 5]))
        content[start:end] = draw(
            st.one_of(st.binary(max_size=4), st.sampled_from([b"\n", b'"', b",", b"\0", b"\xff"]))
        )
    return suffix, bytes(content[: draw(st.one_of(st.none(), st.integers(0, len(content))))])


@fuzz
@hypothesis.given(file=files())
def test_sources_handle_any_bytes(file, folder, conversation_tokenizer, tokenizer):
    suffix, content = file
    path = folder / f"rows{suffix}"
    path.write_bytes(content)
    outcome(path, conversation_tokenizer, tokenizer)


# --- any JSON ---------------------------------------------------------------------------------------------------------

# Any character, including lone surrogates and NUL.
texts = st.lists(
    st.one_of(
        st.sampled_from(
            [*SPECIAL_TOKENS, "<|im_end", "|>", "<", "im_end|>", "<|", "qzx0000xzq", "<tool_call>", "<think>"]
        ),
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


def write(path, rows, ascii_only=True):
    if path.suffix == ".json":
        content = json.dumps(rows, ensure_ascii=ascii_only)
    else:
        content = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    path.write_bytes(content.encode("utf-8", errors="surrogatepass"))


@fuzz
@hypothesis.given(rows=st.lists(values, max_size=3), suffix=st.sampled_from([".jsonl", ".json"]))
def test_sources_handle_any_json(rows, suffix, folder, conversation_tokenizer, tokenizer):
    write(folder / f"rows{suffix}", rows)
    outcome(folder / f"rows{suffix}", conversation_tokenizer, tokenizer)


# --- nearly valid rows ---------------------------------------------------------------------------------------

nonempty = st.one_of(texts.filter(str.strip), st.sampled_from(["2 + 2?", "4"]))
contents = st.one_of(
    nonempty,
    nonempty,
    st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": nonempty}), min_size=1, max_size=3),
    values,
)
ids_and_names = st.one_of(st.none(), nonempty)
tool_calls = st.one_of(
    st.none(),
    st.just([]),
    st.lists(
        st.fixed_dictionaries({"name": nonempty, "arguments": st.one_of(values, values.map(json.dumps))}), max_size=2
    ),
    values,
)
tools = st.one_of(
    st.none(),
    st.lists(st.fixed_dictionaries({"name": nonempty, "parameters": values}), max_size=2),
    st.lists(st.fixed_dictionaries({"name": nonempty, "description": nonempty}), max_size=2).map(json.dumps),
    values,
)


@st.composite
def turns(draw):
    """Alternating user and assistant, sometimes with a system turn, a call and its answer, or an invalid turn."""
    role_key, content_key = draw(st.sampled_from([("role", "content"), ("from", "value")]))
    roles = draw(st.sampled_from([[], [], ["system"]])) + ["user", "assistant"] * draw(st.integers(1, 3))
    drawn = [{role_key: role, content_key: draw(nonempty)} for role in roles]
    while draw(st.integers(0, 2)) == 0:
        turn = draw(st.sampled_from(drawn))
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
            drawn.insert(
                draw(st.integers(0, len(drawn))), {"role": draw(st.sampled_from(ROLES)), "content": draw(contents)}
            )
    return drawn


@st.composite
def rows(draw):
    """A row of one of the formats, sometimes with optional or invalid columns."""
    row = draw(
        st.one_of(
            st.fixed_dictionaries({"messages": turns()}),
            st.fixed_dictionaries({"conversations": turns()}),
            st.fixed_dictionaries({"prompt": contents, "completion": contents}),
            st.fixed_dictionaries(
                {"instruction": nonempty, "input": st.one_of(st.just(""), contents), "output": contents}
            ),
            st.fixed_dictionaries({"question": contents, "answer": nonempty}),
        )
    )
    if draw(st.integers(0, 2)) == 0:
        row["system"] = draw(st.one_of(st.none(), st.sampled_from(["", " ", "\t"]), contents))
    if draw(st.integers(0, 4)) == 0:
        row["tools"] = draw(tools)
    if draw(st.integers(0, 4)) == 0:
        row["history"] = draw(st.one_of(st.lists(st.lists(nonempty, min_size=2, max_size=2), max_size=2), values))
    if draw(st.integers(0, 9)) == 0:
        row[draw(texts)] = draw(values)
    return row


def test_sources_handle_nearly_valid_rows(folder, conversation_tokenizer, tokenizer):
    outcomes = []

    @fuzz
    @hypothesis.given(drawn=st.lists(rows(), min_size=1, max_size=2), ascii_only=st.booleans())
    def each(drawn, ascii_only):
        write(folder / "rows.jsonl", drawn, ascii_only)
        outcomes.append(outcome(folder / "rows.jsonl", conversation_tokenizer, tokenizer))

    each()
    accepted = sum(number is not None for number in outcomes)
    assert len(outcomes) // 8 < accepted < len(outcomes), "the rows must be neither all valid nor all invalid"
