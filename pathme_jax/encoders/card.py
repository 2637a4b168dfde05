"""The model card of an export. Every value is recorded somewhere; what is not, the card says so."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from pathme_jax.encoders.encoder import FIXED, Encoder
from pathme_jax.errors import UserError
from pathme_jax.files import provenance

if TYPE_CHECKING:
    from pathme_jax.encoders.exporting import Exportable

UNSPECIFIED = "unspecified"
UNKNOWN = "not recorded"
# Licences whose name says that they restrict use; others do in their `terms`.
RESTRICTIVE = re.compile(r"\b(nc|nd)\b|non-?commercial|no.?deriv|unclear", re.IGNORECASE)
SPDX = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")
HUB = re.compile(r"[\w.-]+/[\w.-]+")
FFN = {"mlp": "GELU MLP", "swiglu": "SwiGLU"}
OUTPUT = {
    "cls": "the CLS token after the last LayerNorm",
    "cls+mean": "the CLS token beside the mean of the patch tokens, after the last LayerNorm",
    "pooler": "an attentional pooler over every token",
}


# ---- what is recorded ------------------------------------------------------------------------------


def home(folder: Path) -> Path:
    """A run's work folder, from itself or from its `best`."""
    return folder if (folder / "config.json").exists() else folder.parent


def history(folder: Path, encoder: Encoder) -> dict[str, Any]:
    """How the weights came about: {"step", "identity", "metrics", "provenance"}; {} where not recorded.

    metrics: {"step", "values", "first"}: the probe of that step, or the last before it, and the one
        before training.
    """
    about = encoder.about
    if "history" in about:  # an export tells its own on
        return dict(about["history"])
    if "identity" not in about:
        return {}
    metrics = home(folder) / "metrics.jsonl"
    return {
        "step": about["step"],
        "identity": about["identity"],
        "metrics": _metrics(metrics, about["step"]) if metrics.exists() else {},
        "provenance": about["provenance"],
    }


def _metrics(path: Path, step: int) -> dict[str, Any]:
    """A line of step n tells of the state after that step's update; that of step -1 of the first one."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    probes = [
        row for row in rows if row["step"] < step and any(k.startswith("probe/") for k in row)
    ]
    if not probes:
        return {}
    first = next((row for row in probes if row["step"] == -1), {})
    last = max(probes, key=lambda row: row["step"])
    return {"step": last["step"] + 1, "values": _values(last), "first": _values(first)}


def _values(row: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in row.items() if k.startswith("probe/")}


def warnings(made_from: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each teacher, expert or base whose licence or terms restrict use, or are not known."""
    lines = []
    for one in made_from:
        licence, terms = _licence_of(one, made_from), one.get("terms")
        if one["name"] in FIXED:  # computed, without weights
            continue
        if not licence:
            lines.append(f"{one['name']}: its licence is {UNKNOWN}; find out before you share this")
        elif terms or RESTRICTIVE.search(licence):
            lines.append(f"{one['name']} ({licence}){f': {terms}' if terms else ''}")
    return lines


def _licence_of(one: Mapping[str, Any], made_from: Sequence[Mapping[str, Any]]) -> str:
    """As recorded; a converted encoder, `<name>-<hash8>`, has that of <name>, where this is listed too."""
    base = one["name"].rpartition("-")[0]
    listed = any(other["name"] == base and other.get("licence") for other in made_from)
    return one.get("licence") or (f"see {base}" if listed else "")


def check_licence(name: str) -> None:
    """Raises UserError where it cannot be an SPDX name."""
    if name and not SPDX.fullmatch(name):
        raise UserError(
            f"--licence {name!r} is no SPDX name",
            "Give one such as Apache-2.0, CC-BY-NC-4.0 or LicenseRef-ours",
        )


# ---- the text --------------------------------------------------------------------------------------


def text(
    model: Exportable, history: Mapping[str, Any], *, formats: Sequence[str], licence: str
) -> str:
    """README.md, with the front matter Hugging Face reads."""
    encoder = model.encoder
    sections = {
        "": [_front_matter(encoder, formats, licence), f"# {model.name}", _summary(model)],
        "Input and output": [_table(_input_rows(model))],
        "Use": [_use(model, name) for name in formats],
        "Made from": [_made_from(encoder.made_from)],
        "Licence": [_licence(encoder.made_from, licence)],
        "Training": [_training(history)],
        "Metrics": [_metric_table(history.get("metrics", {}))],
        "Limits": [_limits(model, formats)],
        "Made with": [_made_with(encoder.about, history)],
    }
    parts = [
        part
        for title, content in sections.items()
        for part in ([f"## {title}"] if title else []) + content
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(encoder: Encoder, formats: Sequence[str], licence: str) -> str:
    images = encoder.record == "fields"
    lines = [f"license: {licence.lower() if licence != UNSPECIFIED else 'other'}"]
    if licence == UNSPECIFIED:
        lines.append(f"license_name: {UNSPECIFIED}")
    lines.append("library_name: pathme_jax")
    if images:
        lines.append("pipeline_tag: image-feature-extraction")
    tags = ["pathology", "histology", "feature-extraction", "jax", *formats]
    lines += ["tags:", *(f"- {tag}" for tag in tags)]
    bases = [
        str(one["source"]) for one in encoder.made_from if HUB.fullmatch(one.get("source", ""))
    ]
    if bases:
        lines += ["base_model:", *(f"- {name}" for name in dict.fromkeys(bases))]
    return "\n".join(["---", *lines, "---"])


def _summary(model: Exportable) -> str:
    count = sum(x.size for x in jax.tree.leaves(model.params))
    definition = model.definition
    if definition is None:
        read = ", ".join(f"{alias} ({column})" for alias, column in model.encoder.columns.items())
        what = f"A pathology encoder of {model.encoder.record}"
        return f"{what} with {count:,} parameters{f'. It reads {read}' if read else ''}."
    vit = definition.model
    registers = f", {vit['registers']} registers" if vit["registers"] else ""
    pooler = " and an attentional pooler" if definition.pooler else ""
    return (
        f"A pathology tile encoder: a vision transformer of {count:,} parameters (width {vit['width']},"
        f" {vit['depth']} layers, {vit['heads']} head{'' if vit['heads'] == 1 else 's'}, patches of {vit['patch']} px,"
        f" {FFN[vit['ffn']]}{registers}){pooler}. Weights and computation are float32."
    )


def _input_rows(model: Exportable) -> dict[str, str]:
    definition = model.definition
    if definition is None:
        return {name: f"{x.shape}, {x.dtype}" for name, x in model.inputs.items()} or {
            "input": UNKNOWN
        }
    how = definition.input
    steps = [f"shorter side to {how.resize} px, {how.resample}"] if how.resize else []
    steps += [f"centre crop of {how.crop} px"] if how.crop else []
    if how.part:
        steps.append(f"tiles of more than {how.part} px cut into parts of {how.part} px")
    averaged = ", averaged over the parts of a tile" if how.part else ""
    mpps = " and ".join(f"{mpp:g}" for mpp in definition.mpp)
    return {
        "µm/px it was trained at": mpps or UNKNOWN,
        "tile it was made for": f"{definition.tile_px} px",
        "tile this export is for": f"{model.tile_px} px, RGB",
        "resize and crop": "; ".join(steps) or "none",
        "the transformer sees": f"{model.side} px",
        "normalisation": f"mean {list(how.mean)}, std {list(how.std)} of RGB in [0, 1]",
        "feature": f"{definition.width} numbers: {OUTPUT[definition.output]}{averaged}",
    }


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])


def _use(model: Exportable, name: str) -> str:
    return f"### {name}\n\n{USE[name](model)}"


def _use_flax(model: Exportable) -> str:
    call = "encoder(images)  # (b, height, width, 3) uint8"
    if model.encoder.record != "fields":
        call = "encoder.encode(batch)  # see `pathme_jax.training.contract.Method.encode`"
    return _code(
        "from pathme_jax import encoders",
        'encoder = encoders.load("flax")',
        f"features = {call}",
    )


def _use_timm(model: Exportable) -> str:
    assert model.definition
    lines = [
        "import timm",
        'model = timm.create_model("local-dir:timm", pretrained=True).eval()',
        "config = timm.data.resolve_model_data_config(model)",
        "transform = timm.data.create_transform(**config, is_training=False)",
        "features = model(transform(tile)[None])  # tile: a PIL image",
    ]
    if model.definition.output == "cls+mean":
        first = 1 + model.definition.model["registers"]
        lines[-1] = "out = model(transform(tile)[None])  # tile: a PIL image"
        lines.append(f"features = torch.cat([out[:, 0], out[:, {first}:].mean(1)], -1)")
    return _code(*lines) + _of_parts(model) + _positions(model, "timm")


def _use_transformers(model: Exportable) -> str:
    assert model.definition
    lines = [
        "from transformers import AutoImageProcessor, AutoModel",
        'model = AutoModel.from_pretrained("transformers").eval()',
        'processor = AutoImageProcessor.from_pretrained("transformers")',
        'out = model(**processor(tile, return_tensors="pt"))',
        "features = out.pooler_output",
    ]
    if model.definition.output == "cls+mean":
        first = 1 + model.definition.model["registers"]
        tokens = f"out.last_hidden_state[:, {first}:].mean(1)"
        lines[-1] = f"features = torch.cat([out.pooler_output, {tokens}], -1)"
    return _code(*lines) + _of_parts(model) + _positions(model, "transformers")


def _of_parts(model: Exportable) -> str:
    assert model.definition
    part = model.definition.input.part
    if not part or model.tile_px <= part:
        return ""
    return f"\n\nThis is one part of {part} px: cut a larger tile and average its parts' features."


def _positions(model: Exportable, library: str) -> str:
    return (
        f"\n\n{library} interpolates positions by its own rule at sizes other than {model.side} px;"
        " here it is exact at this size."
    )


def _use_stablehlo(model: Exportable) -> str:
    return stablehlo_usage(model.inputs, "stablehlo/")


def stablehlo_usage(inputs: Mapping[str, Any], folder: str = "") -> str:
    """How the program is run, from the folder above `folder`."""
    if set(inputs) == {"image"}:
        given, reads = (
            "images",
            f"images {_shape(inputs['image'])}; resize and normalisation are in it",
        )
    else:
        arrays = ", ".join(f"{name} {_shape(x)}" for name, x in inputs.items())
        given, reads = "batch", f"a dictionary of {arrays}"
    code = _code(
        "import jax, numpy as np  # pip install jax flatbuffers",
        "from jax import export",
        f'file = open("{folder}encoder.stablehlo", "rb")',
        "program = export.deserialize(bytearray(file.read()))",
        f'params = jax.device_put(dict(np.load("{folder}params.npz")))',
        f"features = jax.jit(program.call)(params, {given})",
    )
    return f"{code}\n\nReads {reads}. For CPU, CUDA and TPU, any b; written with jax {jax.__version__}."


def _shape(x: Any) -> str:
    return f"({', '.join(map(str, ('b', *x.shape)))}) {x.dtype}"


USE = {
    "flax": _use_flax,
    "timm": _use_timm,
    "transformers": _use_transformers,
    "stablehlo": _use_stablehlo,
}


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _made_from(made_from: Sequence[Mapping[str, Any]]) -> str:
    if not made_from:
        return "No other encoder's weights or features are recorded."
    head = ["| encoder | licence | terms | source | sha256 |", "|---|---|---|---|---|"]
    rows = []
    for one in made_from:
        if one["name"] in FIXED:
            rows.append(f"| {one['name']} | computed, no weights | | | |")
            continue
        licence = _licence_of(one, made_from) or UNKNOWN
        source = one.get("source") or UNKNOWN
        sha = one.get("sha256") or UNKNOWN
        rows.append(f"| {one['name']} | {licence} | {one.get('terms') or ''} | {source} | {sha} |")
    return "\n".join(
        ["Weights it started from, and encoders whose features it learned from:", "", *head, *rows]
    )


def _licence(made_from: Sequence[Mapping[str, Any]], licence: str) -> str:
    said = f"Of these weights: {licence}."
    restrict = warnings(made_from)
    if not restrict:
        return said
    lines = [f"- {line}" for line in restrict]
    return "\n".join([f"{said} Their use is restricted by what they were made from:", "", *lines])


def _training(history: Mapping[str, Any]) -> str:
    if not history:
        return f"{UNKNOWN.capitalize()}."
    identity = history["identity"]
    rows = {
        "method": identity["config"].get("method", UNKNOWN),
        "steps": f"{history['step']} of {identity['config'].get('steps', UNKNOWN)}",
        "data (kind, records, hash of its recipe)": identity["data"],
    }
    for into, sha in identity.get("initial", {}).items():
        rows[f"first weights of {into} (sha256)"] = sha
    config = json.dumps(identity["config"], indent=1, sort_keys=True)
    return "\n".join(
        [
            _table(rows),
            "",
            "<details><summary>config</summary>",
            "",
            "```json",
            config,
            "```",
            "",
            "</details>",
        ]
    )


def _metric_table(metrics: Mapping[str, Any]) -> str:
    if not metrics:
        return f"{UNKNOWN.capitalize()}."
    values, first = metrics["values"], metrics["first"]
    lines = [
        f"Probes after {metrics['step']} steps, beside the first weights and mean colour:",
        "",
        "| | this | before training | mean colour |",
        "|---|---|---|---|",
    ]
    for key, value in values.items():
        probe, _, measure = key.rpartition("/")
        colour = first.get(f"{probe}/mean_rgb/{measure}")
        cells = [_number(x) for x in (value, first.get(key), colour)]
        lines.append(f"| {key.removeprefix('probe/')} | {' | '.join(cells)} |")
    if any("_by_tile/" in key for key in values):
        lines += [
            "",
            "`by_tile` tests tiles of slides seen in fitting: no measure of new patients.",
        ]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _limits(model: Exportable, formats: Sequence[str]) -> str:
    limits = ["For research; not validated for diagnosis."]
    definition = model.definition
    if definition and definition.mpp:
        mpps = ", ".join(f"{mpp:g}" for mpp in definition.mpp)
        limits.append(f"Nothing is recorded of other magnifications than {mpps} µm/px.")
    if "stablehlo" in formats and definition:
        limits.append(f"The StableHLO program takes tiles of {model.tile_px} px and no others.")
    limits.append("Nothing is recorded of stains, scanners or organs beyond the training data.")
    return "\n".join(f"- {line}" for line in limits)


def _made_with(about: Mapping[str, Any], history: Mapping[str, Any]) -> str:
    rows = {"export": _versions(provenance())}
    if history:
        rows = {"training": _versions(history["provenance"]), **rows}
    elif "provenance" in about:
        rows = {"conversion": _versions(about["provenance"]), **rows}
    return _table(rows)


def _versions(made: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return f"commit {made['commit']}, Python {made['python']}, {versions}"
