"""iBOT's masks with a count fixed by position in the batch, so that shapes stay static."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def mask_counts(
    samples: int, tokens: int, ratio: tuple[float, float], share: float, block: int
) -> np.ndarray:
    """How many tokens of each sample are masked: a constant of the configuration.

    In every logical block of `block` samples the first `share` are masked, with ratios spread evenly
    over `ratio` (DINOv2 draws them so); the rest are not. Blocks are positions in the global batch,
    never devices.

    Returns:
        (samples,) int.
    """
    masked = round(block * share)
    counts = np.zeros(block, int)
    counts[:masked] = np.round(tokens * np.linspace(*ratio, max(masked, 1)))[:masked]
    return np.resize(counts, samples)


def block_masks(
    keys: Array, counts: Array | np.ndarray, shape: tuple[int, int], aspect: float = 0.3
) -> Array:
    """One random rectangle a sample, trimmed at random to exactly `counts` tokens.

    Args:
        keys: (b,) PRNG keys. counts: (b,) int. aspect: height / width in [aspect, 1 / aspect].

    Returns:
        (b, *shape) bool.
    """
    return jax.vmap(lambda key, count: _mask(key, count, shape, aspect))(keys, jnp.asarray(counts))


def _mask(key: Array, count: Array, shape: tuple[int, int], aspect: float) -> Array:
    rows, columns = shape
    bend, top, left = jax.random.uniform(key, (3,))
    ratio = jnp.exp((2 * bend - 1) * -jnp.log(aspect))
    # The smallest whole rectangle of about that shape that fits the grid and holds `count` tokens.
    height = jnp.ceil(jnp.clip(jnp.sqrt(count * ratio), jnp.maximum(count / columns, 1), rows))
    width = jnp.ceil(count / height)
    y = jnp.arange(rows)[:, None] - jnp.floor(top * (rows - height + 1))
    x = jnp.arange(columns)[None] - jnp.floor(left * (columns - width + 1))
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    noise = jax.random.uniform(jax.random.fold_in(key, 1), shape)
    rank = jnp.argsort(jnp.argsort((noise - 2.0 * inside).reshape(-1)))
    return (rank < count).reshape(shape)
