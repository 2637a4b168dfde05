"""SIGKILL at random moments, the same command again: does it end with the figures of a run left alone?

    python benchmarks/kill_and_rerun.py --workdir work/kill [--kills 10]

Both runs use the demo with few slides and steps. Moments are drawn over the seconds the uninterrupted run
took, so that every stage is hit; the stage that was running is printed. Exit 1 where metrics differ.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path

SMALL = ["--cohort", "8", "--patch-steps", "30", "--region-steps", "30"]


def start(workdir: Path, log: Path) -> subprocess.Popen:
    command = [sys.executable, "-u", "-m", "pathme_jax.demo", "--workdir", str(workdir), *SMALL]
    return subprocess.Popen(command, stdout=log.open("a"), stderr=subprocess.DEVNULL)


def stage(log: Path) -> str:
    return next((x for x in reversed(log.read_text().splitlines()) if x.startswith("[")), "start")


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
    began = time.monotonic()
    assert start(whole, logs[whole]).wait() == 0, f"the uninterrupted run failed: {logs[whole]}"
    seconds = time.monotonic() - began
    print(f"uninterrupted: {seconds:.0f} s", flush=True)

    # A rerun skips what is done, so kills spread over the whole run come from waits of about a tenth.
    rng = random.Random(args.seed)
    for i in range(args.kills):
        process = start(killed, logs[killed])
        try:
            process.wait(rng.uniform(0.3, 2.2) * seconds / args.kills + 8)
            print(f"kill {i + 1}: had already finished", flush=True)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            print(f"kill {i + 1}: during {stage(logs[killed])}", flush=True)
    assert start(killed, logs[killed]).wait() == 0, f"the last run failed: {logs[killed]}"
    (one,), (other,) = (list(path.glob("reports/*/metrics.json")) for path in (whole, killed))
    same = one.read_bytes() == other.read_bytes()
    print("metrics.json equal:", same)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
