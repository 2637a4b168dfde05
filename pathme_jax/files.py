"""Writing files so that a killed run leaves nothing a rerun would take for done."""

from __future__ import annotations

import contextlib
import csv
import functools
import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path` (same suffix); renames it over `path` on success.

    The name holds host and process, so that several may write the same file: the last wins. Works for
    a file or a folder; on an exception whatever was written is removed, and so is what a killed process
    of this host left of an earlier attempt.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    start, end = f".{path.stem}.{platform.node()}-", f".tmp{path.suffix}"
    unfinished = temporary(path, f"{platform.node()}-{os.getpid()}")
    for left in path.parent.glob(f"{glob.escape(start)}*{glob.escape(end)}"):
        process = left.name[len(start) : len(left.name) - len(end)]
        if not process.isdigit() or int(process) == os.getpid() or not alive(int(process)):
            _remove(left)
    try:
        yield unfinished
        if path.is_dir() and unfinished.is_dir():
            shutil.rmtree(path)
        os.replace(unfinished, path)
    finally:
        _remove(unfinished)


def temporary(path: Path, owner: str) -> Path:
    """What process `owner`, <host>-<pid>, calls a file or folder that it has not finished."""
    return path.with_name(f".{path.stem}.{owner}.tmp{path.suffix}")


def alive(process: int) -> bool:
    """Whether a process of this host runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    return json.loads(Path(path).read_text())


def write_csv(
    path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]], columns: list[str]
) -> None:
    with atomic(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def digest(content: Any) -> str:
    """Eight hex digits naming a recipe: any JSON-able content, whatever the order of its keys."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@functools.cache
def provenance() -> dict[str, Any]:
    """Versions, commit and platform, saved beside every output."""
    versions = {}
    for name in ("pathme_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "versions": versions,
        "commit": _commit(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _commit() -> str:
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"
