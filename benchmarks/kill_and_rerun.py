"""SIGKILL at random moments, the same command again: does it end with the figures of a run left alone?

    python benchmarks/kill_and_rerun.py --workdir work/kill [--kills 10]

Both runs use the demo with few slides and steps. The kills go round the stages tile, both trainings, the
tile extraction and the slide classifiers; each falls at a random moment of its stage, as long as that took
in the run left alone. Exit 1 where metrics.json differs.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path

from pathme_jax.files import read_json

SMALL = ["--cohort", "8", "--patch-steps", "30", "--region-steps", "30"]
STAGES = ("tile", "train the patch", "extract tile", "train the region", "cross-validate")


def start(workdir: Path, log: Path) -> subprocess.Popen:
    command = [sys.executable, "-u", "-m", "pathme_jax.demo", "--workdir", str(workdir), *SMALL]
    return subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.DEVNULL)


def reached(log: Path, stage: str) -> bool:
    return any(line.startswith("[") and stage in line for line in log.read_text().splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, default=Path("work/kill"))
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    whole, killed = args.workdir / "whole", args.workdir / "killed"
    logs = {path: path.with_suffix(".log") for path in (whole, killed)}
    assert start(whole, logs[whole]).wait() == 0, f"the uninterrupted run failed: {logs[whole]}"
    (timings,) = whole.glob("reports/*/timings.json")
    seconds = read_json(timings)["seconds"]
    print(f"uninterrupted: {sum(seconds.values()):.0f} s", flush=True)

    rng = random.Random(args.seed)
    for i in range(args.kills):
        stage = STAGES[i * len(STAGES) // args.kills]
        took = next(value for name, value in seconds.items() if stage in name)
        process = start(killed, logs[killed])
        while process.poll() is None and not reached(logs[killed], stage):
            time.sleep(0.05)
        wait = rng.uniform(0.05, 0.9) * took
        try:
            process.wait(wait)
            print(f"kill {i + 1}: {stage} had already finished", flush=True)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            now = [x for x in logs[killed].read_text().splitlines() if x.startswith("[")][-1]
            print(f"kill {i + 1}: {wait:.1f} s into {stage}, during {now}", flush=True)
    assert start(killed, logs[killed]).wait() == 0, f"the last run failed: {logs[killed]}"
    (one,), (other,) = (list(path.glob("reports/*/metrics.json")) for path in (whole, killed))
    same = one.read_bytes() == other.read_bytes()
    print("metrics.json equal:", same)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
