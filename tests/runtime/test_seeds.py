# SPDX-License-Identifier: Apache-2.0
"""Noise belongs to a sample."""

from itertools import product

import torch

from chunkgrpo.runtime.seeds import NoiseSource, derive_seed


def test_seeds_are_fixed_for_ever():
    assert derive_seed(0) == 7896617691693857887
    assert derive_seed(42, 7) == 5236832352017723729


def test_near_inputs_give_unrelated_seeds():
    seeds = [derive_seed(*pair) for pair in product(range(30), repeat=2)]
    assert len(set(seeds)) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)
    bits = torch.tensor([[seed >> b & 1 for b in range(63)] for seed in seeds]).float()
    assert (bits.mean(0) - 0.5).abs().max() < 0.08
    assert derive_seed(1, 2) != derive_seed(2, 1)
    # Large parts, as one derived seed inside another, are taken whole.
    assert derive_seed(2**62, 1) != derive_seed(2**62 + 1, 1)


def test_a_samples_noise_does_not_depend_on_its_neighbours():
    together = NoiseSource([1, 2, 3])
    alone = NoiseSource([2])
    for _ in range(3):
        assert torch.equal(together.draw((4, 5))[1], alone.draw((4, 5))[0])


def test_streams_go_on_and_are_standard_normal():
    source = NoiseSource(range(8))
    first, second = source.draw((20_000,)), source.draw((20_000,))
    assert first.shape == (8, 20_000) and first.dtype == torch.float32
    assert not torch.equal(first, second)
    everything = torch.stack([first, second]).double()
    assert everything.mean().abs() < 0.01 and (everything.std() - 1).abs() < 0.01
    rows = everything.flatten(0, 1)
    correlation = torch.corrcoef(rows) - torch.eye(16)
    assert correlation.abs().max() < 0.04


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    NoiseSource([1, 2]).draw((3,))
    assert torch.equal(torch.get_rng_state(), before)
