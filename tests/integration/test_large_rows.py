"""Rows with a megabyte of text; tests/unit/test_bad_input.py has the small ones."""

import datetime

import pytest
from helpers.bad_input import LARGE, check_example

from sft_recipes.data import sources, tokenize_rows
from sft_recipes.data.formats import conversation_of
from sft_recipes.data.tokenize import IGNORED, ConversationTokenizer

MAX_LENGTH = 128


@pytest.mark.parametrize("case", LARGE, ids=[case.title for case in LARGE])
def test_tokenize_large_rows(case, tmp_path, tokenizer):
    path = tmp_path / case.name
    path.write_bytes(case.content)
    conversation_tokenizer = ConversationTokenizer(tokenizer, datetime.date(2026, 11, 21))
    rows = list(sources.resolve(str(path), "data.train", tmp_path / "toy").rows())
    conversations = [conversation_of(row) for row in rows]
    examples = conversation_tokenizer.tokenize(conversations)
    assert len(examples) == len(case.conversations)
    for example, turns in zip(examples, case.conversations, strict=True):
        check_example(example, turns, tokenizer)
    tokenized = tokenize_rows.to_arrays(conversations, examples, MAX_LENGTH)
    assert tokenized.full_lengths.tolist() == [len(example.input_ids) for example in examples]
    assert tokenized.input_ids.tolist() == [id for example in examples for id in example.input_ids[:MAX_LENGTH]]
    in_loss = [label != IGNORED for example in examples for label in example.labels[:MAX_LENGTH]]
    assert tokenized.loss_mask.tolist() == in_loss
