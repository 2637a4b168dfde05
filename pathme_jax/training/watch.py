"""Watching a run: its log, its curves, and the speed its devices could reach.

    python -m pathme_jax.training.watch WORKDIR      draws WORKDIR/curves.png, while it runs or after

<workdir>/metrics.jsonl    a line a logged step, the same for a resumed run
<workdir>/timing.jsonl     images/s, share of time waiting for data, TFLOP/s, MFU
<workdir>/alarms.jsonl     what looked wrong
<workdir>/events.*         the first two for TensorBoard: `tensorboard --logdir WORKDIR`
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from pathme_jax.errors import UserError, launcher
from pathme_jax.files import atomic
from pathme_jax.training.alarms import Alarm

# Generated classes, which a type checker cannot see.
Event, SessionLog = event_pb2.Event, event_pb2.SessionLog  # pyright: ignore[reportAttributeAccessIssue]
Summary = summary_pb2.Summary  # pyright: ignore[reportAttributeAccessIssue]

# ---- speed -----------------------------------------------------------------------------------------

# Dense bf16 peak of one JAX device in FLOP/s, by its `device_kind`; the first match counts. From the makers' data
# sheets, without sparsity. A TPU v2, v3 and v7x chip is two devices; V100 and T4 have fp16 only.
PEAKS = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("(H200|H100).*NVL", 835e12),
    ("H100.*PCIe", 756e12),
    ("(H100|H200|GH200)", 989e12),
    ("(A100|A800)", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("V100", 125e12),
    ("T4", 65e12),
    ("TPU ?v?7x?", 1153.5e12),
    ("TPU v6( lite|e)", 918e12),
    ("TPU v5( lite|e)", 197e12),
    ("TPU v5p?", 459e12),
    ("TPU v4", 275e12),
    ("TPU v3", 61.5e12),
    ("TPU v2", 22.5e12),
)


def peak_flops(device: Any) -> float | None:
    """Dense bf16 FLOP/s of a `jax.Device`, or None where it is not known: then there is no MFU to report."""
    found = (peak for kind, peak in PEAKS if re.search(rf"\b{kind}\b", device.device_kind))
    return next(found, None)


# ---- log -------------------------------------------------------------------------------------------


class Log:
    """JSON lines and TensorBoard events of one run; only process 0 writes.

    Opening it drops what is logged for `first` and later steps, so that a resumed run has no line twice, and
    a line that a kill cut short. Every line is on disk when `write` returns.
    """

    def __init__(self, workdir: str | Path, first: int, process: int = 0):
        """
        Args:
            first: the step to be run next.
            process: `jax.process_index()`.

        Raises:
            OSError: ENOSPC where the disk is full; likewise `write`.
        """
        self.workdir, self.writes = Path(workdir), process == 0
        if not self.writes:
            return
        self.workdir.mkdir(parents=True, exist_ok=True)
        for name in ("metrics", "timing", "alarms"):
            path = self.workdir / f"{name}.jsonl"
            lines = path.read_text().splitlines() if path.exists() else []
            # A run that starts anew keeps nothing, not even the line of step -1: its untrained encoder.
            kept = [line for line in lines if first and _step_of(line) < first]
            with atomic(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept))
        # Only TensorBoard's record format is used: its own writer, and tensorboardX's, write from a thread, which a
        # full disk ends without a word while training waits for it for ever; and tensorboardX imports torch.
        name = f"events.out.tfevents.{time.time_ns()}"
        self.events = RecordWriter(open(self.workdir / name, "xb"))
        self._event(file_version="brain.Event:2")
        # Tells TensorBoard to forget what an earlier process logged from here on.
        start = SessionLog(status=SessionLog.START)
        self._event(step=first or -1, session_log=start)

    def write(
        self,
        step: int,
        metrics: Mapping[str, float],
        timing: Mapping[str, float],
        alarms: Sequence[Alarm] = (),
    ) -> None:
        """Logs a step, which may be logged again with other names.

        `metrics` must not depend on the machine or the hour; what does goes into `timing`.
        """
        if not self.writes:
            return
        values = {}
        for name, row in (("metrics", metrics), ("timing", timing)):
            rounded = {key: float(f"{value:.6g}") for key, value in row.items()}
            if row:
                self._append(name, {"step": step, **rounded})
            values |= rounded
        for alarm in alarms:
            self._append("alarms", {"step": step, **dataclasses.asdict(alarm)})
        scalars = [Summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        self._event(step=step, summary=Summary(value=scalars))

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        with open(self.workdir / f"{name}.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _event(self, **content: Any) -> None:
        self.events.write(Event(wall_time=time.time(), **content).SerializeToString())
        self.events.flush()

    def close(self) -> None:
        if self.writes:
            self.events.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):  # a line cut short by a kill
        return float("inf")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; none where there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if math.isfinite(_step_of(line))]


# ---- curves ----------------------------------------------------------------------------------------


def curves(workdir: str | Path) -> Path:
    """Draws <workdir>/curves.png from the JSON lines.

    Raises:
        UserError: nothing is logged there.
    """
    from matplotlib.figure import Figure  # not needed to train

    workdir = Path(workdir)
    rows = read_log(workdir / "metrics.jsonl") + read_log(workdir / "timing.jsonl")
    if not rows:
        raise UserError(
            f"{workdir}: no metrics.jsonl with a logged step",
            "Give the --workdir of a training run that has begun",
        )
    names = sorted({name for row in rows for name in row} - {"step"})
    panels = _panels(names)
    lines = -(-len(panels) // 3)
    figure = Figure(figsize=(13, 2.9 * lines + 0.4), layout="constrained")
    cells = figure.subplots(lines, 3, squeeze=False).ravel()
    for axes, (title, scale, wanted) in zip(cells, panels, strict=False):
        for name, label in wanted.items():
            _draw(axes, label, [(row["step"], row[name]) for row in rows if name in row])
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_yscale(scale)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(linewidth=0.4, alpha=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        if len(wanted) > 1:
            axes.legend(fontsize=7, framealpha=0.7, edgecolor="none")
    for axes in cells[len(panels) :]:
        axes.set_axis_off()
    given = collections.Counter(row["name"] for row in read_log(workdir / "alarms.jsonl"))
    told = ", ".join(f"{name} {count}x" for name, count in given.items()) or "none"
    last = max(row["step"] for row in rows)
    figure.suptitle(f"{workdir.resolve().name}, step {last}; alarms: {told}", fontsize=11)
    with atomic(workdir / "curves.png") as temporary:
        figure.savefig(temporary, dpi=110)
    return workdir / "curves.png"


def _draw(axes: Any, label: str, points: Sequence[tuple[int, float]]) -> None:
    """A line over the steps; what does not change, chance and mean colour, as a level."""
    if label == "chance":
        axes.axhline(points[0][1], color="grey", linestyle=":", label=label)
    elif label.startswith("mean_rgb/"):  # in the colour of the probe it stands beside
        colour = "C0" if "/knn" in label else "C1"
        axes.axhline(points[0][1], color=colour, linestyle="--", linewidth=1, label=label)
    else:
        marker = "." if len(points) < 30 else None
        axes.plot(*zip(*points, strict=True), label=label, linewidth=1.1, marker=marker)


def _panels(names: Sequence[str]) -> list[tuple[str, str, dict[str, str]]]:
    """(title, y scale, {logged name: label}) of the panels that have something to draw."""
    panels = [
        ("loss", "linear", {n: n for n in names if n == "loss" or n.startswith("loss/")}),
        ("teacher entropy, nats", "linear", {n: n for n in names if n == "teacher_entropy"}),
        (
            "collapse: 0 is ill, 1 is well",
            "linear",
            {n: n for n in names if n in ("prototype_usage", "feature_std")},
        ),
        ("norms", "log", {n: n for n in names if n.endswith("_norm")}),
        ("learning rate", "linear", {n: n for n in names if n == "lr"}),
    ]
    for probed in sorted({n.split("/")[1] for n in names if n.startswith("probe/")}):
        start = f"probe/{probed}/"
        mine = {n: n[len(start) :] for n in names if n.startswith(start)}
        for kind in ("accuracy", "auroc"):
            # The baseline's chance is the probe's.
            wanted = {n: s for n, s in mine.items() if s.endswith(kind)}
            wanted |= {n: s for n, s in mine.items() if s == "chance" and kind == "accuracy"}
            panels.append((f"probe of {probed}: {kind}", "linear", wanted))
    panels += [
        ("samples/s", "linear", {n: n for n in names if n == "samples_per_second"}),
        ("shares of time and peak", "linear", {n: n for n in names if n in ("data_wait", "mfu")}),
        ("TFLOP/s per device", "linear", {n: n for n in names if n == "tflops_per_device"}),
    ]
    return [panel for panel in panels if panel[2]]


@launcher
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pathme_jax.training.watch",
        description="Draws curves.png from what a training run has logged so far.",
    )
    parser.add_argument("workdir", help="--workdir of the run")
    print(curves(parser.parse_args(argv).workdir))


if __name__ == "__main__":
    main()
