"""PRNG keys as functions of (seed, stream, global sample index): no key is ever stored."""

from __future__ import annotations

import zlib

import jax

Array = jax.Array


def stream_key(seed: int, stream: str) -> Array:
    """One key for a named use of randomness."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(stream.encode()))


def sample_keys(seed: int, stream: str, index: Array) -> Array:
    """(b,) global sample indices to (b,) keys: the same wherever and whenever a sample is seen.

    The index counts samples over the whole run, so it also tells steps apart.
    """
    key = stream_key(seed, stream)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def substream(keys: Array, number: int | Array) -> Array:
    """(b,) keys to (b,) other keys, one set for each number."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
