"""Survival from feature files to a C-index: the planted order is found, shuffled times are not."""

from __future__ import annotations

import csv
from pathlib import Path

import h5py
import numpy as np
import pytest

from pathme_jax.errors import UserError
from pathme_jax.mil.run import run
from pathme_jax.records.features import coordinate_attrs, write_features

FAST = dict(epochs=15, folds=3, learning_rate=3e-3, batch=8, seeds=1, shuffles=1)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 cases: the share of strange instances sets the hazard; a third is censored."""
    out = tmp_path_factory.mktemp("survival")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(80):
        share = rng.random()
        features = rng.normal(size=(rng.integers(20, 30), 6)).astype(np.float32)
        strange = rng.random(len(features)) < share
        features[strange, 0] += 4
        time = rng.exponential(30 * np.exp(-4 * (share - 0.5)))
        lost = rng.exponential(60)
        rows.append((f"p{i}", f"s{i}", round(min(time, lost) + 0.1, 2), int(lost < time)))
        grid = np.stack(np.unravel_index(np.arange(len(features)), (6, 6)), 1)
        write_features(
            out / "features" / f"s{i}.h5",
            features=features,
            coords=grid * 256,
            grid=grid,
            attrs={
                **coordinate_attrs(
                    slide_id=f"s{i}", mpp=0.5, slide_mpp=0.5, level0_size=(2048, 2048)
                ),
                "encoder": "planted",
                "recipe": "r",
            },
        )
    with open(out / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case_id", "slide_id", "survival_months", "censorship"])
        writer.writerows(rows)
    return out


@pytest.mark.parametrize("loss", ["nll", "cox"])
def test_the_planted_order_of_hazards_is_found(cohort: Path, loss):
    found = run(cohort / "features", cohort / "labels.csv", f"{loss}:", cohort / loss, **FAST)[
        "survival"
    ]
    head, shuffled = found["rows"]["head"], found["rows"]["shuffled"]
    assert head["interval"][0] > 0.5 and head["c_index"] > 0.65
    # Not above chance; below it, folds of a small cohort may well lie.
    assert shuffled["interval"][0] < 0.5 and shuffled["c_index"] < 0.6
    assert head["logrank_p"] < 0.01
    assert found["rows"]["mean_pool"]["c_index"] > 0.6  # a mean tells a share, too
    assert any("censorship" in note for note in found["read"])
    folder = Path(found["folder"])
    assert len(folder.joinpath("cases.csv").read_text().splitlines()) == 81
    with h5py.File(folder.parent / "attention" / "s0.h5") as file:
        assert np.asarray(file["attention"]).sum() == pytest.approx(1, abs=1e-4)


def test_a_rerun_does_nothing(cohort: Path):
    args = (cohort / "features", cohort / "labels.csv", "nll:", cohort / "nll")
    metrics = Path(run(*args, **FAST)["survival"]["folder"]) / "metrics.json"
    stamp = metrics.stat().st_mtime_ns
    run(*args, **FAST)
    assert metrics.stat().st_mtime_ns == stamp


def test_a_batch_too_small_for_a_risk_set_is_named(cohort: Path, tmp_path):
    with pytest.raises(UserError, match="--batch 4 with a cox task"):
        run(cohort / "features", cohort / "labels.csv", "cox:", tmp_path, **(FAST | dict(batch=4)))
