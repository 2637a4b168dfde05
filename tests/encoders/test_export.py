"""Export: the same features in every format, and a card that says what is recorded."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from configs import dinov2_tiny, pathme_tiny
from pathme_jax import encoders
from pathme_jax.encoders import encoder, exporting, patch
from pathme_jax.encoders.zoo import Definition, Input
from pathme_jax.errors import UserError
from pathme_jax.export import main
from pathme_jax.files import provenance, read_json, write_json
from pathme_jax.training import checkpoints, workdir
from pathme_jax.training.contract import load_method

VIT = dict(patch=4, width=16, depth=2, heads=2, grid=4, layer_scale=0.0)
SMALL = Definition("small", VIT, Input(20, 16), "patches", "MIT", "lab/small", tile_px=24)
TEACHER = {
    "name": "strict",
    "licence": "CC-BY-NC-ND-4.0",
    "terms": "ask before distilling",
    "source": "lab/strict",
    "sha256": "ab12",
}
POOLED = dataclasses.replace(SMALL, output="pooler", pooler=dict(width=8, heads=2))
GATED = dataclasses.replace(
    SMALL,
    model={**VIT, "ffn": "swiglu", "registers": 3, "layer_scale": 1e-5, "mlp_ratio": 4.0},
    output="cls+mean",
)
# Positions of another rule than timm's and transformers', at another size than they were learned at.
ODD = dataclasses.replace(SMALL, model={**VIT, "grid": 7, "resample": "bicubic offset"})
PARTS = dataclasses.replace(SMALL, input=Input(resize=0, crop=0, part=12), tile_px=24)


def _drawn(shapes: Any) -> Any:
    """Parameters of order 1, so that every one of them shows in the features."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)


def _save(folder: Path, definition: Definition, made_from: Any = (TEACHER,)) -> Path:
    encoder.save(folder, definition, _drawn(patch.abstract(definition)), made_from=made_from)
    return folder


def _images(px: int, count: int = 3) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, px, px, 3), dtype=np.uint8)


def _run(folder: Path, config: Any, shapes: Any = None, made_from: Any = ()) -> Path:
    """The work folder of a run that trained nothing."""
    method = load_method(config)
    params, _ = jax.eval_shape(lambda: method.init(jax.random.key(0), shapes))
    product = method.product(params)
    what = workdir.identity(config, "Source(fields, 3 records, 0123abcd)", {})
    about = {"config": json.loads(config.to_json()), "identity": what, "made_from": made_from}
    write_json(folder / "config.json", about | {"provenance": provenance()})
    for home, step in ((folder, 4), (folder / "best", 2)):
        home.mkdir(exist_ok=True)
        checkpoints.write_product(home, "run", _drawn(product), step=step, identity=what)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of DINOv2, with probes at steps -1, 1 and 3."""
    where = tmp_path_factory.mktemp("runs") / "run"
    folder = _run(where, dinov2_tiny.get_config("test"), made_from=[TEACHER])
    name = "probe/organ/linear_auroc"
    rows = [
        {"step": -1, name: 0.511, "probe/organ/mean_rgb/linear_auroc": 0.622},
        {"step": 0, "loss": 8.0},
        {"step": 1, name: 0.733},
        {"step": 3, name: 0.844},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def region_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = pathme_tiny.get_config()
    config.columns.update(fine="uni_v1@20x", coarse="uni_v1@5x")
    sides = {"fine": 16, "coarse": 4} | {f"experts/{name}": 16 for name in config.columns.experts}
    shapes = {k: jax.ShapeDtypeStruct((2, side, side, 8), np.float32) for k, side in sides.items()}
    made_from = [{"name": "hed_texture"}, {"name": "uni_v1"}]
    return _run(tmp_path_factory.mktemp("runs") / "regions", config, shapes, made_from)


# ---- ours ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [".", "best"])
def test_an_exported_run_loads_and_gives_the_runs_features(place, run, tmp_path):
    exporting.export(run / place, tmp_path / "out", formats=["flax"])
    images = _images(128)
    loaded = encoders.load(tmp_path / "out" / "flax")
    np.testing.assert_allclose(
        loaded(images), encoder.load(run / place, "float32")(images), atol=1e-6
    )
    assert loaded.name.startswith("run-") and loaded.made_from == [TEACHER]


def test_a_region_encoder_loads_from_its_export_without_its_work_folder(region_run, tmp_path):
    before = encoder.load(region_run)
    batch = _regions()
    expected = before.encode(batch)["features"]
    copy = shutil.copytree(region_run, tmp_path / "copy")
    exporting.export(copy, tmp_path / "out", formats=["flax"])
    shutil.rmtree(copy)
    loaded = encoders.load(tmp_path / "out" / "flax")
    assert loaded.columns == before.columns
    np.testing.assert_array_equal(loaded.encode(batch)["features"], expected)


def _regions(count: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    batch: dict[str, np.ndarray] = {}
    for name, side in (("fine", 16), ("coarse", 4)):
        batch[name] = rng.normal(size=(count, side, side, 8)).astype(np.float32)
        batch[f"{name}_valid"] = rng.random((count, side, side)) < 0.7
    return batch


def test_an_export_of_an_export_is_the_same_encoder_with_the_same_card(run, tmp_path):
    exporting.export(run, tmp_path / "one", formats=["flax"], licence="MIT")
    exporting.export(tmp_path / "one" / "flax", tmp_path / "two", formats=["flax"], licence="MIT")
    assert (tmp_path / "one/README.md").read_text() != ""
    names = [encoders.load(tmp_path / out / "flax").name for out in ("one", "two")]
    assert names[0] == names[1]
    cards = [
        (tmp_path / out / "README.md").read_text().split("## Input")[1] for out in ("one", "two")
    ]
    assert cards[0] == cards[1]


# ---- StableHLO -------------------------------------------------------------------------------------

ALONE = """
import sys
sys.modules["pathme_jax"] = None  # importing it fails
import jax, numpy as np
from jax import export
folder = sys.argv[1]
program = export.deserialize(bytearray(open(f"{folder}/encoder.stablehlo", "rb").read()))
params = dict(np.load(f"{folder}/params.npz"))
given = dict(np.load(sys.argv[2]))
call = jax.jit(program.call)
whole = given["image"] if set(given) == {"image"} else given
first = jax.tree.map(lambda x: x[:1], whole)
out, one = call(params, whole), call(params, first)
out, one = (x["features"] if isinstance(x, dict) else x for x in (out, one))
np.savez(sys.argv[3], out=out, one=one)
"""


def _alone(folder: Path, batch: dict[str, np.ndarray], tmp_path: Path) -> tuple[Any, Any]:
    """Features of the batch and of its first sample, from a process that knows jax and numpy alone."""
    given, got = tmp_path / "given.npz", tmp_path / "got.npz"
    np.savez(given, **batch)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-I", "-c", ALONE, str(folder), str(given), str(got)]
    done = subprocess.run(
        command, cwd=elsewhere, capture_output=True, text=True, env={"JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 0, done.stderr[-1500:]
    with np.load(got) as file:
        return file["out"], file["one"]


@pytest.mark.parametrize("definition", [SMALL, POOLED, GATED, PARTS], ids=["mlp", "pooler", "gated", "parts"])  # fmt: skip
def test_the_program_runs_where_this_package_cannot_be_imported(definition, tmp_path):
    path = _save(tmp_path / "in", definition)
    exporting.export(path, tmp_path / "out", formats=["stablehlo"])
    images = _images(24)
    out, one = _alone(tmp_path / "out" / "stablehlo", {"image": images}, tmp_path)
    expected = np.asarray(encoders.load(path)(images))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(one, expected[:1], atol=1e-5)


def test_a_region_encoders_program_runs_there_too(region_run, tmp_path):
    exporting.export(region_run, tmp_path / "out", formats=["stablehlo"])
    batch = _regions()
    out, one = _alone(tmp_path / "out" / "stablehlo", batch, tmp_path)
    expected = np.asarray(encoder.load(region_run).encode(batch)["features"])
    np.testing.assert_allclose(out, expected, atol=1e-4)
    np.testing.assert_allclose(one, expected[:1], atol=1e-4)


def test_the_program_is_for_cpu_cuda_and_tpu_and_holds_no_weights(tmp_path):
    from jax import export

    wide = dataclasses.replace(SMALL, model={**VIT, "width": 256})
    exporting.export(_save(tmp_path / "in", wide), tmp_path / "out", formats=["stablehlo"])
    data = (tmp_path / "out/stablehlo/encoder.stablehlo").read_bytes()
    program = export.deserialize(bytearray(data))
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert len(data) < 100_000 < (tmp_path / "out/stablehlo/params.npz").stat().st_size


def test_another_tile_side_is_another_program(tmp_path):
    path = _save(tmp_path / "in", SMALL)
    exporting.export(path, tmp_path / "out", formats=["stablehlo"], tile_px=40)
    images = _images(40)
    out, _ = _alone(tmp_path / "out" / "stablehlo", {"image": images}, tmp_path)
    np.testing.assert_allclose(out, encoders.load(path)(images), atol=1e-5)


# ---- PyTorch ---------------------------------------------------------------------------------------

TOLD = {"mlp": SMALL, "gated": GATED, "odd": ODD, "parts": PARTS}


def _prepared(definition: Definition) -> tuple[Any, np.ndarray]:
    """Images as a PyTorch model takes them, one part each, and the features ours makes of them."""
    torch = pytest.importorskip("torch")
    how = dataclasses.replace(definition.input, resize=0, crop=0)
    images = _images(definition.input.part or definition.input.crop)
    pixels = np.array(patch.prepare(images, how)).transpose(0, 3, 1, 2)
    expected = patch.encode(
        dataclasses.replace(definition, input=how), _drawn(patch.abstract(definition)), images
    )
    return torch.from_numpy(np.ascontiguousarray(pixels)), np.asarray(expected)


@pytest.mark.parametrize("definition", TOLD.values(), ids=TOLD)
def test_timm_loads_it_strictly_and_gives_the_same_features(definition, tmp_path):
    timm, torch = _timm(), pytest.importorskip("torch")
    exporting.export(_save(tmp_path / "in", definition), tmp_path / "out", formats=["timm"])
    model = timm.create_model(f"local-dir:{tmp_path / 'out/timm'}", pretrained=True).eval()
    weights = pytest.importorskip("safetensors.torch").load_file(
        tmp_path / "out/timm/model.safetensors"
    )
    model.load_state_dict(weights, strict=True)
    pixels, expected = _prepared(definition)
    with torch.no_grad():
        out = model(pixels)
    if definition.output == "cls+mean":
        out = torch.cat([out[:, 0], out[:, 1 + definition.model["registers"] :].mean(1)], -1)
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-4)


def test_timm_reads_the_resize_crop_and_normalisation(tmp_path):
    timm = _timm()
    how = Input(20, 16, resample="bilinear antialias", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    path = _save(tmp_path / "in", dataclasses.replace(SMALL, input=how))
    exporting.export(path, tmp_path / "out", formats=["timm"])
    model = timm.create_model(f"local-dir:{tmp_path / 'out/timm'}", pretrained=True)
    assert timm.data.resolve_model_data_config(model) == {
        "input_size": [3, 16, 16],
        "interpolation": "bilinear",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "crop_pct": 0.8,
        "crop_mode": "center",
    }


@pytest.mark.parametrize("definition", TOLD.values(), ids=TOLD)
def test_transformers_loads_it_and_gives_the_same_features(definition, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    exporting.export(_save(tmp_path / "in", definition), tmp_path / "out", formats=["transformers"])
    model, told = transformers.AutoModel.from_pretrained(
        tmp_path / "out/transformers", output_loading_info=True
    )
    assert not any(told[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    registers = definition.model.get("registers", 0)
    assert type(model).__name__ == ("Dinov2WithRegistersModel" if registers else "Dinov2Model")
    pixels, expected = _prepared(definition)
    with torch.no_grad():
        out = model.eval()(pixels)
    features = out.pooler_output
    if definition.output == "cls+mean":
        mean = out.last_hidden_state[:, 1 + registers :].mean(1)
        features = torch.cat([features, mean], -1)
    np.testing.assert_allclose(features.numpy(), expected, atol=1e-4)


def _timm() -> Any:
    """timm, also beside a torchvision that was built for another PyTorch."""
    torch = pytest.importorskip("torch")
    for name in ("nms", "qnms"):
        signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        try:
            torch.library.define(f"torchvision::{name}", signature)
        except RuntimeError:  # it is there
            pass
    return pytest.importorskip("timm")


# ---- what may be exported, and where ---------------------------------------------------------------


def test_an_export_leaves_what_is_there_and_adds_what_is_not(tmp_path):
    path, out = _save(tmp_path / "in", SMALL), tmp_path / "out"
    first = exporting.export(path, out, formats=["flax"], licence="MIT")
    before = (out / "flax/encoder.json").stat().st_mtime_ns
    both = exporting.export(path, out, formats=["flax", "timm"])
    assert (first.written, both.written, both.found) == (["flax"], ["timm"], ["flax"])
    assert (out / "flax/encoder.json").stat().st_mtime_ns == before
    card = (out / "README.md").read_text()
    assert "### flax" in card and "### timm" in card and "license: mit" in card


def test_a_format_that_fails_leaves_nothing_and_a_rerun_completes(tmp_path, monkeypatch):
    path, out = _save(tmp_path / "in", SMALL), tmp_path / "out"

    def broken(model: Any, folder: Path) -> None:
        folder.mkdir()
        (folder / "half").write_text("x")
        raise OSError("disk")

    whole = exporting.FORMATS["timm"]
    monkeypatch.setitem(exporting.FORMATS, "timm", broken)
    with pytest.raises(OSError):
        exporting.export(path, out)
    assert sorted(x.name for x in out.iterdir()) == ["export.json", "flax"]
    monkeypatch.setitem(exporting.FORMATS, "timm", whole)
    assert exporting.export(path, out).written == ["timm", "transformers", "stablehlo"]


def test_another_encoders_folder_is_refused(tmp_path):
    exporting.export(_save(tmp_path / "in", SMALL), tmp_path / "out", formats=["flax"])
    other = dataclasses.replace(SMALL, input=Input(20, 16, mean=(0.0, 0.0, 0.0)))
    with pytest.raises(UserError, match="another definition"):
        exporting.export(_save(tmp_path / "other", other), tmp_path / "out", formats=["flax"])
    with pytest.raises(UserError, match="another tile_px"):
        exporting.export(tmp_path / "in", tmp_path / "out", tile_px=40)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="is there and is no export"):
        exporting.export(tmp_path / "in", tmp_path / "mine")
    assert [x.name for x in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("definition", "arguments", "expected"),
    [
        (POOLED, dict(formats=["timm"]), "timm has no attentional pooler"),
        (dataclasses.replace(SMALL, model={**VIT, "epsilon": 1e-5}), dict(formats=["timm"]), "epsilon"),
        (dataclasses.replace(SMALL, model={**VIT, "mlp_ratio": 2.5}), dict(formats=["transformers"]), "no whole multiple"),
        (SMALL, dict(formats=["onnx"]), "no format 'onnx'"),
        (SMALL, dict(licence="as you like"), "no SPDX name"),
        (PARTS, dict(tile_px=10), "do not divide into patches of 4 px"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_said_and_leaves_nothing(
    definition, arguments, expected, tmp_path
):
    path = _save(tmp_path / "in", definition)
    with pytest.raises(UserError, match=expected):
        exporting.export(path, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_region_encoder_in_timm_and_an_encoder_without_weights_are_refused(region_run, tmp_path):
    with pytest.raises(UserError, match="no ViT that reads images"):
        exporting.export(region_run, tmp_path / "out", formats=["timm"])
    with pytest.raises(UserError, match="hed_texture has no weights"):
        exporting.export("hed_texture", tmp_path / "out")


# ---- the card --------------------------------------------------------------------------------------


def test_the_card_tells_the_run_its_metrics_and_its_teachers(run, tmp_path):
    out = tmp_path / "out"
    exporting.export(run, out, formats=["flax"], licence="CC-BY-NC-4.0")
    card = (out / "README.md").read_text()
    front = card.split("---")[1]
    assert "license: cc-by-nc-4.0" in front and "- lab/strict" in front
    for said in (
        f"# {encoders.load(out / 'flax').name}\n",
        "0.5 and 2",  # µm/px
        "parts of 128 px",
        "mean [0.485, 0.456, 0.406]",
        "| 4 of 4 |",  # steps
        "Source(fields, 3 records, 0123abcd)",
        "| strict | CC-BY-NC-ND-4.0 | ask before distilling | lab/strict | ab12 |",
        "| organ/linear_auroc | 0.844 | 0.511 | 0.622 |",
        f"commit {provenance()['commit']}",
        f"jax {jax.__version__}",
    ):
        assert said in card, said
    assert str(tmp_path) not in card  # nor any path of this machine


def test_the_best_steps_card_has_that_steps_metrics(run, tmp_path):
    exporting.export(run / "best", tmp_path / "out", formats=["flax"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| organ/linear_auroc | 0.733 | 0.511 | 0.622 |" in card and "| 2 of 4 |" in card


def test_what_is_not_recorded_is_said_to_be_so(tmp_path):
    exporting.export(_save(tmp_path / "in", SMALL, made_from=()), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for title in ("Training", "Metrics"):
        assert card.split(f"## {title}\n\n")[1].startswith("Not recorded.")
    assert "license: other\nlicense_name: unspecified" in card
    assert "Of these weights: unspecified." in card


def test_every_restrictive_or_unknown_licence_gets_a_line_of_warning(region_run, tmp_path, capsys):
    free = {"name": "free", "licence": "Apache-2.0", "terms": "", "source": "lab/free"}
    converted = {
        "name": "strict-0123abcd",
        "sha256": "cd34",
    }  # says no more than its publisher's line
    asks = {**free, "name": "asks", "terms": "research use only"}
    path = _save(tmp_path / "in", SMALL, made_from=[TEACHER, converted, free, asks])
    main(["--encoder", str(path), "--out", str(tmp_path / "out"), "--formats", "flax"])
    assert capsys.readouterr().err.splitlines() == [
        "warning: made from strict (CC-BY-NC-ND-4.0): ask before distilling",
        "warning: made from asks (Apache-2.0): research use only",
    ]
    main(["--encoder", str(region_run), "--out", str(tmp_path / "regions"), "--formats", "flax"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: made from uni_v1: its licence is not recorded")


def test_the_cards_stablehlo_lines_run_as_they_stand(tmp_path):
    exporting.export(_save(tmp_path / "in", SMALL), tmp_path / "out", formats=["stablehlo"])
    card = (tmp_path / "out" / "README.md").read_text()
    code = card.split("### stablehlo")[1].split("```python\n")[1].split("```")[0]
    np.save(tmp_path / "images.npy", _images(24))
    code = f"import numpy\nimages = numpy.load({str(tmp_path / 'images.npy')!r})\n{code}"
    code += "\nprint(features.shape)"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path / "out", capture_output=True, text=True,
        env={"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.stdout.strip() == "(3, 16)", done.stderr[-800:]


def test_json_files_tell_whose_export_it_is(tmp_path):
    path = _save(tmp_path / "in", SMALL)
    exporting.export(path, tmp_path / "out", formats=["timm"])
    about = read_json(tmp_path / "out" / "export.json")
    assert about["encoder"] == encoders.load(path).name and about["what"]["tile_px"] == 24
