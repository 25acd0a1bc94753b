import json

import pytest

from sft_recipes.data import sources
from sft_recipes.data.formats import conversation_of
from sft_recipes.runtime.errors import UserError

ASKED = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]


def rows_of(path, embedded=None):
    source = sources.resolve(str(path), "data.train", embedded or path.parent / "embedded")
    return list(source.rows())


def test_the_same_rows_are_read_from_every_kind_of_file(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": f'Say {n}, "quoted"\nand on a second line', "completion": f"{n}"} for n in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.json").write_text(json.dumps({"version": 1, "data": rows}))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    quoted = [[value.replace('"', '""') for value in row.values()] for row in rows]
    (tmp_path / "e.csv").write_text("prompt,completion\n" + "".join(f'"{a}","{b}"\n' for a, b in quoted))
    read = {path.name: [row.values for row in rows_of(path)] for path in sorted(tmp_path.glob("*.*"))}
    assert len(read) == 5
    assert all(found == rows for found in read.values())
    assert len(list(sources.resolve(str(tmp_path), "data.train", tmp_path).rows())) == 15


def test_a_row_knows_its_file_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [row.where for row in rows_of(path)] == [f"{path}:1", f"{path}:3"]


def test_line_separators_inside_a_string_do_not_cut_a_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"a": "one\u2028two\x0bthree\x85four"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert len(rows_of(path)) == 1


def test_the_embedded_set_is_written_once(tmp_path):
    first = rows_of("toy:validation", tmp_path / "embedded")
    stamp = (tmp_path / "embedded" / "train.jsonl").stat().st_mtime_ns
    assert len(first) == 400
    rows_of("toy:train", tmp_path / "embedded")
    assert (tmp_path / "embedded" / "train.jsonl").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a.jsonl:2: not JSON"),
        ("a.jsonl", b'\xef\xbb\xbf{"a": 1}\n', r"a.jsonl:1: begins with a byte-order mark"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\x00"}\n', r"a.jsonl:2: a NUL byte"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"a.jsonl:2: not UTF-8 \(byte 0xff\)"),
        ("a.jsonl", b'{"a": 1, "a": 2}\n', r"a.jsonl:1: key 'a' is written twice"),
        ("a.jsonl", b"[" * 100_000 + b"\n", r"a.jsonl:1: not JSON"),
        ("a.json", b'"text"', r"a.json: holds a text; wanted a list of rows"),
        ("a.json", b'[{"a": 1},', r"a.json: not JSON"),
        ("a.csv", b"a,b\n1,2,3\n", r"a.csv:2: has another number of columns than the header \(a, b\)"),
        ("a.csv", b"a,a\n1,2\n", r"a.csv:1: a column is named twice in the header"),
        ("a.jsonl", b'{"a": ' + b"1" * 5000 + b"}\n", r"a.jsonl:1: not JSON"),
        ("a.csv", b"a,b\n1\n", r"a.csv:2: has another number of columns"),
        ("a.csv", b'a,b\n"1,2\n', r"a.csv:2: not CSV"),
        ("a.parquet", b"PAR1 not", r"a.parquet: not Parquet"),
        ("a.txt", b"hello", r"a .txt file; wanted .jsonl, .json, .parquet, .csv"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused_with_the_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        rows_of(path)


@pytest.mark.parametrize("name", ["missing.jsonl", "no/such/folder/x.jsonl", "$(touch x)y", "a;b", "`id`", "x y z"])
def test_what_is_no_file_no_folder_and_no_hub_name_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="data.train: no file or folder"):
        sources.resolve(name, "data.train", tmp_path)


def test_a_folder_with_code_or_without_data_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no data file"):
        sources.resolve(str(tmp_path), "data.train", tmp_path)
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "load.py").write_text("raise SystemExit")
    with pytest.raises(UserError, match="holds code \\(load.py\\), which is never run"):
        sources.resolve(str(tmp_path), "data.train", tmp_path)


def test_a_hub_name_with_a_split_is_told_from_a_path(tmp_path, monkeypatch):
    assert sources.hub_name("HuggingFaceH4/ultrachat_200k:train_sft") == "HuggingFaceH4/ultrachat_200k"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    assert [sources.hub_name(name) for name in ("my/rows", "rows.jsonl", "a/b.jsonl", "toy:train")] == [None] * 4


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ASKED},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        {"conversations": ASKED},
        {"prompt": "2 + 2?", "completion": "4"},
        {"prompt": ASKED[:1], "completion": ASKED[1:]},
        {"instruction": "2 + 2?", "input": "", "output": "4"},
        {"instruction": "2 + 2?", "output": "4", "id": 7},
        {"question": "2 + 2?", "answer": "4"},
        {"messages": None, "question": "2 + 2?", "answer": "4"},
    ],
)
def test_every_form_becomes_the_same_messages(row):
    assert conversation_of(sources.RawRow(row, "here:1")).messages == ASKED


def test_system_turns_and_inputs_are_kept():
    alpaca = {"instruction": "Add.", "input": "2 and 2", "output": "4", "system": "Be short."}
    found = conversation_of(sources.RawRow(alpaca, "here:1")).messages
    assert [message["role"] for message in found] == ["system", "user", "assistant"]
    assert found[1]["content"] == "Add.\n\n2 and 2"
    sharegpt = {
        "system": "Be short.",
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
    }
    assert conversation_of(sources.RawRow(sharegpt, "here:1")).messages[0] == {"role": "system", "content": "Be short."}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1, 2], "the row is a list; wanted an object"),
        ({"text": "hello"}, "a row with keys text; wanted messages"),
        ({}, "a row with keys none"),
        ({"prompt": "a", "completion": None}, "a row with keys prompt, completion"),
        ({"messages": "hello"}, "the conversation is a text; wanted a list of turns"),
        ({"messages": []}, "no user and assistant turns"),
        ({"messages": [{"role": "system", "content": "x"}]}, "no user and assistant turns"),
        ({"messages": [{"role": "oracle", "content": "x"}]}, "turn 1 has role 'oracle'; wanted one of"),
        ({"messages": [{"role": "user"}]}, "the content of turn 1 is null; wanted text"),
        ({"messages": [{"role": "user", "content": 3}]}, "the content of turn 1 is number; wanted text"),
        ({"messages": ASKED[:1]}, "the conversation ends with the user"),
        ({"messages": ASKED[1:]}, "turn 1 is the assistant's; wanted the user's"),
        ({"messages": ASKED + ASKED[1:]}, "turn 3 is the assistant's; wanted the user's"),
        ({"messages": [*ASKED, {"role": "system", "content": "x"}]}, "turn 3 is the system's; wanted the user's"),
        ({"prompt": "a", "completion": " \n"}, "turn 2, the assistant's, is empty"),
        ({"prompt": "a", "completion": "\ud800"}, "a lone surrogate"),
    ],
)
def test_a_row_that_is_no_conversation_is_refused_with_its_place(row, message):
    with pytest.raises(UserError, match=f"here:7: .*{message}"):
        conversation_of(sources.RawRow(row, "here:7"))
