"""From a released file to a folder: what `python -m pathme_jax.convert` does."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pathme_jax.encoders import encoder, patch, released, weight_files, zoo
from pathme_jax.errors import UserError
from pathme_jax.files import read_json


@dataclasses.dataclass(frozen=True)
class Converted:
    """What a conversion found.

    Attributes:
        name: `<encoder>-<hash8>`; "" where nothing was written.
        parameters: of the encoder, as published; dropped: keys of the file that no feature needs.
        outcome: "written", "there already" or "dry run".
    """

    definition: zoo.Definition
    out: Path
    name: str
    parameters: int
    dropped: int
    outcome: str

    def words(self) -> str:
        """For the terminal: what it is, under which terms, how to load it."""
        definition = self.definition
        lines = [
            f"{self.name or definition.name}: {self.parameters:,} parameters, {self.dropped} keys of"
            f" the file not needed ({self.outcome})",
            f"licence: {definition.licence}",
        ]
        if definition.terms:
            lines.append(f"terms: {definition.terms}")
        if self.outcome != "dry run":
            lines += [
                f"folder: {self.out}",
                "",
                "from pathme_jax import encoders",
                f'encoder = encoders.load("{self.out}")',
                f"features = encoder(images)  # (b, h, w, 3) uint8 to (b, {definition.width})",
            ]
        return "\n".join(lines)


def convert(name: str, weights: Path, out: Path, *, dry_run: bool = False) -> Converted:
    """Converts one encoder; does nothing where `out` holds this encoder from the same file.

    Raises:
        UserError: no such encoder; weights that are not its own, damaged or unsafe; `out` is something
            else.
    """
    definition = zoo.find(name)
    files = weight_files.files_of(weights)
    if weights.is_dir():
        weight_files.check_config(weights, definition)
    sha = weight_files.fingerprint(files)
    before = _before(out, definition, sha)
    if before is not None and not dry_run:
        return Converted(
            definition,
            out,
            before["name"],
            before["parameters"],
            before["dropped"],
            "there already",
        )
    state = weight_files.read(files)
    dropped = sum(released.is_unused(key, definition) for key in state)
    params = released.to_params(state, definition, str(weights))
    parameters = patch.released_parameters(definition)
    if dry_run:
        return Converted(definition, out, "", parameters, dropped, "dry run")
    made_from = {
        "name": definition.name,
        "licence": definition.licence,
        "terms": definition.terms,
        "source": definition.source,
        "sha256": sha,
    }
    saved = encoder.save(
        out, definition, params, made_from=[made_from], parameters=parameters, dropped=dropped
    )
    return Converted(definition, out, saved, parameters, dropped, "written")


def _before(out: Path, definition: zoo.Definition, sha: str) -> dict[str, Any] | None:
    """encoder.json of an earlier conversion of the same file; None where nothing is there yet."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        about = read_json(out / encoder.ABOUT)
        same = encoder.read_definition(about["definition"]) == definition
        if same and about["made_from"][0]["sha256"] == sha and (out / encoder.PARAMS).is_file():
            return about
        what = f"holds {about['name']}, from another file or an older definition"
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        what = "is no encoder's folder"
    raise UserError(f"--out {out} {what}", "Give another folder, or remove this one")
