"""Packing fills rows almost completely and splits no example."""

import numpy
import pytest

from sft_recipes.data.packing import pack


def lengths(count, mean, capacity, seed=0):
    drawn = numpy.random.default_rng(seed).lognormal(numpy.log(mean) - 0.5, 1.0, count)
    return numpy.clip(drawn, 1, capacity).astype(numpy.int64)


@pytest.mark.parametrize("capacity", [64, 512, 4096])
@pytest.mark.parametrize("count", [1, 2, 17, 3000])
def test_pack_keeps_examples_within_capacity(count, capacity):
    drawn_lengths = lengths(count, capacity / 7, capacity, seed=count)
    order, sizes = pack(drawn_lengths, capacity)
    assert sorted(order.tolist()) == list(range(count))
    assert sizes.sum() == count and sizes.min() >= 1
    rows = numpy.split(drawn_lengths[order], numpy.cumsum(sizes)[:-1])
    assert max(row.sum() for row in rows) <= capacity


def test_pack_fills_999_of_1000_tokens():
    """At 4,096 tokens; TRL's packing reaches 0.996 for this distribution of lengths (benchmarks/data.py)."""
    drawn_lengths = lengths(50_000, 597, 4096)
    _, sizes = pack(drawn_lengths, 4096)
    assert drawn_lengths.sum() / (len(sizes) * 4096) >= 0.999


def test_pack_finds_exact_fits():
    _, sizes = pack(numpy.array([5, 5, 5, 3, 3, 3, 2, 2, 2]), 10)
    assert len(sizes) == 3, "thirty tokens fill three rows"
    assert [part.tolist() for part in pack(numpy.array([], dtype=numpy.int64), 10)] == [[], []]


def test_pack_is_deterministic():
    drawn_lengths = lengths(500, 60, 512)
    assert all(
        (left == right).all() for left, right in zip(pack(drawn_lengths, 512), pack(drawn_lengths, 512), strict=True)
    )
