"""Bags padded to few sizes: every instance kept, little wasted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathme_jax.mil.buckets import pack, padded_sizes, waste


@given(lengths=st.lists(st.integers(1, 700), min_size=1, max_size=30))
def test_packing_keeps_every_instance_in_few_sizes(lengths):
    bags = [np.full((n, 2), i + 1, np.float32) for i, n in enumerate(lengths)]
    buckets = pack(bags)
    assert len(buckets) <= 16
    assert sorted(np.concatenate([b.index for b in buckets]).tolist()) == list(range(len(bags)))
    for bucket in buckets:
        bags_of = bucket.arrays()
        for i, x, mask in zip(bucket.index, bags_of.features, bags_of.mask, strict=True):
            assert mask.sum() == lengths[i] and (x[mask] == i + 1).all() and not x[~mask].any()


def test_uneven_bags_do_not_pad_to_the_largest():
    bags = [np.ones((n, 1), np.float32) for n in [8000] + [500] * 39]
    padded = sum(bucket.arrays().mask.size for bucket in pack(bags))
    assert padded < 1.25 * sum(map(len, bags))


def test_a_large_bag_is_sampled_the_same_way_every_time():
    large = np.arange(100, dtype=np.float32)[:, None]
    first, second, other = (pack([large], most=10, seed=s)[0].arrays() for s in (1, 1, 2))
    np.testing.assert_array_equal(first.features, second.features)
    chosen = first.features[first.mask][:, 0]
    assert len(set(chosen.tolist())) == 10
    assert set(other.features[other.mask][:, 0].tolist()) != set(chosen.tolist())


@pytest.mark.parametrize("seed", range(3))
def test_packing_wastes_little_in_few_sizes(seed):
    lengths = np.random.default_rng(seed).integers(500, 4000, 60)
    size = padded_sizes(lengths)
    assert (size >= lengths).all() and len(np.unique(size)) <= 16
    assert size.sum() / lengths.sum() < 1.1


def test_packed_bags_are_the_bags():
    rng = np.random.default_rng(0)
    bags = [rng.normal(size=(n, 3)).astype(np.float32) for n in [90, 4, 50, 7]]
    cells = [rng.integers(0, 9, (len(bag), 2)) for bag in bags]
    packed = pack(bags, cells)
    assert sorted(i for b in packed for i in b.index.tolist()) == [0, 1, 2, 3]
    for bucket in packed:
        all_, some = bucket.arrays(), bucket.arrays([len(bucket.index) - 1, 0])
        np.testing.assert_array_equal(some.features[1], all_.features[0])
        np.testing.assert_array_equal(some.mask[0], all_.mask[-1])
        for row, i in enumerate(bucket.index):
            mask = all_.mask[row]
            np.testing.assert_array_equal(all_.features[row][mask], bags[i])
            np.testing.assert_array_equal(all_.cells[row][mask], cells[i])
    assert waste(packed) == sum(b.arrays().mask.size for b in packed) / 151
    assert all(bucket.size % 4 == 0 for bucket in pack(bags, multiple=4))


def test_a_few_small_bags_are_not_worth_a_size_each():
    """Eight sizes would be sixteen compilations to save 240 of 1,900 instances."""
    small = np.array([256, 250, 249, 240, 230, 228, 225, 222])
    assert set(padded_sizes(small)) == {256}
    assert len(set(padded_sizes(100 * small))) == 2
    far = np.array([256] * 4 + [32] * 4)  # twice as many padded as real ones
    assert set(padded_sizes(far)) == {256, 32}
