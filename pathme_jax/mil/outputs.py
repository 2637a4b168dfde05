"""The files of a MIL run: predictions, loss history, attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pathme_jax.files import write_csv
from pathme_jax.mil.bags import MilBag
from pathme_jax.mil.outcomes import Found, Outcome


def rounded(content: Any) -> Any:
    """Numbers to 6 digits, NaN to null, NumPy to Python."""
    if isinstance(content, dict):
        return {key: rounded(value) for key, value in content.items()}
    if isinstance(content, list | tuple | np.ndarray):
        return [rounded(value) for value in content]
    if isinstance(content, float | np.floating):
        return round(float(content), 6) if np.isfinite(content) else None
    return content


def write_scores(
    folder: Path,
    outcome: Outcome,
    bags: list[MilBag],
    pairs: np.ndarray,
    scores: np.ndarray,
    truth: np.ndarray,
    cases: Found,
) -> None:
    """predictions.csv and cases.csv: one row per bag, and per case, and fold that tested it.

    Args:
        pairs: (q, 2) fold and bag. scores: (q, c). truth: (folds, bags, w); what is unknown is not written.
        cases: the same by case.
    """
    folder.mkdir(parents=True)
    rows = [
        {"case_id": bags[bag].case_id, "slide_id": bags[bag].slide_id, "fold": fold}
        | rounded(outcome.columns(truth[fold, bag], said))
        for (fold, bag), said in zip(pairs.tolist(), scores, strict=True)
        if not np.isnan(truth[fold, bag]).all()
    ]
    write_csv(folder / "predictions.csv", rows, list(rows[0]))
    rows = [
        {"case_id": case, "fold": fold} | rounded(outcome.columns(of, said))
        for case, fold, of, said in zip(
            cases.cases, cases.folds.tolist(), cases.truth, cases.scores, strict=True
        )
    ]
    write_csv(folder / "cases.csv", rows, list(rows[0]))


def write_history(folder: Path, history: np.ndarray) -> None:
    """history.csv from (f, epochs, 2) training and validation losses."""
    rows = [
        {"fold": fold, "epoch": epoch, "loss": rounded(loss), "validation_loss": rounded(held_out)}
        for fold, losses in enumerate(history.tolist())
        for epoch, (loss, held_out) in enumerate(losses)
    ]
    write_csv(folder / "history.csv", rows, ["fold", "epoch", "loss", "validation_loss"])


def write_sweep(
    folder: Path, tried: list[dict[str, float]], losses: np.ndarray, best: np.ndarray
) -> None:
    """sweep.csv: what each of `tried` came to on the validation part of each fold, losses (f, tried), best (f,)."""
    rows = [
        {"fold": fold, **candidate, "validation_loss": rounded(loss), "chosen": int(i == one)}
        for fold, (each, one) in enumerate(zip(losses.tolist(), best.tolist(), strict=True))
        for i, (candidate, loss) in enumerate(zip(tried, each, strict=True))
    ]
    write_csv(folder / "sweep.csv", rows, list(rows[0]))


def write_attention(
    folder: Path, bags: list[MilBag], pairs: np.ndarray, attention: list[np.ndarray]
) -> None:
    """attention/<slide>.h5, by the first model that tested the slide; sums to one over its bag."""
    first = {b: i for i, b in reversed(list(enumerate(pairs[:, 1].tolist())))}
    for b, i in first.items():
        ends = np.cumsum([len(slide.features) for slide in bags[b].slides])
        for slide, part in zip(bags[b].slides, np.split(attention[i], ends[:-1]), strict=True):
            with h5py.File(folder / "attention" / f"{slide.slide_id}.h5", "w") as file:
                file.create_dataset("attention", data=part.astype(np.float32))
                file.create_dataset("coords", data=slide.coords).attrs.update(slide.attrs)
                file.create_dataset("kind", data=slide.kind)
                if slide.grid is not None:
                    file.create_dataset("grid", data=slide.grid)
