"""Folders of slide-level runs as `mil_train` leaves them, of any kinds of task, with small synthetic numbers."""

from __future__ import annotations

import cv2
import h5py
import numpy as np
import pytest
import tifffile

from pathme_jax.evaluation import metrics
from pathme_jax.evaluation.survival import concordance, logrank
from pathme_jax.files import write_csv, write_json

FOLDS, SIDE = 3, 256
SIZE = (2048, 1536)  # width, height of every slide
LABELS = ["er", "pr", "her2"]


def scores_of(rng, labels, classes, strength):
    logits = rng.normal(size=(len(labels), classes)) + strength * np.eye(classes)[labels]
    shares = np.exp(logits)
    return shares / shares.sum(1, keepdims=True)


def classes_task(rng, ids, folds, names, strength):
    labels = np.arange(len(ids)) % len(names)
    scores = scores_of(rng, labels, len(names), strength).round(6)
    rows = [
        {"label": names[label]} | {f"score_{n}": s for n, s in zip(names, score, strict=True)}
        for label, score in zip(labels, scores.tolist(), strict=True)
    ]
    found = metrics.classification(scores, labels, folds)
    counts = {n: int((labels == i).sum()) for i, n in enumerate(names)}
    return rows, found, {"measure": "auroc", "classes": names, "cases_per_class": counts}


def labels_task(rng, ids, folds, names, strength):
    truth = (rng.random((len(ids), len(names))) < 0.4).astype(float)
    scores = (1 / (1 + np.exp(-rng.normal(strength * (truth - 0.5) * 2)))).round(6)
    truth[rng.random(truth.shape) < 0.1] = np.nan  # unknown
    truth[:, 0] = np.nan_to_num(truth[:, 0])
    rows = [
        {f"label_{n}": "" if np.isnan(t) else int(t) for n, t in zip(names, true, strict=True)}
        | {f"score_{n}": s for n, s in zip(names, score, strict=True)}
        for true, score in zip(truth, scores.tolist(), strict=True)
    ]
    found = metrics.multilabel(scores, np.nan_to_num(truth, nan=-1), folds)
    counts = {n: int(np.nansum(truth[:, i])) for i, n in enumerate(names)}
    return rows, found, {"measure": "auroc", "classes": names, "cases_per_class": counts}


def number_task(rng, ids, folds, names, strength):
    truth = rng.normal(30, 10, len(ids)).round(4)
    said = (30 + 0.5 * strength * (truth - 30) + rng.normal(0, 6, len(ids))).round(4)
    rows = [
        {"truth": t, "prediction": s} for t, s in zip(truth.tolist(), said.tolist(), strict=True)
    ]
    about = {"measure": "pearson", "classes": [], "mean": truth.mean(), "std": truth.std()}
    return rows, metrics.regression(said, truth), about


def survival_task(rng, ids, folds, names, strength):
    risk = rng.normal(size=len(ids)).round(6)
    time = rng.exponential(40 * np.exp(-0.5 * strength * risk)).round(3) + 0.5
    event = (rng.random(len(ids)) < 0.6).astype(int)
    rows = [
        {"time_months": t, "event": e, "risk": r}
        for t, e, r in zip(time.tolist(), event.tolist(), risk.tolist(), strict=True)
    ]
    found = {"c_index": np.array([concordance(risk, time, event, folds)])}
    high = np.zeros(len(ids), bool)
    for f in range(FOLDS):
        high[folds == f] = risk[folds == f] > np.median(risk[folds == f])
    about = {"measure": "c_index", "classes": [], "events": int(event.sum())}
    return rows, found, about | {"extra": {"logrank_p": logrank(time, event, high)[1]}}


MAKERS = {
    "classes": classes_task,
    "labels": labels_task,
    "number": number_task,
    "nll": survival_task,
    "cox": survival_task,
}


def build(
    run, tasks, *, cases=60, strength=1.5, few=False, names=("neg", "pos"), slide="s{}", attention=8
):
    """Writes a run folder.

    Args:
        tasks: name → kind. names: of the classes. slide: pattern of the slide ids.
        attention: slides that have an attention file.
    """
    rng = np.random.default_rng(0)
    ids = [slide.format(i) for i in range(cases)]
    folds = np.arange(cases) * FOLDS // cases
    for task, kind in tasks.items():
        chosen = LABELS if kind == "labels" else list(names)
        rows, found, about = MAKERS[kind](rng, ids, folds, chosen, strength)
        value = float(found[about["measure"]][0])
        measures = {
            name: {"value": float(v[0]), "interval": [float(v[0]) - 0.1, float(v[0]) + 0.05]}
            for name, v in found.items()
        }
        measure = about["measure"]

        def row(v, p=0.001, measure=measure):
            return {
                measure: v, "interval": [v - 0.1, min(1.0, v + 0.08)], "permutation_p": p,
                f"fold_{measure}": [v] * FOLDS, "fold_mean": v, "fold_std": 0.031,
            }  # fmt: skip

        chance = 0.0 if kind == "number" else 0.5
        head = row(value) | {"measures": measures} | about.pop("extra", {})
        content = about | {
            "task": task, "kind": kind, "cases": cases, "slides": cases, "instances": 12 * cases,
            "bag": "slide", "head": "abmil", "folds": FOLDS, "fold_source": "stratified by case",
            "folds_left_out": [], "too_few_to_judge": few, "read": ["labels from column label"],
            "orphans": 0, "blank_label": ["blank1"], "no_label": [], "name": "20x-uni",
            "problems": [{"slide_id": "lost", "reason": "no <features>", "cure": "Extract it"}],
            "rows": {
                "head": head,
                "mean_pool": row((value + chance) / 2, 0.03)
                | {"measures": {k: {"value": 0.4, "interval": [0.3, 0.5]} for k in measures}},
                "mean_colour": row(chance + 0.02, 0.4),
                "shuffled": row(chance + 0.01, 0.6),
            },
        }  # fmt: skip
        write_json(run / task / "metrics.json", content)
        cases_rows = [{"case_id": f"c{i}", "fold": int(folds[i])} | r for i, r in enumerate(rows)]
        write_csv(run / task / "cases.csv", cases_rows, list(cases_rows[0]))
        slides_rows = [{"slide_id": s} | r for s, r in zip(ids, cases_rows, strict=True)]
        columns = ["case_id", "slide_id", *list(cases_rows[0])[1:]]
        write_csv(run / task / "predictions.csv", slides_rows, columns)
    history = [
        {"fold": f, "epoch": e, "loss": 0.7 * 0.9**e + 0.02 * f}
        | {"validation_loss": "" if e > 15 + f else 0.72 * 0.93**e + 0.004 * e + 0.03 * f}
        for f in range(FOLDS)
        for e in range(20)
    ]
    write_csv(run / "history.csv", history, ["fold", "epoch", "loss", "validation_loss"])
    settings = {"seed": 0, "folds": FOLDS, "head": "abmil", "options": ""}
    made = {"recipe": {"settings": settings, "labels": ["no such long thing is shown"] * 99}}
    write_json(run / "run.json", made | {"seconds": 61.5, "versions": {"jax": "0.10"}, "commit": "ab12"})  # fmt: skip
    (run / "attention").mkdir(parents=True, exist_ok=True)
    for slide_id in ids[:attention]:
        write_attention(run / "attention" / f"{slide_id}.h5")
    return run


def write_attention(path, attrs=None):
    """Attention over a grid of 4 × 4 tiles from (256, 256) that grows along it, and a prompt token that has most."""
    grid = np.stack(np.meshgrid(np.arange(4), np.arange(4)), -1).reshape(-1, 2)
    coords = np.concatenate([SIDE + grid * SIDE, [[0, 0]]])
    attention = np.append(np.linspace(0.01, 0.1, 16), 0.5)
    size = {"level0_width": SIZE[0], "level0_height": SIZE[1]}
    with h5py.File(path, "w") as file:
        file.create_dataset("attention", data=attention.astype(np.float32))
        at = file.create_dataset("coords", data=coords)
        at.attrs.update({"patch_size_level0": float(SIDE), **size} if attrs is None else attrs)
        file.create_dataset("kind", data=np.append(np.zeros(16, np.uint8), np.uint8(1)))


def paint(seed=0):
    """(h, w, 3) of something like tissue on glass; a tile of a different grey at every place of the grid."""
    rng = np.random.default_rng(seed)
    picture = np.full((SIZE[1], SIZE[0], 3), 243, np.uint8)
    for row in range(4):
        for column in range(4):
            y, x = SIDE * (1 + row), SIDE * (1 + column)
            shade = np.array([200, 120, 170]) - 6 * (4 * row + column)
            noise = rng.integers(-10, 10, (SIDE, SIDE, 1))
            picture[y : y + SIDE, x : x + SIDE] = np.clip(shade + noise, 0, 255)
    return picture


@pytest.fixture
def make_run():
    return build


@pytest.fixture
def thumbnails(tmp_path):
    folder = tmp_path / "thumbnails"
    folder.mkdir()
    small = cv2.resize(paint(), (512, 384), interpolation=cv2.INTER_AREA)
    for i in range(14):
        cv2.imwrite(str(folder / f"s{i}.jpg"), cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
    return folder


@pytest.fixture
def whole_slides(tmp_path):
    """Tiled TIFFs without a stated µm/px, which a report must not ask for."""
    folder = tmp_path / "slides"
    folder.mkdir()
    for i in range(8):
        tifffile.imwrite(folder / f"s{i}.tif", paint(), tile=(256, 256), photometric="rgb")
    return folder
