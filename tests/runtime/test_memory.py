# SPDX-License-Identifier: Apache-2.0
"""Peak memory against allocations whose sizes are known."""

import torch

from chunkgrpo.runtime.memory import peak_memory

MEGABYTE = 1 << 20


def test_the_peak_counts_what_lives_together():
    held = []

    def work():
        a = torch.empty(3 * MEGABYTE, dtype=torch.uint8)
        del a
        held.append(torch.empty(2 * MEGABYTE, dtype=torch.uint8))
        b = torch.empty(4 * MEGABYTE, dtype=torch.uint8)
        del b

    assert abs(peak_memory(work) - 6 * MEGABYTE) < 4096


def test_what_was_there_before_does_not_count():
    before = torch.empty(8 * MEGABYTE, dtype=torch.uint8)
    assert peak_memory(lambda: before.add_(1)) < 4096
    assert peak_memory(lambda: None) == 0
