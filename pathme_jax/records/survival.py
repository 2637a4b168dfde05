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
from pathme_jax.records import tables
from pathme_jax.records.tables import Row

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
        folds: the user's fold columns, as `records.labels.Labels`; see `records.tables`.
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
        path: the table, see `records.tables`.
        task: endpoint (os, dss, …); "" takes the columns without one, or the only one there is.
        time, event: columns, where the names do not tell them. An event column whose name speaks of censoring
            is turned round.
        unit: days, months or years, where the time column's name does not say.
        fold_prefix: as in `records.labels.read_labels`.

    Raises:
        UserError: see `tables.open_table` and `Table.common`; columns not recognised or more than one candidate; a
            time that is not above zero; a status word not known; event and censorship that contradict each other, or
            slides of one case that do.
    """
    table = tables.open_table(path)
    task, chosen = _choose(table.path, table.columns, task, time, event)
    found_unit = _unit(table.path, chosen.time[0], unit)
    table.notes.append(_told(chosen, found_unit))
    known = table.known([*chosen.time, *chosen.event, *chosen.censored])
    times = np.array([_months(table.path, row, chosen.time[0], found_unit) for row in known])
    events = np.array([_happened(table.path, row, chosen) for row in known])
    names = [chosen.time[0], (chosen.event + chosen.censored)[0]]
    tables.one_per_case(table, known, names, list(zip(times, events, strict=True)))
    return Survival(task=task, time=times, event=events, **table.common(known, fold_prefix))


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


def _months(path: Path, row: Row, column: str, unit: str) -> float:
    value = (tables.number(row.cells[column]) or 0.0) * MONTHS[unit]
    if not 0 < value < np.inf:
        raise UserError(
            f"{path}: {column} of patient {row.case!r} (slide {row.slide!r}) is {row.cells[column]!r}",
            "Expected a time above 0; correct it, or blank both time and event to leave the patient out",
        )
    return value


def _happened(path: Path, row: Row, chosen: _Columns) -> int:
    said = {column: _status(path, row, column, YES, NO) for column in chosen.event}
    said |= {
        column: _status(path, row, column, NO_CENSORED, YES_CENSORED) for column in chosen.censored
    }
    if len(set(said.values())) > 1:
        told = " and ".join(f"{column} {row.cells[column]!r}" for column in said)
        raise UserError(
            f"{path}: patient {row.case!r} (slide {row.slide!r}) has {told}, which contradict each other",
            "An event is not censored: correct one of the columns, or remove it",
        )
    return next(iter(said.values()))


def _status(path: Path, row: Row, column: str, yes: set[str], no: set[str]) -> int:
    word = row.cells[column].lower()
    # cBioPortal writes number and word, which must agree to be understood.
    parts = [part.strip() for part in word.split(":")]
    for value, known in ((1, yes), (0, no)):
        if all(part in known for part in parts):
            return value
    raise UserError(
        f"{path}: {column} of patient {row.case!r} (slide {row.slide!r}) is {row.cells[column]!r}",
        f"Expected one of {', '.join(sorted(yes | no))}",
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
