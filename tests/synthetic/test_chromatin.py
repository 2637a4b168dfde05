"""Chromatin must vanish from every 5x pixel, and must not betray its class by any simpler means."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathme_jax.synthetic.chromatin import AMPLITUDE, chromatin, patterns


@pytest.mark.parametrize("detail", [0, 1])
def test_every_pattern_has_the_same_mean_and_variance(detail):
    assert (patterns(detail).sum((1, 2)) == 0).all()
    assert (np.abs(patterns(detail)) == AMPLITUDE).all()


@pytest.mark.parametrize("detail", [0, 1])
def test_patterns_are_closed_under_flips_and_turns(detail):
    known = {pattern.tobytes() for pattern in patterns(detail)}
    for pattern in patterns(detail):
        assert np.ascontiguousarray(pattern[::-1]).tobytes() in known
        assert np.ascontiguousarray(np.rot90(pattern)).tobytes() in known


def test_classes_share_no_pattern_and_have_as_many():
    threads, clumps = ({p.tobytes() for p in patterns(detail)} for detail in (0, 1))
    assert len(threads) == len(clumps) == 8
    assert not threads & clumps


@pytest.mark.parametrize("detail", [0, 1])
def test_every_2x2_sum_survives_halving_and_rounding(detail):
    sums = patterns(detail).reshape(-1, 2, 2, 2, 2).sum((2, 4))
    assert (sums % 4 == 0).all()


@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 9), st.integers(0, 1))
def test_texture_fills_its_blocks_and_nothing_else(seed, rows, columns, detail):
    rng = np.random.default_rng(seed)
    blocks = rng.random((rows, columns)) < 0.5
    texture = chromatin(rng, blocks, detail)
    inside = blocks.repeat(4, 0).repeat(4, 1)
    assert ((texture != 0) == inside).all()
    assert (texture.reshape(rows, 4, columns, 4).sum((1, 3)) == 0).all()
