"""Writing files so that a killed run leaves nothing a rerun would take for done."""

from __future__ import annotations

import contextlib
import csv
import errno
import functools
import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path` (same suffix); renames it over `path` on success.

    The name holds the process (see `owner`), so that several may write the same file: the last wins.
    Works for a file or a folder; on an exception whatever was written is removed, and so is what a killed
    process of this machine left of an earlier attempt.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    start, end = f".{path.stem}.", f".tmp{path.suffix}"
    unfinished = temporary(path, owner())
    for left in path.parent.glob(f"{glob.escape(start)}*{glob.escape(end)}"):
        if ended(left.name[len(start) : len(left.name) - len(end)]):
            _remove(left)
    try:
        yield unfinished
        if path.is_dir() and unfinished.is_dir():
            shutil.rmtree(path)
        os.replace(unfinished, path)
    finally:
        _remove(unfinished)


def temporary(path: Path, owner: str) -> Path:
    """What process `owner` calls a file or folder that it has not finished."""
    return path.with_name(f".{path.stem}.{owner}.tmp{path.suffix}")


def listed(folder: str | os.PathLike[str], suffix: str) -> list[Path]:
    """What a folder holds of this suffix, by name, but for what `temporary` names: others may be writing."""
    return sorted(path for path in Path(folder).glob(f"*{suffix}") if path.name[0] != ".")


@contextlib.contextmanager
def full_disk_told(path: str | os.PathLike[str]) -> Iterator[None]:
    """A full disk, or quota, as an OSError with its number; HDF5 and ArrayRecord have it in words only."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        for number in (errno.ENOSPC, errno.EDQUOT):
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), str(path)) from error
        raise


# --- who writes


def owner() -> str:
    """This process's name among all that may share a folder: <place>-<pid>-<random>.

    Containers of one hostname number their processes each from 1, and numbers are given again: neither
    host nor number tells who it is.
    """
    return _owner(os.getpid())


@functools.lru_cache(maxsize=1)
def _owner(process: int) -> str:  # by number, so that a fork has its own
    return f"{_place()}-{process}-{secrets.token_hex(4)}"


@functools.cache
def _place() -> str:
    """Names the processes among which a number is one process: of this boot and PID namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return digest([platform.node(), boot, os.stat("/proc/self/ns/pid").st_ino])
    except OSError:  # not Linux
        return platform.node()


def ended(owner: str) -> bool:
    """Whether a process of our place has ended; of those elsewhere nothing is known: False."""
    place, _, process = owner.rpartition("-")[0].rpartition("-")
    if place != _place() or not process.isdigit() or owner == _owner(os.getpid()):
        return False
    return int(process) == os.getpid() or not alive(int(process))


def alive(process: int) -> bool:
    """Whether a process of our place (see `owner`) runs."""
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
