"""Survival tables: whatever a tool calls its columns, time in months and event 1 where it happened.

    survival_months, censorship            MCAT, PORPOISE, SurvPath        censorship 1: not happened
    os_survival_days, os_censorship        PANTHER, MMP                    the same, in days; dss_, dfi_, pfi_ too
    <task>_days, <task>_event              Patho-Bench                     event 1: happened
    <any>, status words                    STAMP, LRMIL, cBioPortal        dead, alive, 1:DECEASED, …

Columns are known by the words in their names; what remains of a name is its endpoint (`os` of `os_censorship`, `dss` of
`survival_months_dss`). What was recognised is told in `notes`; what is not certain is refused.
"""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path

import numpy as np

from pathme_jax.errors import UserError
from pathme_jax.records import labels

MONTH = 365.25 / 12  # days
MONTHS = {"days": 1 / MONTH, "months": 1.0, "years": 12.0}
TIME, CENSORED = {"time"}, {"censorship", "censored", "censoring", "censor"}
EVENT = {"event", "status"}
FILLERS = {"survival", "vital", "label", "follow", "up", "followup"}
YES = {"1", "1.0", "true", "yes", "event", "dead", "deceased", "died", "uncensored"}
NO = {"0", "0.0", "false", "no", "alive", "living", "censored"}
YES_CENSORED = {"1", "1.0", "true", "yes", "alive", "living", "censored"}
NO_CENSORED = {"0", "0.0", "false", "no", "event", "dead", "deceased", "died", "uncensored"}


@dataclasses.dataclass
class Survival:
    """The slides with a known time, in the order of their ids; all slides of a case share one.

    Attributes:
        task: the endpoint.
        time: (n,) months; event: (n,) int, 1 happened, 0 censored.
        slide_ids, case_ids: (n,) text.
        folds: the user's fold columns, as `records.labels.Labels`.
        unlabelled: slides of the table with neither time nor event.
        notes: which columns were taken for what, for the user to see.
    """

    task: str
    time: np.ndarray
    event: np.ndarray
    slide_ids: list[str]
    case_ids: list[str]
    folds: dict[str, list[str]]
    unlabelled: list[str]
    notes: list[str]


@dataclasses.dataclass
class _Columns:
    """One endpoint's columns by what they hold."""

    time: list[str] = dataclasses.field(default_factory=list)
    event: list[str] = dataclasses.field(default_factory=list)
    censored: list[str] = dataclasses.field(default_factory=list)


def read_survival(
    path: str | Path,
    task: str = "",
    *,
    time: str | None = None,
    event: str | None = None,
    unit: str | None = None,
    fold_prefix: str = "fold_",
) -> Survival:
    """Reads one endpoint of a table with one row a slide.

    Args:
        path: CSV, or TSV by its suffix.
        task: endpoint (os, dss, …); "" takes the columns without one, or the only one there is.
        time, event: columns, where the names do not tell them. An event column whose name speaks of censoring
            is turned round.
        unit: days, months or years, where the time column's name does not say.
        fold_prefix: as in `records.labels.read_labels`.

    Raises:
        UserError: columns not recognised or more than one candidate; a time that is not above zero; a status word not
            known; event and censorship that contradict each other, or slides of one case that do.
    """
    path = Path(path)
    rows, names = labels.read(path)
    notes: list[str] = []
    case = labels.find(names, labels.CASE_COLUMNS, notes)
    slide = labels.find(names, labels.SLIDE_COLUMNS, notes)
    if case is None and slide is None:
        raise UserError(
            f"{path}: neither a case nor a slide column among {', '.join(names)}",
            f"Name them {labels.CASE_COLUMNS[0]} and {labels.SLIDE_COLUMNS[0]}",
        )
    for row in rows:
        row["/slide"] = labels.stem(row[slide or case or ""])
        row["/case"] = row[case] if case else row["/slide"]
    rows = sorted((row for row in rows if row["/slide"]), key=lambda row: row["/slide"])
    labels.no_duplicates(path, [row["/slide"] for row in rows])

    task, chosen = _choose(path, names, task, time, event)
    found_unit = _unit(path, chosen.time[0], unit)
    notes.append(_told(chosen, found_unit))
    used = chosen.time + chosen.event + chosen.censored
    blank = [row for row in rows if all(row[c].lower() in labels.MISSING for c in used)]
    known = [row for row in rows if not all(row[c].lower() in labels.MISSING for c in used)]
    if not known:
        raise UserError(f"{path}: {', '.join(used)} are blank in every row", "Fill in the times")
    times = np.array([_months(path, row, chosen.time[0], found_unit) for row in known])
    events = np.array([_happened(path, row, chosen) for row in known])
    _one_per_case(path, known, times, events)
    return Survival(
        task=task,
        time=times,
        event=events,
        slide_ids=[row["/slide"] for row in known],
        case_ids=[row["/case"] for row in known],
        folds=labels.fold_columns(path, known, names, fold_prefix),
        unlabelled=[row["/slide"] for row in blank],
        notes=notes,
    )


def endpoints(names: list[str]) -> dict[str, _Columns]:
    """Endpoint to its columns, where both a time and an event column were recognised."""
    found: dict[str, _Columns] = collections.defaultdict(_Columns)
    for name in names:
        words = name.lower().split("_")
        for kind, key in (("time", TIME | set(MONTHS)), ("censored", CENSORED), ("event", EVENT)):
            if key & set(words):
                rest = "_".join(word for word in words if word not in key | FILLERS)
                getattr(found[rest], kind).append(name)
                break
    return {e: c for e, c in found.items() if c.time and (c.event or c.censored)}


def _choose(
    path: Path, names: list[str], task: str, time: str | None, event: str | None
) -> tuple[str, _Columns]:
    for name in filter(None, (time, event)):
        if name not in names:
            raise UserError(f"{path}: no column {name!r}", f"Available: {', '.join(names)}")
    there = endpoints(names)
    if not task and "" not in there and len(there) == 1:
        task = next(iter(there))
    chosen = there.get(task.lower(), _Columns())
    if time:
        chosen = dataclasses.replace(chosen, time=[time])
    if event:
        turned = bool(CENSORED & set(event.lower().split("_")))
        chosen = _Columns(chosen.time, [] if turned else [event], [event] if turned else [])
    if not chosen.time or not (chosen.event or chosen.censored):
        missing = "event or censorship" if chosen.time else "time"
        raise UserError(
            f"{path}: no {missing} column recognised for endpoint {task!r} among {', '.join(names)}",
            f"Endpoints recognised: {', '.join(repr(e) for e in there) or 'none'}; or name the time and event columns",
        )
    for kind in ("time", "event", "censored"):
        several = getattr(chosen, kind)
        if len(several) > 1:
            raise UserError(
                f"{path}: {' and '.join(several)} could all be the {kind} column of {task!r}",
                "Name the time and event columns to use",
            )
    return task, chosen


def _unit(path: Path, column: str, unit: str | None) -> str:
    said = [word for word in column.lower().split("_") if word in MONTHS]
    if unit is not None and unit not in MONTHS:
        raise UserError(f"unit of time is {unit!r}", f"Expected {', '.join(MONTHS)}")
    if unit and said and said[0] != unit:
        raise UserError(
            f"{path}: column {column!r} says {said[0]}, but the unit given is {unit}",
            "Give the one that is right",
        )
    if not unit and len(said) != 1:
        raise UserError(
            f"{path}: column {column!r} does not say whether it holds days, months or years",
            "Give the unit, or end the column's name in _days, _months or _years",
        )
    return unit or said[0]


def _told(chosen: _Columns, unit: str) -> str:
    time = chosen.time[0] + ("" if unit == "months" else f", {unit} -> months")
    event = chosen.event[0] if chosen.event else f"1 - {chosen.censored[0]}"
    both = f" ({chosen.censored[0]} agrees)" if chosen.event and chosen.censored else ""
    return f"time: {time}; event: {event}{both}"


def _months(path: Path, row: dict[str, str], column: str, unit: str) -> float:
    try:
        value = float(row[column])
    except ValueError:
        value = float("nan")
    if not (np.isfinite(value) and value > 0):
        raise UserError(
            f"{path}: {column} of patient {row['/case']!r} (slide {row['/slide']!r}) is {row[column]!r}",
            "Expected a time above 0; correct it, or blank both time and event to leave the patient out",
        )
    return value * MONTHS[unit]


def _happened(path: Path, row: dict[str, str], chosen: _Columns) -> int:
    said = {column: _status(path, row, column, YES, NO) for column in chosen.event}
    said |= {
        column: _status(path, row, column, NO_CENSORED, YES_CENSORED) for column in chosen.censored
    }
    if len(set(said.values())) > 1:
        told = " and ".join(f"{column} {row[column]!r}" for column in said)
        raise UserError(
            f"{path}: patient {row['/case']!r} (slide {row['/slide']!r}) has {told}, which contradict each other",
            "An event is not censored: correct one of the columns, or remove it",
        )
    return next(iter(said.values()))


def _status(path: Path, row: dict[str, str], column: str, yes: set[str], no: set[str]) -> int:
    word = row[column].lower()
    # cBioPortal writes number and word, which must agree to be understood.
    parts = [part.strip() for part in word.split(":")]
    for value, known in ((1, yes), (0, no)):
        if all(part in known for part in parts):
            return value
    raise UserError(
        f"{path}: {column} of patient {row['/case']!r} (slide {row['/slide']!r}) is {row[column]!r}",
        f"Expected one of {', '.join(sorted(yes | no))}",
    )


def _one_per_case(
    path: Path, rows: list[dict[str, str]], time: np.ndarray, event: np.ndarray
) -> None:
    seen: dict[str, tuple[float, int]] = {}
    for row, t, e in zip(rows, time.tolist(), event.tolist(), strict=True):
        if seen.setdefault(row["/case"], (t, e)) != (t, e):
            first = seen[row["/case"]]
            raise UserError(
                f"{path}: patient {row['/case']!r} has time {first[0]:g} months, event {first[1]} on one slide and "
                f"{t:g}, {e} on another",
                "Give all slides of a patient one time and event",
            )


def quantile_edges(time: np.ndarray, event: np.ndarray, bins: int = 4) -> np.ndarray:
    """(bins + 1,) edges of time bins: quantiles of the uncensored times (SurvPath), from 0 to the latest time.

    Args:
        time, event: (n,) of the TRAINING part only, one row a patient; others would leak its times into the edges.

    Raises:
        UserError: so few or so tied events that a bin would be empty of them.
    """
    happened = time[np.asarray(event) > 0]
    inner = np.quantile(happened, np.arange(1, bins) / bins) if len(happened) else np.array([])
    edges = np.concatenate([[0.0], inner, [float(np.max(time, initial=0))]])
    filled = np.bincount(bin_of(happened, edges), minlength=bins) if len(happened) else [0]
    if len(edges) != bins + 1 or not np.all(filled) or np.any(np.diff(edges[:-1]) <= 0):
        raise UserError(
            f"{len(happened)} events at {len(np.unique(happened))} distinct times do not fill {bins} time bins",
            "Use fewer bins, or the Cox loss, which needs none",
        )
    return edges


def bin_of(time: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """(n,) int bin of each time; a bin holds its left edge, the last one all later times."""
    return np.searchsorted(edges[1:-1], time, side="right")
