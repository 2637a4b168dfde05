"""Fixtures more than one room needs: a small synthetic cohort, tiled once a test process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real slides, or a skip that says so."""
    root = Path(os.environ.get("PATHME_SHARED", Path(__file__).parents[2] / "shared" / "data"))
    if not (root / "slides").is_dir():
        pytest.skip(f"no real slides at {root}; set $PATHME_SHARED")
    return root


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four synthetic slides of one region each, two cases a label."""
    from pathme_jax.synthetic.cohort import write_cohort

    out = tmp_path_factory.mktemp("cohort")
    return write_cohort(
        out, slides=4, size=4096, seed=3, slides_per_case=1, workers=1, progress=False
    )


@pytest.fixture(scope="session")
def grid_dir(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That cohort, tiled at 0.5 µm/px."""
    from pathme_jax.slides import tile

    out = tmp_path_factory.mktemp("tiles")
    return tile.run(cohort / "slides", out, workers=1, progress=False).grid_dir
