"""Chromatin: the label `detail`, a texture inside nuclei that is there at 20x and gone at 5x."""

from __future__ import annotations

import functools

import numpy as np

BLOCK = 4  # px: the 5x pixel, within which the texture sums to zero
GRAIN = 4  # blocks: a pattern keeps its phase over 16 px, about a nucleus
AMPLITUDE = 24  # grey levels


def chromatin(rng: np.random.Generator, blocks: np.ndarray, detail: int) -> np.ndarray:
    """Draws the texture of `detail` 0 (threads) or 1 (clumps), to be added to every channel.

    Each 4x4 px block is half +AMPLITUDE and half -AMPLITUDE, so that mean and variance are the same
    in both classes and only the neighbours differ.

    Args:
        rng: source of the pattern of each grain of 4x4 blocks.
        blocks: (m, n) bool, the blocks that get one.
        detail: 0 or 1.

    Returns:
        (4m, 4n) int16, zero outside `blocks`.
    """
    rows, columns = blocks.shape
    choices = patterns(detail)
    grains = rng.integers(len(choices), size=(-(-rows // GRAIN), -(-columns // GRAIN)))
    chosen = grains.repeat(GRAIN, 0).repeat(GRAIN, 1)[:rows, :columns]
    texture = choices[chosen] * blocks[..., None, None]
    return texture.transpose(0, 2, 1, 3).reshape(rows * BLOCK, columns * BLOCK)


@functools.cache
def patterns(detail: int) -> np.ndarray:
    """All patterns (8, 4, 4) of a class, int16; each set is closed under flips and quarter turns.

    Threads: lines 2 px wide, light and dark in turn, upright or level. Clumps: squares of 2x2 px, light
    and dark in turn. Both in every phase. Every 2x2 sum is a multiple of 4, so that a pyramid that
    halves and rounds twice arrives at the same 5x pixels as one that averages 4x4 at once.
    """
    wave = np.array([1, 1, -1, -1])
    phases = [np.roll(wave, shift) for shift in range(4)]
    if detail:
        drawn = [np.outer(a, b) for a in phases[:2] for b in phases]
    else:
        drawn = [np.broadcast_to(a, (4, 4)) for a in phases]
        drawn += [d.T for d in drawn]
    return AMPLITUDE * np.array(drawn, np.int16)
