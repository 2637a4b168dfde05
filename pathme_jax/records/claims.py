"""Which of several processes works on a slide: one folder of small files, no server.

    <grid>/.claims/<owner>.alive     touched every BEAT seconds while that process lives
    <grid>/.claims/<slide>.<n>       names the process that claimed the slide; the highest n counts

A claim is never overwritten: whoever finds its holder dead makes the next one, and of two that try one
succeeds. Its holder removes it when the slide is done. Should a process lose a claim while it lives (it
was suspended for minutes), a slide is done twice: files are renamed into place whole, so none breaks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import itertools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from pathme_jax.files import alive, ended, owner

BEAT, STALE = 20.0, 300.0  # seconds
TRIES = 10


@dataclasses.dataclass(frozen=True)
class Claims:
    """The claims of one process and its workers.

    Attributes:
        folder: made when needed.
        owner: of the process, see `files.owner`; its workers get it with this object and claim in its name.
    """

    folder: Path
    owner: str = dataclasses.field(default_factory=owner)

    @contextlib.contextmanager
    def living(self) -> Iterator[None]:
        """Tells the others that this process lives; at the end everything it claimed is free."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(BEAT):
                with contextlib.suppress(OSError):  # the next may get through
                    self._beat(self.owner)

        self._beat(self.owner)
        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self._sweep()

    def take(self, slide_id: str) -> bool:
        """Whether the slide is this process's, now or already."""
        for path in self._generations(slide_id):
            try:
                with open(path, "x") as file:
                    file.write(self.owner)
                return True
            except FileExistsError:
                owner = _read(path)
                if owner == self.owner:
                    return True
                if owner is not None and not self._dead(owner, path):
                    return False
        raise AssertionError("generations never end")

    def held(self, slide_id: str) -> bool:
        """Whether another living process has the slide."""
        owners = self.owners(slide_id)
        if not owners or owners[-1] == self.owner:
            return False
        return not self._dead(owners[-1], self._claim(slide_id, len(owners) - 1))

    def owners(self, slide_id: str) -> list[str]:
        """Of all claims on the slide: dead ones, then who holds it."""
        found = (_read(path) for path in self._generations(slide_id))
        return list(itertools.takewhile(lambda owner: owner is not None, found))  # pyright: ignore[reportReturnType]

    def release(self, slide_id: str) -> None:
        """Gives up a slide that is this process's; another's stays."""
        owners = self.owners(slide_id)
        if owners and owners[-1] == self.owner:
            for n in range(len(owners)):
                self._claim(slide_id, n).unlink(missing_ok=True)

    def forget_workers(self) -> None:
        """Before new ones start: what `lost` tells is of these."""
        for path in self._traces():
            path.unlink(missing_ok=True)

    def reading(self, slide_id: str) -> None:
        """Said by a worker before it reads a slide, should it be the last thing it does."""
        self._trace(os.getpid()).write_text(slide_id)

    def lost(self) -> list[str]:
        """The slides that this process's dead workers were reading."""
        dead = [path for path in self._traces() if not alive(int(path.suffixes[-2][1:]))]
        return sorted({path.read_text() for path in dead})

    def _traces(self) -> list[Path]:
        return list(self.folder.glob(f"{glob.escape(self.owner)}.*.reading"))

    def _trace(self, worker: int) -> Path:
        return self.folder / f"{self.owner}.{worker}.reading"

    def _claim(self, slide_id: str, generation: int) -> Path:
        return self.folder / f"{slide_id}.{generation}"

    def _generations(self, slide_id: str) -> Iterator[Path]:
        return (self._claim(slide_id, n) for n in itertools.count())

    def _heart(self, owner: str) -> Path:
        return self.folder / f"{owner}.alive"

    def _beat(self, owner: str) -> None:
        for left in reversed(range(TRIES)):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._heart(owner).touch()
                return
            except OSError:  # another has just removed the folder, as the last to leave it
                if not left:
                    raise

    def _dead(self, owner: str, claim: Path) -> bool:
        """By its process, where numbers are ours; by its silence, anywhere: the file system's clock tells."""
        if not owner:  # its maker has opened it and not yet written, or died between
            return self._silent(claim)
        return ended(owner) or self._silent(self._heart(owner))

    def _silent(self, path: Path) -> bool:
        try:
            now = self._heart(self.owner).stat().st_mtime
        except FileNotFoundError:
            now = time.time()
        try:
            return now - path.stat().st_mtime > STALE
        except FileNotFoundError:
            return True

    def _sweep(self) -> None:
        """Removes what this process left; and where no other lives, what dead ones did."""
        paths = list(self.folder.glob("*"))
        owners = {path.stem for path in paths if path.suffix == ".alive"} - {self.owner}
        alone = all(self._dead(owner, self._heart(owner)) for owner in owners)
        for path in paths:
            if alone or self.owner in (path.stem, path.stem.rpartition(".")[0]) or self._mine(path):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another process's, or gone
            self.folder.rmdir()

    def _mine(self, path: Path) -> bool:
        return path.suffix[1:].isdigit() and _read(path) == self.owner


def _read(path: Path) -> str | None:
    """The owner that a claim names, None if there is no claim.

    One that was made this instant is waited for; "" where whoever made it died before it wrote.
    """
    for _ in range(100):
        try:
            if owner := path.read_text():
                return owner
        except FileNotFoundError:
            return None
        time.sleep(0.01)
    return ""
