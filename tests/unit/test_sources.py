"""Sources read every supported file and format, and reject the others with file and line."""

import json

import pytest

from sft_recipes.config.schema import Data
from sft_recipes.data import sources
from sft_recipes.data.formats import conversation_of
from sft_recipes.runtime.errors import UserError

MESSAGES = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]


def rows_of(path, toy_folder=None):
    source = sources.resolve(str(path), "data.train", toy_folder or path.parent / "toy")
    rows = list(source.rows())
    for row in rows:
        if isinstance(row.values, UserError):
            raise row.values
    return rows


def test_sources_read_same_rows_from_every_file_type(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": f'Repeat {n}, "quoted"\nand on a second line', "completion": f"{n}"} for n in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.json").write_text(json.dumps({"version": 1, "data": rows}))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    quoted = [[value.replace('"', '""') for value in row.values()] for row in rows]
    (tmp_path / "e.csv").write_text("prompt,completion\n" + "".join(f'"{a}","{b}"\n' for a, b in quoted))
    read = {path.name: [row.values for row in rows_of(path)] for path in sorted(tmp_path.glob("*.*"))}
    assert len(read) == 5
    assert all(values == rows for values in read.values())
    assert len(list(sources.resolve(str(tmp_path), "data.train", tmp_path).rows())) == 15


def test_rows_have_file_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [row.location for row in rows_of(path)] == [f"{path}:1", f"{path}:3"]


def test_jsonl_splits_at_line_feeds_only(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"a": "one\u2028two\x0bthree\x85four"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert len(rows_of(path)) == 1


def test_toy_dataset_is_written_once(tmp_path):
    first = rows_of("toy:validation", tmp_path / "toy")
    stamp = (tmp_path / "toy" / "train.jsonl").stat().st_mtime_ns
    assert len(first) == 400
    rows_of("toy:train", tmp_path / "toy")
    assert (tmp_path / "toy" / "train.jsonl").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\x00"}\n', r"a.jsonl:2: encoding: found byte 0x00"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"a.jsonl:2: encoding: found byte 0xff, expected UTF-8"),
        ("a.jsonl", b'{"a": 1, "a": 2}\n', r"a.jsonl:1: key 'a': found twice"),
        ("a.jsonl", b"[" * 100_000 + b"\n", r"a.jsonl: not valid JSON"),
        ("a.json", b'"text"', r"a.json: found a string, expected a list of rows"),
        ("a.json", b'[{"a": 1},', r"a.json: not valid JSON"),
        ("a.csv", b"a,b\n1,2,3\n", r"a.csv:2: columns: found 3, expected 2 \(a, b\)"),
        ("a.csv", b"a,a\n1,2\n", r"a.csv:1: header: found a column twice"),
        ("a.jsonl", b'{"a": ' + b"1" * 5000 + b"}\n", r"a.jsonl:1: not valid JSON"),
        ("a.csv", b"a,b\n1\n", r"a.csv:2: columns: found "),
        ("a.csv", b'a,b\n"1,2\n', r"a.csv:2: not valid CSV"),
        ("a.parquet", b"PAR1 not", r"a.parquet: not valid Parquet"),
        ("a.txt", b"hello", r"a.txt: file type: found .txt, expected .jsonl, .json, .parquet, .csv"),
    ],
)
def test_sources_reject_invalid_file(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        rows_of(path)


@pytest.mark.parametrize("name", ["missing.jsonl", "no/such/folder/x.jsonl", "$(touch x)y", "a;b", "`id`", "x y z"])
def test_resolve_rejects_unknown_name(tmp_path, name):
    with pytest.raises(UserError, match="data.train: no file or folder"):
        sources.resolve(name, "data.train", tmp_path)


def test_resolve_rejects_folder_with_code_or_without_data(tmp_path):
    with pytest.raises(UserError, match="found no data file"):
        sources.resolve(str(tmp_path), "data.train", tmp_path)
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "load.py").write_text("raise SystemExit")
    with pytest.raises(UserError, match="contains code \\(load.py\\), which is never run"):
        sources.resolve(str(tmp_path), "data.train", tmp_path)


def test_hub_name_excludes_local_paths(tmp_path, monkeypatch):
    assert sources.hub_name("HuggingFaceH4/ultrachat_200k:train_sft") == "HuggingFaceH4/ultrachat_200k"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    assert [sources.hub_name(name) for name in ("my/rows", "rows.jsonl", "a/b.jsonl", "toy:train")] == [None] * 4


@pytest.mark.parametrize(
    "row",
    [
        {"messages": MESSAGES},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        {"conversations": MESSAGES},
        {"prompt": "2 + 2?", "completion": "4"},
        {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
        {"instruction": "2 + 2?", "input": "", "output": "4"},
        {"instruction": "2 + 2?", "output": "4", "id": 7},
        {"question": "2 + 2?", "answer": "4"},
        {"messages": None, "question": "2 + 2?", "answer": "4"},
    ],
)
def test_conversation_of_reads_every_format(row):
    assert conversation_of(sources.RawRow(row, "here:1")).messages == MESSAGES


def test_conversation_of_keeps_system_and_input():
    alpaca = {"instruction": "Add.", "input": "2 and 2", "output": "4", "system": "Be short."}
    messages = conversation_of(sources.RawRow(alpaca, "here:1")).messages
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[1]["content"] == "Add.\n\n2 and 2"
    sharegpt = {
        "system": "Be short.",
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
    }
    assert conversation_of(sources.RawRow(sharegpt, "here:1")).messages[0] == {"role": "system", "content": "Be short."}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1, 2], "row: found a list, expected an object"),
        ({"text": "hello"}, "row keys: found text, expected messages"),
        ({}, "row keys: found none"),
        ({"prompt": "a", "completion": None}, "row keys: found prompt, "),
        ({"messages": "hello"}, "turns: found a string, expected a list"),
        ({"messages": []}, "turns: found no assistant turn"),
        ({"messages": [{"role": "system", "content": "x"}]}, "turns: found no assistant turn"),
        ({"messages": [{"role": "oracle", "content": "x"}]}, "turn 1: role: found 'oracle', expected one of"),
        ({"messages": [{"role": "user"}]}, "turn 1: content: found null, expected a string"),
        ({"messages": [{"role": "user", "content": 3}]}, "turn 1: content: found a number, expected a string"),
        ({"messages": MESSAGES[:1]}, "turns: found no assistant turn"),
        ({"messages": [*MESSAGES, {"role": "system", "content": "x"}]}, "last turn: role: found system"),
        ({"prompt": "a", "completion": " \n"}, "turn 2: assistant content: found no text"),
        ({"prompt": "a", "completion": "\ud800"}, "a lone surrogate"),
    ],
)
def test_conversation_of_rejects_row(row, message):
    with pytest.raises(UserError, match=f"here:7: .*{message}"):
        conversation_of(sources.RawRow(row, "here:7"))


def split_names(tmp_path, part, name="data"):
    found = sources.resolve_all(Data(train=str(tmp_path / name)), part, tmp_path)
    return {short: [str(file.relative_to(tmp_path)) for file in source.files] for short, source in found.items()}


def test_folder_splits_are_named_as_on_the_hub(tmp_path):
    for name in ("train.jsonl", "test.jsonl", ".ipynb_checkpoints/train-checkpoint.jsonl", "README.md"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(json.dumps({"prompt": name, "completion": "x"}))
    assert split_names(tmp_path, "train") == {"data": ["data/train.jsonl"]}
    assert split_names(tmp_path, "validation") == {"data": ["data/test.jsonl"]}
    (tmp_path / "data" / "valid.jsonl").write_text("{}")
    assert split_names(tmp_path, "validation") == {"data": ["data/valid.jsonl"]}
    for name in ("train", "dev"):
        (tmp_path / "other" / name).mkdir(parents=True)
        (tmp_path / "other" / name / "part.jsonl").write_text("{}")
    assert split_names(tmp_path, "train", "other") == {"other": ["other/train/part.jsonl"]}
    assert split_names(tmp_path, "validation", "other") == {"other": ["other/dev/part.jsonl"]}
    named = sources.resolve(f"{tmp_path / 'data'}:test", "data.train", tmp_path)
    assert [row.values["prompt"] for row in named.rows()] == ["test.jsonl"]
    (tmp_path / "data" / "train.jsonl").unlink()
    (tmp_path / "data" / "valid.jsonl").unlink()
    with pytest.raises(UserError, match=r"data.train: .*found the splits .*test, expected train. Name one: "):
        sources.resolve(str(tmp_path / "data"), "data.train", tmp_path)


def test_saved_datasets_and_json_columns_are_read(tmp_path):
    from datasets import Dataset, DatasetDict, Features, Json, Value

    arguments = [{"text": "hi"}, {"x": 1, "unset": None}]
    features = Features({"prompt": Value("string"), "tools": Json()})
    rows = Dataset.from_list([{"prompt": "a", "tools": one} for one in arguments], features=features)
    DatasetDict(train=rows, test=rows.select([1])).save_to_disk(str(tmp_path / "data"))
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    assert split_names(tmp_path, "validation") == {"data": ["data/test"]}
    for name in ("data", "data/train", "rows.parquet"):
        read = sources.resolve(str(tmp_path / name), "data.train", tmp_path).rows()
        assert [row.values["tools"] for row in read] == arguments, "a null in JSON is the row's own"


def test_nulls_that_arrow_writes_are_removed(tmp_path):
    import pyarrow
    import pyarrow.parquet

    calls = [[{"name": "say", "arguments": {"text": "hi"}}], [{"name": "move", "arguments": {"x": 1}}], None]
    rows = [{"messages": [{"role": "assistant", "content": "", "tool_calls": one}]} for one in calls]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    read = [row.values["messages"][0].get("tool_calls") for row in rows_of(tmp_path / "rows.parquet")]
    assert read == calls
