"""Encoders: `pathme_jax.encoders.load(path)` gives one that is called with images."""

from __future__ import annotations

from typing import Any


def load(name: Any, dtype: str | None = None) -> Any:
    """See `encoders.encoder.load`; JAX is imported when it is called, not before."""
    from pathme_jax.encoders.encoder import load

    return load(name, dtype)
