"""Do the exported files run where this package is not installed, and give the same features?

    python benchmarks/fresh_environments.py --export exported [--workdir work/fresh] [--torch torch==2.13.0+cpu]

Makes one virtual environment with jax alone (and flatbuffers, which jax.export reads its files with) and
one with PyTorch, timm and transformers, runs each export there on the same images, and prints the largest
difference from the features in Flax beside the largest feature. Exit 1 where one is above 1e-3 of it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import venv
from pathlib import Path

import numpy as np

from pathme_jax import encoders
from pathme_jax.encoders.patch import prepare
from pathme_jax.files import read_json

TOLERANCE = 1e-3  # of the largest feature
COUNT = 4  # images

# Each is run as `python -I -c SCRIPT <export> <images.npy> <features.npy>` and knows nothing of this package.
STABLEHLO = """
import sys, importlib.util
assert importlib.util.find_spec("pathme_jax") is None and importlib.util.find_spec("flax") is None
import jax, numpy as np
from jax import export
folder, images, out = sys.argv[1:]
program = export.deserialize(bytearray(open(f"{folder}/encoder.stablehlo", "rb").read()))
params = jax.device_put(dict(np.load(f"{folder}/params.npz")))
np.save(out, jax.jit(program.call)(params, np.load(images)))
print("jax", jax.__version__)
"""
# A torchvision built for another PyTorch does not know its own operators; timm only needs it to import.
TORCH = """
import sys, importlib.util
assert importlib.util.find_spec("pathme_jax") is None and importlib.util.find_spec("jax") is None
import numpy as np, torch
try:
    import torchvision
except RuntimeError:
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
folder, images, out = sys.argv[1:]
pixels = torch.from_numpy(np.load(images)).permute(0, 3, 1, 2)
"""
TIMM = (
    TORCH
    + """
import timm
from safetensors.torch import load_file
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
model.load_state_dict(load_file(f"{folder}/model.safetensors"), strict=True)
with torch.no_grad():
    tokens = model.forward_features(pixels)
mean = tokens[:, model.num_prefix_tokens :].mean(1)
np.save(out, torch.cat([tokens[:, 0], mean], -1).numpy())
print("torch", torch.__version__, "timm", timm.__version__)
"""
)
TRANSFORMERS = (
    TORCH
    + """
import transformers
model, told = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
assert not told["missing_keys"] and not told["unexpected_keys"], told
with torch.no_grad():
    tokens = model.eval()(pixels).last_hidden_state
mean = tokens[:, 1 + getattr(model.config, "num_register_tokens", 0) :].mean(1)
np.save(out, torch.cat([tokens[:, 0], mean], -1).numpy())
print("torch", torch.__version__, "transformers", transformers.__version__)
"""
)
SCRIPTS = {"stablehlo": STABLEHLO, "timm": TIMM, "transformers": TRANSFORMERS}


def environment(folder: Path, packages: list[str]) -> Path:
    """Its python; made anew where the folder is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        start = time.time()
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        took = time.time() - start
        print(f"{folder.name}: {', '.join(packages)} installed in {took:.0f} s", file=sys.stderr)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--export", type=Path, required=True, help="of a patch encoder")
    parser.add_argument("--workdir", type=Path, default=Path("work/fresh"))
    parser.add_argument("--torch", default="torch", help="what pip installs for PyTorch")
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    here = args.workdir.resolve()
    packages = {
        "with_jax": ["jax", "flatbuffers"],
        "with_torch": [args.torch, "timm", "transformers", "safetensors"],
    }

    encoder = encoders.load(args.export / "flax")
    definition = encoder.definition
    assert definition, "the export of a patch encoder"
    px = read_json(args.export / "export.json")["what"]["tile_px"]
    images = np.random.default_rng(0).integers(0, 256, (COUNT, px, px, 3), dtype=np.uint8)
    expected = np.asarray(encoder(images))
    np.save(here / "images.npy", images)
    np.save(here / "prepared.npy", np.asarray(prepare(images, definition.input), np.float32))

    print("| format | where | max abs difference | largest feature | s |")
    print("|---|---|---|---|---|")
    worst = 0.0
    for name, script in SCRIPTS.items():
        if not (args.export / name).exists():
            print(f"| {name} | not exported | | | |")
            continue
        kind = "with_jax" if name == "stablehlo" else "with_torch"
        python = environment(here / kind, packages[kind])
        given = here / ("images.npy" if name == "stablehlo" else "prepared.npy")
        got = here / f"{name}.npy"
        start = time.time()
        command = [python, "-I", "-c", script, (args.export / name).resolve(), given, got]
        where = subprocess.run(command, cwd=here, check=True, stdout=subprocess.PIPE, text=True)
        features = np.load(got)
        if kind == "with_torch":  # CLS beside the mean, of the parts of each image
            features = features.reshape(COUNT, -1, features.shape[-1]).mean(1)[
                :, : definition.width
            ]
        off, largest = np.abs(features - expected).max(), np.abs(expected).max()
        worst = max(worst, float(off / largest))
        took = time.time() - start
        print(f"| {name} | {where.stdout.strip()} | {off:.1e} | {largest:.2f} | {took:.1f} |")
    sys.exit(0 if worst <= TOLERANCE else 1)


if __name__ == "__main__":
    main()
