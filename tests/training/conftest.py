from __future__ import annotations

from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs.dinov2_tiny import get_config


@pytest.fixture
def config(grid_dir: Path) -> ConfigDict:
    """Two hundred thousand parameters, four steps."""
    config = get_config("test")
    config.data.path = str(grid_dir)
    return config
