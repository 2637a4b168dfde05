"""What the pages have in common: a task's section, and how templates are filled."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from pathme_jax.files import atomic
from pathme_jax.reports import attention, evidence, plots, results, words
from pathme_jax.reports.attention import Pictures

WIDE = 5.0  # inches: wider figures scroll rather than shrink


def write(path: str | Path, template: str, **content: Any) -> None:
    """Fills a template; pictures go inside, nothing is loaded from elsewhere."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["image"] = _data_uri
    environment.globals["words"] = words
    page = environment.get_template(template).render(**content)
    with atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _data_uri(data: bytes) -> str:
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def task(
    name: str,
    folders: Mapping[str, Path],
    pictures: Pictures,
    comparisons: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """All that a page tells of a task.

    Args:
        name: of the task.
        folders: kind of bag → the task's folder in its run; figures and slides are of the last.
        pictures: of the slides.
        comparisons: rows {first, second, difference, interval, permutation_p} of two kinds of bag.
    """
    found = {bag: results.read(folder) for bag, folder in folders.items()}
    last = list(found.values())[-1]
    rows = evidence.slides(last)
    all_metrics = {bag: each.metrics for bag, each in found.items()}
    drawn = evidence.figures(found)
    return {
        "name": name,
        "bags": all_metrics,
        "last": list(found)[-1],
        "kind": last.kind,
        "measure": last.measure,
        "few": any(each["too_few_to_judge"] for each in all_metrics.values()),
        "verdict": words.verdict(name, all_metrics),
        "columns": [
            row for row in words.ROWS if any(row in each["rows"] for each in all_metrics.values())
        ],
        "further": _further(all_metrics),
        "comparisons": list(comparisons),
        "drawn": drawn,
        "figures": [image(each) for each in drawn],
        "slides": rows,
        "slide_columns": list(rows[0].cells) if rows else [],
        "wrong": sum(row.mark == "wrong" for row in rows),
        "marked": any(row.mark for row in rows),
        "shown": attention.shown(last.folder.parent / "attention", rows, pictures),
        "pictures": pictures,
        "notes": _notes(all_metrics),
    }


def image(drawn: evidence.Drawn) -> dict[str, Any]:
    """A figure as the templates draw it."""
    inches = float(drawn.figure.get_size_inches()[0])
    return {
        "name": drawn.name,
        "png": plots.encode(drawn.figure, "png"),
        "alt": drawn.alt,
        "caption": drawn.caption,
        "least": round(inches * 90) if inches > WIDE else 0,  # px below which it scrolls
    }


def _further(all_metrics: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Rows measure → texts; columns are the rows of one kind of bag, or the head's of each kind."""
    primary = next(iter(all_metrics.values()))["measure"]
    if len(all_metrics) == 1:
        rows = next(iter(all_metrics.values()))["rows"]
        columns = {name: rows[row] for row, name in words.ROWS.items() if row in rows}
    else:
        columns = {bag: each["rows"]["head"] for bag, each in all_metrics.items()}
    measures = {name: _all_measures(each) for name, each in columns.items()}
    names = {key for each in measures.values() for key in each} - {primary}
    return {
        "columns": list(columns),
        "rows": {
            words.measure_name(n): [words.further(each.get(n)) for each in measures.values()]
            for n in sorted(names, key=words.place)
        },
    }


_ALONE = ("spearman", "logrank_p", "mean_auc", "integrated_brier")  # without an interval


def _all_measures(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    alone = {key: {"value": row[key]} for key in row if key in _ALONE or key.startswith("pooled_")}
    pooled_interval = alone.pop("pooled_interval", None)
    for name, found in alone.items():
        if pooled_interval and name.startswith("pooled_"):
            found["interval"] = pooled_interval["value"]
    return {**(row.get("measures") or {}), **alone}


_LEFT_OUT = {"blank_label": "without a label", "no_label": "without a row in the label table"}


def _notes(all_metrics: Mapping[str, dict[str, Any]]) -> list[str]:
    """What was read and left out, each sentence once."""
    notes: dict[str, None] = {}
    for bag, each in all_metrics.items():
        for note in [*each.get("read", []), *each.get("folds_left_out", [])]:
            notes[str(note)] = None
        for key, told in _LEFT_OUT.items():
            ids = each.get(key) or []
            if ids:
                more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
                text = ", ".join(map(str, ids[:5]))
                notes[
                    f"{len(ids)} slide{'s' if len(ids) > 1 else ''} {told}, left out: {text}{more}"
                ] = None
        if each.get("chosen"):
            settings = [words.settings(chosen) for chosen in each["chosen"]]
            told = [
                f"{one} in {settings.count(one)} of {len(settings)} folds"
                for one in dict.fromkeys(settings)
            ]
            of = f" ({bag})" if len(all_metrics) > 1 else ""
            notes[f"Chosen by the validation loss of each fold{of}: {'; '.join(told)}"] = None
        if each.get("orphans"):
            notes[f"{each['orphans']:,} instances without a parent were left out"] = None
    return [note if note.endswith(".") else note + "." for note in notes]


def left_out(tasks: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Slides that no task could use, each once, with the reason and the cure."""
    found = {}
    for one in tasks:
        for each in one["bags"].values():
            for problem in each.get("problems", []):
                found.setdefault((problem["slide_id"], problem["reason"]), problem)
    return list(found.values())
