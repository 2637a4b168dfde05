"""Chromatin: the label `detail`, a texture inside nuclei that is there at 20x and gone at 5x."""

from __future__ import annotations

import functools
import itertools

import numpy as np

BLOCK = 4  # px: the 5x pixel, within which the texture sums to zero
AMPLITUDE = 24  # grey levels


def chromatin(rng: np.random.Generator, blocks: np.ndarray, detail: int) -> np.ndarray:
    """Draws the texture of `detail` 0 (fine) or 1 (coarse), to be added to every channel.

    Each 4x4 px block is half +AMPLITUDE and half -AMPLITUDE, so that mean and variance are the same
    in both classes and only the neighbours differ.

    Args:
        rng: source of the pattern of each block.
        blocks: (m, n) bool, the blocks that get one.
        detail: 0 or 1.

    Returns:
        (4m, 4n) int16, zero outside `blocks`.
    """
    choices = patterns(detail)
    texture = np.zeros((*blocks.shape, BLOCK, BLOCK), np.int16)
    texture[blocks] = choices[rng.integers(len(choices), size=int(blocks.sum()))]
    rows, columns = blocks.shape
    return texture.transpose(0, 2, 1, 3).reshape(rows * BLOCK, columns * BLOCK)


@functools.cache
def patterns(detail: int) -> np.ndarray:
    """All patterns (p, 4, 4) of a class; each set is closed under flips and quarter turns.

    Coarse: four clumps of 2x2 px, two light and two dark. Fine: in each of the four, two light
    pixels and two dark. Every 2x2 sum is a multiple of 4, so that a pyramid that halves and rounds
    twice arrives at the same 5x pixels as one that averages 4x4 at once.
    """
    signs = [s for s in itertools.product((-1, 1), repeat=4) if sum(s) == 0]
    squares = AMPLITUDE * np.array(signs, np.int16).reshape(-1, 2, 2)
    if detail:
        return squares.repeat(2, 1).repeat(2, 2)
    return np.array(
        [np.block([[a, b], [c, d]]) for a, b, c, d in itertools.product(squares, repeat=4)]
    )
