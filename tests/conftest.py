"""Fixtures more than one room needs: a small synthetic cohort, tiled once a test process; tiny pyramids."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Small programs, run a few times: nearly all of their time is compilation. So and without the newer emitters XLA
# compiles four times quicker than by default; what it compiles takes three times as long.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)
# What one worker or child process has compiled in this run, no other compiles again.
CACHE = "JAX_COMPILATION_CACHE_DIR"
OURS = CACHE not in os.environ
if OURS:
    os.environ[CACHE] = tempfile.mkdtemp(prefix="pathme_jax-tests-")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

SIZE = 1100  # px at 0.5 µm; with 128 px fields 8 × 8 fields and 2 × 2 regions fit


# Minutes each: begun first, lest one worker be left alone with them.
LONG = ("test_resume.py", "test_notebook.py", "test_step.py", "test_mil_run.py", "test_failures.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_unconfigure() -> None:
    if OURS:
        shutil.rmtree(os.environ[CACHE], ignore_errors=True)


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


def _paint(seed: int = 0) -> np.ndarray:
    """(SIZE, SIZE, 3) pink, textured tissue on the left 60 %, glass on the right."""
    rng = np.random.default_rng(seed)
    image = np.full((SIZE, SIZE, 3), 243, np.uint8)
    texture = rng.integers(-40, 40, (SIZE // 4, SIZE // 4, 1)).repeat(4, 0).repeat(4, 1)
    edge = int(SIZE * 0.6)
    image[:, :edge] = np.clip(np.array([200, 120, 170]) + texture[:, :edge], 0, 255)
    return image


def _write_tiff(
    path: Path,
    image: np.ndarray,
    *,
    mpp: float | None = 0.5,
    levels: int = 3,
    compression: str = "deflate",
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path) as writer:
        for level in range(levels):
            writer.write(
                image,
                tile=(128, 128),
                photometric="rgb",
                compression=compression,
                resolution=(1e4 / (mpp * 2**level),) * 2 if mpp else None,
                resolutionunit="CENTIMETER" if mpp else None,
                subfiletype=1 if level else 0,
                metadata=None,
            )
            half = (image.shape[1] // 2, image.shape[0] // 2)
            image = cv2.resize(image, half, interpolation=cv2.INTER_AREA)
    return path


@pytest.fixture
def paint() -> Callable[..., np.ndarray]:
    """paint(seed=0): pixels of a small slide, tissue on the left 60 %, glass on the right."""
    return _paint


@pytest.fixture
def write_tiff() -> Callable[..., Path]:
    """write_tiff(path, image, *, mpp, levels, compression): a pyramid that OpenSlide opens."""
    return _write_tiff


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    """A folder with two good slides, a and b."""
    for seed, name in enumerate("ab"):
        _write_tiff(tmp_path / "slides" / f"{name}.tiff", _paint(seed))
    return tmp_path / "slides"
