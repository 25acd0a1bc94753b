"""Rows with a megabyte of text; tests/unit/test_bad_input.py has the small ones."""

import datetime

import numpy
import pytest
from helpers.bad_input import LARGE, check_example
from helpers.examples import labels_of, tokenize_all

from sft_recipes.data import sources, tokenize_rows
from sft_recipes.data.formats import conversation_of
from sft_recipes.data.tokenize import ConversationTokenizer

MAX_LENGTH = 128


@pytest.mark.parametrize("case", LARGE, ids=[case.title for case in LARGE])
def test_tokenize_large_rows(case, tmp_path, tokenizer):
    path = tmp_path / case.name
    path.write_bytes(case.content)
    conversation_tokenizer = ConversationTokenizer(tokenizer, datetime.date(2026, 11, 21))
    rows = list(sources.resolve(str(path), "data.train", tmp_path / "toy").rows())
    conversations = [conversation_of(row) for row in rows]
    examples = tokenize_all(conversation_tokenizer, conversations)
    assert len(examples) == len(case.conversations)
    for example, turns in zip(examples, case.conversations, strict=True):
        check_example(example, turns, tokenizer)
    chunk = tokenize_rows.to_chunk(rows, conversations, examples, MAX_LENGTH)
    ends = numpy.cumsum(chunk.numbers["length"])[:-1]
    assert chunk.numbers["full_length"].tolist() == [len(example.input_ids) for example in examples]
    assert [ids.tolist() for ids in numpy.split(chunk.input_ids, ends)] == [
        example.input_ids[:MAX_LENGTH] for example in examples
    ]
    assert [labels.tolist() for labels in numpy.split(chunk.labels, ends)] == [
        labels_of(example)[:MAX_LENGTH] for example in examples
    ]
