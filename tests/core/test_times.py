# SPDX-License-Identifier: Apache-2.0
"""Times of the forward process that are drawn chunk by chunk."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chunkgrpo.core import ChunkTimes, ShuffledTimes, StratifiedTimes
from chunkgrpo.core.awm import stratified_times
from chunkgrpo.core.nft import shuffled_times
from closed_forms import seeded


@given(
    chunks=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=4),
    start=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_each_chunk_gives_its_number_of_different_times(chunks, start, seed):
    sizes = tuple(size for size, _ in chunks)
    numbers = tuple(min(size, number) for size, number in chunks)
    if not any(numbers):
        numbers = (1, *numbers[1:])
    times = ChunkTimes(sizes, numbers, start)
    assert times.window == range(start, start + sum(sizes))
    drawn = times.draw(times.window.stop, 20, seeded(seed))
    assert drawn.shape == (20, sum(numbers)) and drawn.dtype == torch.int64
    begin, column = start, 0
    for chunk, (size, number) in enumerate(zip(sizes, numbers, strict=True)):
        assert times.starts[chunk] == begin - start
        slots = slice(column, column + number)
        assert (times.chunk_of_slot[slots] == chunk).all()
        for row in drawn[:, slots].tolist():
            assert len(set(row)) == number and all(begin <= t < begin + size for t in row)
        begin, column = begin + size, column + number


def test_every_time_of_a_chunk_is_as_likely():
    times = ChunkTimes((5,), (4,))
    counts = torch.bincount(times.draw(10, 20_000, seeded()).flatten(), minlength=10)
    # Each of five times is in four fifths of 20,000 rows; 5 standard deviations are 283.
    assert (counts[:5] - 16_000).abs().max() < 283 and counts[5:].sum() == 0


def test_the_other_rules_draw_what_their_functions_do():
    shuffled = ShuffledTimes(0.5).draw(10, 7, seeded(3))
    assert torch.equal(shuffled, shuffled_times(10, 0.5, 7, seeded(3)))
    stratified = StratifiedTimes(3).draw(10, 7, seeded(3))
    assert torch.equal(stratified, stratified_times(10, 3, 7, seeded(3)))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ChunkTimes(()), "a chunk has at least one time"),
        (lambda: ChunkTimes((0,), (0,)), "a chunk has at least one time"),
        (lambda: ChunkTimes(start=-1), "the first time is 0"),
        (lambda: ChunkTimes((2, 3), (1,)), "numbers has 1 entries and sizes 2"),
        (lambda: ChunkTimes((2,), (3,)), r"numbers are \[3\] of chunks of \[2\] times"),
        (lambda: ChunkTimes((2, 2), (0, 0)), "from one at least"),
        (lambda: ChunkTimes((2, 2), (-1, 1)), "draw from 0 to all"),
        (lambda: ChunkTimes((5,), (4,)).draw(4, 1, seeded()), "has the times 0 to 3"),
        (lambda: StratifiedTimes(0), "at least one time"),
        (lambda: ShuffledTimes(0), "the trained share of the times"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
