"""Tiles leave room for the chromatin and depend on nothing but their own seed."""

import dataclasses
import itertools

import numpy as np
import pytest

from pathme_jax.synthetic.chromatin import AMPLITUDE
from pathme_jax.synthetic.tiles import GLAND, STROMA, draw_look, draw_tile


@pytest.fixture(scope="module")
def look():
    return draw_look(np.random.default_rng(0))


@pytest.mark.parametrize("kind", [GLAND, STROMA])
def test_chromatin_never_clips_even_in_the_darkest_stain(look, kind):
    dark = dataclasses.replace(look, stains=4 * look.stains, black=0 * look.black)
    tile = draw_tile(np.random.default_rng(1), kind, dark)
    inside = tile.base[tile.blocks.repeat(4, 0).repeat(4, 1)]
    assert len(inside) > 500
    assert inside.min() >= AMPLITUDE and inside.max() <= 255 - AMPLITUDE
    assert tile.base.min() < AMPLITUDE  # the stain was dark enough for the test to mean something


def test_gland_tiles_hold_far_more_nuclei(look):
    def nuclei(kind):
        return np.mean([draw_tile(np.random.default_rng(i), kind, look).blocks for i in range(20)])

    assert nuclei(GLAND) > 2 * nuclei(STROMA)


def test_tiles_meet_without_a_seam(look):
    """Across a border, colours differ no more than between neighbouring pixels elsewhere."""
    tiles = [draw_tile(np.random.default_rng(i), i % 2, look).base.astype(int) for i in range(20)]
    pairs = itertools.pairwise(tiles)
    across = np.mean([np.abs(one[:, -1] - two[:, 0]).mean() for one, two in pairs])
    within = np.mean([np.abs(tile[:, 1] - tile[:, 0]).mean() for tile in tiles])
    assert across < 1.15 * within
